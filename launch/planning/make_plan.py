"""Making a plan: recipe x strategy x topology x token lengths -> every derived number, before a run starts."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from launch.inputs.families import read_shape
from launch.planning.auto_settings import ChosenSettings, Gpus, batches_of, choose_auto_settings
from launch.planning.plan import Plan, PlannedSettings, RunHistory
from launch.planning.run_steps import balanced_steps, least_budget, longest_of, whole_steps
from launch.planning.step_plan import StreamOffset
from launch.planning.topology import Topology
from launch.recipe.fingerprint import recipe_fingerprint
from launch.recipe.schema import Recipe
from launch.rules.checks import refuse_request
from launch.rules.request import PlanRequest
from launch.strategies import STRATEGIES
from launch.versions import installed_version

if TYPE_CHECKING:
    from launch.inputs.dataset_index import Index
    from launch.inputs.identity import RunIdentity
    from launch.rules.accelerate_config import LaunchConfig

_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "samestep")


def make_plan(
    recipe: Recipe,
    index: Index,
    topology: Topology,
    *,
    name: str = "",
    config: LaunchConfig | None = None,
    before: Plan | None = None,
    history: RunHistory = RunHistory(),  # noqa: B008 - frozen
    identity: RunIdentity | None = None,
) -> Plan:
    """Derive every number of a run, whose strategy `topology` names. The keywords are what is known of it: its name
    (by default the recipe's), the `config` of a launch under way (else the shipped file counts), its history and
    identity. `before`: a plan for the same recipe and topology, whose settings stay
    (`launch.run.continuation.plan_to_keep`); without it and the GPUs' memory, settings that are `auto` are those that
    need little.
    Raises ConfigError with every rule the request breaks.
    """
    strategy, begin = topology.strategy, history.begin
    samples, longest = len(index.splits["train"]), longest_of(index)
    max_steps, left = whole_steps(recipe, samples, begin)
    request = PlanRequest(
        recipe, strategy, topology.nodes, topology.gpus_per_node, samples, max_steps,
        least_budget(recipe, longest), longest, config, device=topology.device, packages_here=topology.packages_here,
    )  # fmt: skip
    refuse_request(request)
    budget, settings = _settings(recipe, index, topology, begin, before)
    steps = balanced_steps(recipe, index, topology.world_size, budget, max_steps, begin)
    return Plan(
        name=name or recipe.name,
        strategy=strategy,
        nodes=topology.nodes,
        gpus_per_node=topology.gpus_per_node,
        world_size=topology.world_size,
        device=topology.device,
        gpu_memory=topology.gpu_memory or 0,
        global_batch_size=recipe.batch.global_batch_size,
        micro_batch_tokens=budget,
        micro_batches=steps.micro_batches,
        max_steps=max_steps,
        warmup_steps=warmup_steps_of(recipe, max_steps),
        samples_per_epoch=samples,
        steps_per_epoch=samples / recipe.batch.global_batch_size,
        samples_left=left,
        longest_sample_tokens=longest,
        mean_sample_tokens=float(index.splits["train"].tokens.mean()),
        dataset_fingerprint=index.fingerprint,
        recipe_fingerprint=recipe_fingerprint(recipe),
        load_in_4bit=recipe.quantization.load_in_4bit,
        quant_storage=STRATEGIES[strategy].quant_storage,
        compute_dtype=compute_dtype_of(recipe),
        settings=settings,
        data_workers=_data_workers(recipe),
        versions=_versions(),
        begin=begin,
        allowed=sorted(history.allowed),
        started_from=history.started_from,
        identity=dict(identity.parts) if identity else {},
        samples_digest=history.samples_digest,
        strategy_reason=topology.strategy_reason,
    )


def choose_settings(recipe: Recipe, index: Index, topology: Topology, begin: StreamOffset) -> ChosenSettings:
    """The settings that are `auto`, for a strategy and its GPUs. Tries some plans of all steps: a second or two."""
    train = index.splits["train"]
    max_steps, _ = whole_steps(recipe, len(train), begin)

    def micro_batches(budget: int) -> int:
        return balanced_steps(recipe, index, topology.world_size, budget, max_steps, begin).micro_batches

    size = recipe.batch.global_batch_size
    batches = batches_of(train, longest_of(index), size, topology.world_size, micro_batches)
    gpus = Gpus(topology.device, topology.gpu_memory)
    return choose_auto_settings(
        recipe, gpus, read_shape(recipe), topology.strategy, topology.world_size, batches
    )


def _settings(
    recipe: Recipe, index: Index, topology: Topology, begin: StreamOffset, before: Plan | None
) -> tuple[int, PlannedSettings]:
    """(tokens of a micro-batch, settings): those of `before`, or chosen anew, which no GPU has tried yet."""
    if before:
        return before.micro_batch_tokens, before.settings
    choice = choose_settings(recipe, index, topology, begin)
    return choice.micro_batch_tokens, planned_settings(choice)


def planned_settings(choice: ChosenSettings) -> PlannedSettings:
    """The choice as a plan has it: no GPU has tried it yet."""
    return PlannedSettings(
        **asdict(choice.settings),
        reason=choice.reason,
        planned_memory=choice.memory.peak if choice.memory else 0,
    )


def warmup_steps_of(recipe: Recipe, max_steps: int) -> int:
    """Return the warm-up in steps: as `TrainingArguments.get_warmup_steps` of transformers 5.23 (a share rounds up)."""
    warmup = recipe.training.warmup_steps
    return int(warmup) if warmup >= 1 else math.ceil(max_steps * warmup)


def compute_dtype_of(recipe: Recipe) -> str:
    """Return the dtype of the matrix products: bitsandbytes' for a quantized base, else the base's own."""
    quantization = recipe.quantization
    return quantization.bnb_4bit_compute_dtype if quantization.load_in_4bit else recipe.model.dtype


def _data_workers(recipe: Recipe) -> int | None:
    workers = recipe.training.dataloader_num_workers
    return None if workers == "auto" else workers


def _versions() -> dict[str, str]:
    return {package: installed_version(package) for package in _PACKAGES}
