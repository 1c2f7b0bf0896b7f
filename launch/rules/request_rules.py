"""What is refused before anything starts: one named rule per forbidden combination."""

import difflib
import importlib.util

from launch.inputs.families import every_tower_linear, read_shape, tower_targets, why_not_trained
from launch.inputs.model_shape import LAYER_LINEARS, reached_in_tower, unreached
from launch.inputs.own_metrics import why_no_metric
from launch.rules.request import PlanRequest, Rule
from launch.strategies import AUTO, STRATEGIES


def strategy_is_available(request: PlanRequest) -> str | None:
    """A strategy is the stem of a file in accelerate_configs/ that the trainer knows."""
    if request.strategy in STRATEGIES:
        return None
    near = difflib.get_close_matches(request.strategy.lower(), (*STRATEGIES, AUTO), n=1)
    hint = f"did you mean {near[0]}?" if near else "see `samestep plan --help`"
    return f"--strategy: {request.strategy!r} is none of {', '.join((*STRATEGIES, AUTO))}; {hint}"


def topology_is_positive(request: PlanRequest) -> str | None:
    """At least one process on at least one node."""
    if request.nodes >= 1 and request.gpus_per_node >= 1:
        return None
    return (
        f"--nodes, --gpus-per-node: at least 1 of each is needed "
        f"({request.nodes} nodes, {request.gpus_per_node} processes a node); give numbers from 1 on"
    )


def single_is_one_process(request: PlanRequest) -> str | None:
    """accelerate would start N processes that know nothing of each other and write one folder."""
    if not request.parallelism.is_one_process or request.world_size <= 1:
        return None
    return (
        f"--strategy: single is one process ({request.world_size} asked for); "
        "use --strategy ddp, or --nodes 1 --gpus-per-node 1"
    )


def fsdp_has_gpus(request: PlanRequest) -> str | None:
    """On CPUs accelerate makes ddp of fsdp, or runs that know nothing of each other, without an error."""
    if request.parallelism.engine != "fsdp" or request.device != "cpu":
        return None
    return (
        f"--strategy: fsdp needs GPUs ({request.world_size} CPU processes asked for); use ddp, zero2 or zero3 "
        "on CPUs; for GPUs elsewhere only `samestep plan --gpu-memory 80GB` plans it"
    )


def every_process_gets_a_sample(request: PlanRequest) -> str | None:
    """A process that never holds a sample of a step is bought for nothing."""
    size = request.recipe.batch.global_batch_size
    if request.world_size <= size:
        return None
    return (
        f"batch.global_batch_size: a step has fewer samples than there are processes "
        f"({size} < {request.world_size}); start at most {size} processes, or raise it"
    )


def data_fills_one_step(request: PlanRequest) -> str | None:
    """With fewer samples than one global batch, a step would hold a sample twice."""
    size = request.recipe.batch.global_batch_size
    if request.samples >= size:
        return None
    return (
        f"data.train: fewer samples than one step ({request.samples:,} < {size:,}); "
        f"choose a larger split, or lower batch.global_batch_size to {max(request.samples, 1)}"
    )


def run_has_a_step(request: PlanRequest) -> str | None:
    """A share of an epoch can be less than one global batch."""
    if request.max_steps >= 1 or request.samples < request.recipe.batch.global_batch_size:
        return None  # the second is data_fills_one_step's to say
    return (
        f"training.num_train_epochs: less than one whole step "
        f"({request.recipe.training.num_train_epochs:g} epochs of {request.samples:,} samples, "
        f"{request.recipe.batch.global_batch_size:,} a step); raise it, or set training.max_steps"
    )


def micro_batch_holds_the_longest_sample(request: PlanRequest) -> str | None:
    """A sample is never cut: cutting takes image tokens away."""
    if request.budget >= request.longest:
        return None
    return (
        f"batch.micro_batch_tokens: the longest sample does not fit "
        f"({request.longest:,} tokens > {request.budget:,}); raise it to {request.longest:,} or more, "
        "or lower data.max_pixels"
    )


def warm_up_ends_within_the_run(request: PlanRequest) -> str | None:
    """A warm-up longer than the run never reaches the learning rate."""
    warm_up = request.recipe.training.warmup_steps
    if warm_up < 1 or request.max_steps < 1 or warm_up < request.max_steps:
        return None
    return (
        f"training.warmup_steps: the warm-up does not end within the run "
        f"({warm_up:g} of {request.max_steps:,} steps); lower it, or give a share below 1"
    )


def upload_has_a_token(request: PlanRequest) -> str | None:
    """An upload that cannot succeed would be noticed when the training is over."""
    if not request.recipe.hub.push or not request.packages_here:
        return None
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "hub.push: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or set hub.push: false"
    if not get_token():
        return "hub.push: no token of the hub is there; type `hf auth login`, set HF_TOKEN, or set hub.push: false"
    return None


def trackers_are_installed(request: PlanRequest) -> str | None:
    """A tracker that is missing would be noticed when the curves are looked for."""
    if not request.packages_here:
        return None
    names = request.recipe.tracking.trackers
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    extras = ",".join(missing)
    return (
        f"tracking.report_to: {', '.join(missing)} is not installed ({len(missing)} of {len(names)} trackers); "
        f"pip install 'samestep[{extras}]', or leave it out"
    )


def metrics_of_ones_own_are_there(request: PlanRequest) -> str | None:
    """A metric that cannot be loaded would be noticed when the answers are there."""
    why = why_no_metric(request.recipe) if request.packages_here else None
    return f"evaluation.metrics: {why}" if why else None


def base_is_of_a_known_family(request: PlanRequest) -> str | None:
    """transformers loads a model of another kind as far as the names agree."""
    why = why_not_trained(request.recipe)
    return f"model.name_or_path: {why}" if why else None


def lora_names_layers_that_are_there(request: PlanRequest) -> str | None:
    """PEFT passes over a name that reaches nothing; LoRA elsewhere would not train as asked."""
    modules = request.recipe.lora.target_modules
    if isinstance(modules, str):
        return None
    shape = read_shape(request.recipe)
    if isinstance(shape, str):  # not here: who loads the base sees which layers it has
        idle = [name for name in unreached(modules, None) if not reached_in_tower(name, every_tower_linear())]
    else:
        tower = {path: linear.copies for path, linear in shape.tower_linears.items()}
        idle = [name for name in unreached(modules, shape.layers) if not reached_in_tower(name, tower)]
    if not idle:
        return None
    known = [name.rpartition(".")[2] for name in LAYER_LINEARS]
    near = difflib.get_close_matches(idle[0].rpartition(".")[2], known, n=1)
    hint = f"did you mean {near[0]}? there" if near else "there"
    return (
        f"lora.target_modules: {', '.join(map(repr, idle))} names no linear layer of decoder or vision tower "
        f"({len(idle)} of {len(modules)}); {hint} are {', '.join(known)}, or give `all-linear` without a list"
    )


def trained_tower_is_whole(request: PlanRequest) -> str | None:
    """ZeRO-3 does not know the tower, which it must not partition: a rank without images would leave others waiting."""
    targets = tower_targets(request.recipe)
    if request.strategy != "zero3" or not targets:
        return None
    return (
        f"lora.target_modules: LoRA in the vision tower ({len(targets)} kinds of layers, such as {targets[0]}) with "
        "--strategy zero3, which knows nothing of the tower; use ddp, fsdp or zero2, or name layers of the decoder"
    )


def trained_tower_is_not_cached(request: PlanRequest) -> str | None:
    """Features of a tower that trains are others after every step."""
    targets, place = tower_targets(request.recipe), request.recipe.data.vision_cache
    if place == "off" or not targets:
        return None
    return (
        f"data.vision_cache: {place} with LoRA in the vision tower ({len(targets)} kinds of layers, such as "
        f"{targets[0]}), whose features change with every step; set it to off, or name layers of the decoder"
    )


def dora_sees_whole_weights(request: PlanRequest) -> str | None:
    """DoRA measures the whole rows of every weight when it begins: with fsdp and zero3 no rank has loaded them."""
    if not request.recipe.lora.use_dora or request.strategy not in ("fsdp", "zero3"):
        return None
    return (
        f"lora.use_dora: true with --strategy {request.strategy}, where a rank loads a part of each weight, and DoRA "
        "measures the whole rows before the first step; "
        "use ddp or zero2, or set it to false"
    )


def patterns_name_layers_with_lora(request: PlanRequest) -> str | None:
    """PEFT passes over a pattern that fits no layer with LoRA."""
    lora = request.recipe.lora
    names = lora.target_modules
    if isinstance(names, str):
        names = [linear.rpartition(".")[2] for linear in LAYER_LINEARS]
    idle = [
        (key, pattern)
        for key in ("rank_pattern", "alpha_pattern")
        for pattern in getattr(lora, key)
        if not any(_ends(name, pattern) or _ends(pattern, name) for name in names)
    ]
    if not idle:
        return None
    key, pattern = idle[0]
    return (
        f"lora.{key}: {pattern!r} names no layer that has LoRA ({len(idle)} such names; target_modules: "
        f"{', '.join(names)}); correct the name, or add it to target_modules"
    )


def _ends(path: str, name: str) -> bool:
    return f".{path}".endswith(f".{name}")


def sharded_weights_stay_packed(request: PlanRequest) -> str | None:
    """Weights held dequantized on every GPU are what sharding is there to avoid."""
    if request.recipe.model.resident_weights is not True or not request.parallelism.shards_layers:
        return None
    return (
        f"model.resident_weights: true with --strategy {request.strategy}, which shares the 4-bit weights out; "
        "set it to auto or false, or use --strategy ddp"
    )


SCHEMA_RULES: tuple[tuple[str, str], ...] = (
    (
        "training.optim",
        "8-bit and paged optimizers break sharded saves (bitsandbytes#89, #1381): torch's AdamW only",
    ),
    (
        "training.gradient_checkpointing_kwargs",
        "reentrant recomputation fails under ddp: it is ours, non-reentrant",
    ),
    ("quantization.bnb_4bit_quant_storage", "the plan's: uint8 where replicated, float16 where FSDP shards"),
    ("batch", "no world size in a recipe: the global batch is what is trained"),
)
"""What a recipe cannot say at all, and why."""

REQUEST_RULES: tuple[Rule, ...] = (
    strategy_is_available,
    topology_is_positive,
    single_is_one_process,
    fsdp_has_gpus,
    every_process_gets_a_sample,
    base_is_of_a_known_family,
    lora_names_layers_that_are_there,
    trained_tower_is_whole,
    trained_tower_is_not_cached,
    dora_sees_whole_weights,
    patterns_name_layers_with_lora,
    sharded_weights_stay_packed,
    upload_has_a_token,
    trackers_are_installed,
    metrics_of_ones_own_are_there,
)
DATA_RULES: tuple[Rule, ...] = (
    data_fills_one_step,
    run_has_a_step,
    micro_batch_holds_the_longest_sample,
    warm_up_ends_within_the_run,
)
