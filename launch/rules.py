"""What is refused before anything starts: one named rule per forbidden combination."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from launch.errors import ConfigError
from launch.recipe import Recipe

STRATEGIES = ("single", "ddp", "fsdp", "zero2", "zero3")


@dataclass(frozen=True)
class Request:
    """What somebody wants to run, and the facts of the prepared data that can forbid it.

    `samples`: of the training split; `max_steps`: whole steps; `budget`: most tokens of a micro-batch;
    `longest`: tokens of the longest sample of the training and validation splits.
    """

    recipe: Recipe
    strategy: str
    nodes: int
    gpus_per_node: int
    samples: int
    max_steps: int
    budget: int
    longest: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


Rule = Callable[[Request], str | None]


def strategy_is_available(request: Request) -> str | None:
    """A strategy is the stem of a file in accelerate_configs/ that the trainer knows."""
    if request.strategy in STRATEGIES:
        return None
    available = ", ".join(STRATEGIES)
    return f"--strategy: {request.strategy!r} is not available yet; choose one of: {available}"


def topology_is_positive(request: Request) -> str | None:
    """At least one process on at least one node."""
    if request.nodes >= 1 and request.gpus_per_node >= 1:
        return None
    return (
        f"--nodes, --gpus-per-node: at least 1 of each is needed "
        f"({request.nodes} nodes, {request.gpus_per_node} processes a node); give numbers from 1 on"
    )


def single_is_one_process(request: Request) -> str | None:
    """accelerate would start N processes that know nothing of each other and write one folder."""
    if request.strategy != "single" or request.world_size <= 1:
        return None
    return (
        f"--strategy: single is one process ({request.world_size} asked for); "
        "use --strategy ddp, or --nodes 1 --gpus-per-node 1"
    )


def every_process_gets_a_sample(request: Request) -> str | None:
    """A process that never holds a sample of a step is bought for nothing."""
    size = request.recipe.batch.global_batch_size
    if request.world_size <= size:
        return None
    return (
        f"batch.global_batch_size: a step has fewer samples than there are processes "
        f"({size} < {request.world_size}); start at most {size} processes, or raise it"
    )


def data_fills_one_step(request: Request) -> str | None:
    """With fewer samples than one global batch, a step would hold a sample twice."""
    size = request.recipe.batch.global_batch_size
    if request.samples >= size:
        return None
    return (
        f"data.train: fewer samples than one step ({request.samples:,} < {size:,}); "
        f"choose a larger split, or lower batch.global_batch_size to {max(request.samples, 1)}"
    )


def run_has_a_step(request: Request) -> str | None:
    """A share of an epoch can be less than one global batch."""
    if request.max_steps >= 1 or request.samples < request.recipe.batch.global_batch_size:
        return None  # the second is data_fills_one_step's to say
    return (
        f"training.num_train_epochs: less than one whole step "
        f"({request.recipe.training.num_train_epochs:g} epochs of {request.samples:,} samples, "
        f"{request.recipe.batch.global_batch_size:,} a step); raise it, or set training.max_steps"
    )


def micro_batch_holds_the_longest_sample(request: Request) -> str | None:
    """A sample is never cut: cutting takes image tokens away."""
    if request.budget >= request.longest:
        return None
    return (
        f"batch.micro_batch_tokens: the longest sample does not fit "
        f"({request.longest:,} tokens > {request.budget:,}); raise it to {request.longest:,} or more, "
        "or lower data.max_pixels"
    )


def warm_up_ends_within_the_run(request: Request) -> str | None:
    """A warm-up longer than the run never reaches the learning rate."""
    warm_up = request.recipe.training.warmup_steps
    if warm_up < 1 or request.max_steps < 1 or warm_up < request.max_steps:
        return None
    return (
        f"training.warmup_steps: the warm-up does not end within the run "
        f"({warm_up:g} of {request.max_steps:,} steps); lower it, or give a share below 1"
    )


def upload_is_available(request: Request) -> str | None:
    """Nothing pushes to the hub yet."""
    if not request.recipe.hub.push:
        return None
    return "hub.push: not available yet; set it to false and upload the adapter folder yourself"


REQUEST_RULES: tuple[Rule, ...] = (
    strategy_is_available,
    topology_is_positive,
    single_is_one_process,
    every_process_gets_a_sample,
    upload_is_available,
)
DATA_RULES: tuple[Rule, ...] = (
    data_fills_one_step,
    run_has_a_step,
    micro_batch_holds_the_longest_sample,
    warm_up_ends_within_the_run,
)


def violations(request: Request) -> Iterator[str]:
    """The message of every rule the request breaks."""
    return _broken(REQUEST_RULES + DATA_RULES, request)


def refuse_topology(recipe: Recipe, strategy: str, nodes: int, gpus_per_node: int) -> None:
    """ConfigError with all that can be said before the data is prepared, which may take long."""
    request = Request(recipe, strategy, nodes, gpus_per_node, samples=0, max_steps=0, budget=0, longest=0)
    if problems := list(_broken(REQUEST_RULES, request)):
        raise ConfigError(problems)


def _broken(rules: tuple[Rule, ...], request: Request) -> Iterator[str]:
    return (message for rule in rules if (message := rule(request)))
