"""The plan: recipe x strategy x topology x token lengths -> every derived number, before a run starts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from launch.errors import ConfigError
from launch.inputs.families import read_shape
from launch.planning.auto_settings import ChosenSettings, Machine, batches_of, choose, recomputation
from launch.planning.memory import Settings
from launch.planning.step_plan import StepPlan, cost, plan_steps, steps_of
from launch.recipe.schema import Recipe, recipe_fingerprint
from launch.rules.checks import refuse_request
from launch.rules.request import Request
from launch.strategies import storage_of
from launch.units import gib
from launch.untrusted_files import parse_json, read_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from launch.inputs.dataset_index import Index
    from launch.inputs.identity import RunIdentity
    from launch.rules.accelerate_config import LaunchConfig

_STRICT = ConfigDict(strict=True, extra="forbid")  # of what is read back
_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "samestep")


SamplesDigest = Literal["positions", "content"]
"""Positions in the split, as runs of older versions have them to their end; or the content of the rows."""


@dataclass(frozen=True)
class StreamOffset:
    """Where the plan's arithmetic begins: step `step` sees the stream from position `sample` on.

    0, 0 but for a run that went on with another global batch size.
    """

    __pydantic_config__ = _STRICT
    step: int = 0
    sample: int = 0


@dataclass(frozen=True)
class Plan:
    """All derived numbers of one run. Tokens count text and visual tokens together.

    `resident_weights`: 4-bit weights are held dequantized; `recompute_every`: every n-th decoder layer is recomputed
    in the backward pass (0: none); `settings_reason`: why these and the micro-batches; `settings_tried`: on the GPUs,
    with the largest micro-batch; `out_of_memory`: attempts that ran out of memory with larger ones; `gpu_memory`,
    `planned_memory`: bytes that a GPU has, and that PyTorch's allocator is planned to reach (0: not known);
    `data_workers`: of each process, None: by the cores of its node.
    `allowed`: what may differ from the run's older checkpoints (`--allow`); `started_from`: the checkpoint of another
    run that this one began with. `identity`: digest of every part of `launch.inputs.identity`, empty where an older
    version planned; `samples_digest`: what `metrics.jsonl` names the samples of a step by.
    """

    __pydantic_config__ = _STRICT
    name: str
    strategy: str
    nodes: int
    gpus_per_node: int
    world_size: int
    device: str
    global_batch_size: int
    micro_batch_tokens: int
    micro_batches: int
    max_steps: int
    warmup_steps: int
    samples_per_epoch: int
    steps_per_epoch: float
    samples_left: int
    longest_sample_tokens: int
    mean_sample_tokens: float
    dataset_fingerprint: str
    recipe_fingerprint: str
    load_in_4bit: bool
    quant_storage: str
    compute_dtype: str
    autocast: bool
    resident_weights: bool
    recompute_every: int
    settings_reason: str
    gpu_memory: int
    planned_memory: int
    settings_tried: bool
    out_of_memory: int
    data_workers: int | None
    versions: dict[str, str]
    begin: StreamOffset = field(default_factory=StreamOffset)
    allowed: list[str] = field(default_factory=list)
    started_from: str = ""
    identity: dict[str, str] = field(default_factory=dict)
    samples_digest: SamplesDigest = "positions"

    @property
    def gradient_accumulation_steps(self) -> int:
        """What Trainer and DeepSpeed call the micro-batches of a rank in one optimizer step."""
        return self.micro_batches

    def to_json(self) -> str:
        """Text of plan.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """From the text of plan.json. ConfigError when it is damaged or of another version."""
        try:
            parse_json(text)
        except ValueError as error:
            raise ConfigError(f"plan.json: not a plan ({error}); run the same `samestep run` again") from None
        try:
            return _plan_reader().validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(
                f"plan.json: not a plan of this version ({f'{where}: ' if where else ''}{first['msg']}); "
                "run the same `samestep run` again"
            ) from error

    @staticmethod
    def read(file: Path) -> Plan:
        """As `from_json`, of the file. OSError when the disk does not give it."""
        return Plan.from_json(read_text(file))

    def digest(self) -> str:
        """sha256 of the whole plan, hexadecimal: ranks compare it before they start."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@cache
def _plan_reader() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)


def make_plan(
    recipe: Recipe,
    index: Index,
    *,
    strategy: str,
    nodes: int,
    gpus_per_node: int,
    device: str,
    name: str = "",
    begin: StreamOffset = StreamOffset(),
    allowed: Sequence[str] = (),
    started_from: str = "",
    config: LaunchConfig | None = None,
    gpu_memory: int | None = None,
    before: Plan | None = None,
    packages_here: bool = True,
    identity: RunIdentity | None = None,
    samples_digest: SamplesDigest = "content",
) -> Plan:
    """Derive every number of a run. `device`: `cuda` or `cpu`; `name`: of the run, the recipe's by default.

    `config`: what was launched, where that is known; else the shipped file counts. `gpu_memory`: bytes of the smallest
    GPU; without it, settings that are `auto` are those that need little. `before`: a plan for the same recipe and
    hardware, whose settings stay (`launch.run.continuation.plan_to_keep`). `packages_here`:
    it runs with this Python's packages.
    `identity`: of the run, where it is known.

    Raises ConfigError with every rule the request breaks.
    """
    tokens, longest = index.splits["train"].tokens, longest_of(index)
    max_steps, left = whole_steps(recipe, len(tokens), begin)
    least = least_budget(recipe, longest)
    request = Request(recipe, strategy, nodes, gpus_per_node, len(tokens), max_steps, least, longest, config)
    refuse_request(replace(request, device=device, packages_here=packages_here))
    where = Hardware(strategy, request.world_size, device, gpu_memory)
    chosen = choose_settings(recipe, index, where, begin) if before is None else _choice_of(before)
    steps = balanced_steps(recipe, index, request.world_size, chosen.micro_batch_tokens, max_steps, begin)
    compute_dtype, workers = compute_dtype_of(recipe), recipe.training.dataloader_num_workers
    return Plan(
        name=name or recipe.name,
        strategy=strategy,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        world_size=request.world_size,
        device=device,
        global_batch_size=recipe.batch.global_batch_size,
        micro_batch_tokens=chosen.micro_batch_tokens,
        micro_batches=steps.micro_batches,
        max_steps=max_steps,
        warmup_steps=warmup_steps_of(recipe, max_steps),
        samples_per_epoch=len(tokens),
        steps_per_epoch=len(tokens) / recipe.batch.global_batch_size,
        samples_left=left,
        longest_sample_tokens=longest,
        mean_sample_tokens=float(tokens.mean()),
        dataset_fingerprint=index.fingerprint,
        recipe_fingerprint=recipe_fingerprint(recipe),
        load_in_4bit=recipe.quantization.load_in_4bit,
        quant_storage=storage_of(strategy),
        compute_dtype=compute_dtype,
        autocast=compute_dtype == "bfloat16",
        resident_weights=chosen.settings.resident_weights,
        recompute_every=chosen.settings.recompute_every,
        settings_reason=chosen.reason,
        gpu_memory=gpu_memory or 0,
        planned_memory=before.planned_memory if before else peak_of(chosen),
        settings_tried=before is not None and before.settings_tried,
        out_of_memory=before.out_of_memory if before else 0,
        data_workers=None if workers == "auto" else workers,
        versions=_versions(),
        begin=begin,
        allowed=sorted(allowed),
        started_from=started_from,
        identity=dict(identity.parts) if identity else {},
        samples_digest=samples_digest,
    )


@dataclass(frozen=True)
class Hardware:
    """What a run's settings are chosen for. `gpu_memory`: bytes of the smallest GPU, None: not known."""

    strategy: str
    world_size: int
    device: str
    gpu_memory: int | None = None


def choose_settings(
    recipe: Recipe, index: Index, where: Hardware, begin: StreamOffset = StreamOffset()
) -> ChosenSettings:
    """The settings that are `auto`, for a strategy and its GPUs. Tries some deals of the whole run: a second or two."""
    train = index.splits["train"]
    size = recipe.batch.global_batch_size
    max_steps, _ = whole_steps(recipe, len(train), begin)
    batches = batches_of(
        train,
        longest_of(index),
        size,
        where.world_size,
        lambda budget: (
            balanced_steps(recipe, index, where.world_size, budget, max_steps, begin).micro_batches
        ),
    )
    machine = Machine(where.device, where.gpu_memory)
    return choose(recipe, machine, read_shape(recipe), where.strategy, where.world_size, batches)


def _choice_of(plan: Plan) -> ChosenSettings:
    settings = Settings(plan.resident_weights, plan.recompute_every)
    return ChosenSettings(plan.micro_batch_tokens, settings, None, plan.settings_reason)


def peak_of(chosen: ChosenSettings) -> int:
    """Bytes that PyTorch's allocator is planned to reach, 0: not known."""
    return chosen.memory.peak if chosen.memory else 0


def longest_of(index: Index) -> int:
    """Tokens of the longest sample of all splits."""
    return max((int(split.tokens.max()) for split in index.splits.values() if len(split)), default=0)


def least_budget(recipe: Recipe, longest: int) -> int:
    """The fewest tokens that a micro-batch may be planned with."""
    asked = recipe.batch.micro_batch_tokens
    return longest if asked == "auto" else asked


def balanced_steps(
    recipe: Recipe, index: Index, world_size: int, budget: int, max_steps: int, begin: StreamOffset
) -> StepPlan:
    """The step plan with the fewest micro-batches of a budget in tokens. ConfigError as `plan_steps`."""
    train = index.splits["train"]
    return plan_steps(
        train.tokens,
        cost(train.text_tokens, train.visual_tokens),
        global_batch_size=recipe.batch.global_batch_size,
        world_size=world_size,
        budget=budget,
        max_steps=max_steps,
        seed=recipe.training.seed,
        fingerprint=index.fingerprint,
        first_step=begin.step,
        first_sample=begin.sample,
    )


def step_plan(recipe: Recipe, index: Index, plan: Plan) -> StepPlan:
    """The step plan of a plan: no search, `plan.micro_batches` was found when the plan was made."""
    train = index.splits["train"]
    return StepPlan(
        n=plan.samples_per_epoch,
        global_batch_size=plan.global_batch_size,
        world_size=plan.world_size,
        max_steps=plan.max_steps,
        micro_batches=plan.micro_batches,
        budget=plan.micro_batch_tokens,
        seed=recipe.training.seed,
        fingerprint=plan.dataset_fingerprint,
        first_step=plan.begin.step,
        first_sample=plan.begin.sample,
        tokens=train.text_tokens + train.visual_tokens,
        costs=cost(train.text_tokens, train.visual_tokens),
    )


def validation_samples(recipe: Recipe, index: Index) -> NDArray[np.int64]:
    """Positions in the validation split of what an evaluation sees: at most `max_samples`, evenly over the split."""
    import numpy as np

    count = len(index.splits["validation"])
    chosen = min(recipe.evaluation.max_samples, count)
    return np.linspace(0, count - 1, chosen).round().astype(np.int64)


def whole_steps(recipe: Recipe, samples: int, begin: StreamOffset = StreamOffset()) -> tuple[int, int]:
    """Optimizer steps of the run, and the samples of `num_train_epochs` left after the last whole step.

    `training.max_steps` wins over the epochs, as in transformers; the stream then goes on as long as needed.
    """
    training = recipe.training
    if training.max_steps >= 1:
        return training.max_steps, 0
    steps, left = steps_of(samples, training.num_train_epochs, recipe.batch.global_batch_size, begin.sample)
    return begin.step + steps, left


def samples_consumed(plan: Plan, step: int) -> int:
    """Samples of the stream that the first `step` optimizer steps have seen."""
    return plan.begin.sample + (step - plan.begin.step) * plan.global_batch_size


def warmup_steps_of(recipe: Recipe, max_steps: int) -> int:
    """Warm-up in steps: as `TrainingArguments.get_warmup_steps` of transformers 5.23 (a share rounds up)."""
    asked = recipe.training.warmup_steps
    return int(asked) if asked >= 1 else math.ceil(max_steps * asked)


def compute_dtype_of(recipe: Recipe) -> str:
    """dtype of the matrix products: bitsandbytes' for a quantized base, else the base's own."""
    quantization = recipe.quantization
    return quantization.bnb_4bit_compute_dtype if quantization.load_in_4bit else recipe.model.dtype


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """What a reader wants to know of a plan, as (name, value with unit)."""
    unit = "GPU" if plan.device == "cuda" else "CPU"
    epochs = samples_consumed(plan, plan.max_steps) / plan.samples_per_epoch
    return [
        ("run", plan.name),
        ("strategy", plan.strategy),
        ("processes", f"{plan.world_size} ({plan.nodes} x {plan.gpus_per_node} {unit})"),
        *([("notice", notice)] if (notice := _notice(plan)) else []),
        ("global batch", f"{plan.global_batch_size:,} samples"),
        (
            "micro-batches",
            f"{plan.micro_batches:,} a rank and step, {plan.micro_batch_tokens:,} tokens at most",
        ),
        ("samples an epoch", f"{plan.samples_per_epoch:,} ({plan.steps_per_epoch:,.2f} steps)"),
        ("steps", f"{plan.max_steps:,} ({epochs:,.2f} epochs), {plan.warmup_steps:,} of them warm-up"),
        ("left of the stream", f"{plan.samples_left:,} samples left after the last whole step"),
        ("tokens a sample", f"{plan.mean_sample_tokens:,.0f} mean, {plan.longest_sample_tokens:,} longest"),
        (
            "precision",
            f"{plan.compute_dtype} products, float32 adapters, {_base_of(plan)}",
        ),
        ("recomputed", recomputation(plan.recompute_every)),
        ("memory a GPU", _memory_of(plan)),
        ("data workers", _workers_of(plan)),
        *([("starts from", plan.started_from)] if plan.started_from else []),
        *([("allowed to differ", ", ".join(plan.allowed))] if plan.allowed else []),
        ("dataset", plan.dataset_fingerprint[:12]),
        ("recipe", plan.recipe_fingerprint[:12]),
    ]


def _notice(plan: Plan) -> str | None:
    if plan.world_size == 1 and plan.strategy in ("fsdp", "zero2", "zero3"):
        return f"{plan.strategy} on one process shards nothing; `single` does the same with less"
    return None


def _base_of(plan: Plan) -> str:
    if not plan.load_in_4bit:
        return "weights as they are"
    return f"4-bit weights {'held dequantized' if plan.resident_weights else f'in {plan.quant_storage}'}"


def _workers_of(plan: Plan) -> str:
    if plan.data_workers is not None:
        return f"{plan.data_workers} a process"
    return "8 a process at most, one core left to each: by the cores of its node"


def _memory_of(plan: Plan) -> str:
    """What a GPU is planned to need, and why the settings are what they are."""
    needed = f"{gib(plan.planned_memory)} planned; " if plan.planned_memory and plan.device == "cuda" else ""
    return needed + plan.settings_reason


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
