"""The plan: every number of a run that was derived before it started, as plan.json holds it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from launch.errors import ConfigError
from launch.planning.memory_load import Settings
from launch.planning.step_plan import StreamOffset
from launch.planning.topology import Topology
from launch.strategies import STRATEGIES, Strategy
from launch.untrusted_files import parse_json, printable, read_text

_STRICT = ConfigDict(strict=True, extra="forbid")  # of what is read back


SamplesDigest = Literal["positions", "content"]
"""Positions in the split, as runs of older versions have them to their end; or the content of the rows."""


@dataclass(frozen=True)
class PlannedSettings(Settings):
    """The settings that trade memory for time, why they were taken, and what became of them."""

    __pydantic_config__ = _STRICT
    reason: str = ""
    """Why these, and these micro-batches."""
    planned_memory: int = 0
    """Bytes that PyTorch's allocator is planned to reach; 0: not known."""
    tried: bool = False
    """The GPUs have computed the largest micro-batch with them."""
    out_of_memory: int = 0
    """Attempts that ran out of memory with larger ones."""


@dataclass(frozen=True)
class RunHistory:
    """What a run carries over from what was begun before it: earlier attempts, or the checkpoint of another run."""

    begin: StreamOffset = field(default_factory=StreamOffset)
    """Where the arithmetic of the sample stream begins."""
    allowed: tuple[str, ...] = ()
    """What may differ from older checkpoints (`--allow`)."""
    started_from: str = ""
    """The checkpoint of another run that this one began with; empty without one."""
    samples_digest: SamplesDigest = "content"
    """The form that the run's figures have so far."""


@dataclass(frozen=True)
class Plan:
    """All derived numbers of one run. Tokens count text and visual tokens together."""

    __pydantic_config__ = _STRICT
    # Who trains.
    name: str
    """Of the run: its folder's name."""
    strategy: str
    """A name of `STRATEGIES`; `parallelism` is its value."""
    nodes: int
    """Machines."""
    gpus_per_node: int
    """Processes on each machine, each with a GPU of its own where there are GPUs."""
    world_size: int
    """Processes in all."""
    device: str
    """`cuda` or `cpu`."""

    # What a step is.
    global_batch_size: int
    """Samples of an optimizer step, over all ranks."""
    micro_batch_tokens: int
    """The most tokens of a micro-batch."""
    micro_batches: int
    """Micro-batches of every rank in every step: what Trainer and DeepSpeed call gradient accumulation steps."""
    max_steps: int
    """The step that ends the run, counted from its beginning, whatever attempts it takes."""
    warmup_steps: int
    """Steps until the learning rate is reached."""

    # The data.
    samples_per_epoch: int
    """Samples of the training split."""
    steps_per_epoch: float
    """Of them, in steps: not a whole number where a step lies across two epochs."""
    samples_left: int
    """Samples of the last epoch that make no whole step and are not trained."""
    longest_sample_tokens: int
    """Of all splits."""
    mean_sample_tokens: float
    """Of the training split."""
    dataset_fingerprint: str
    """sha256 of the prepared training rows."""
    recipe_fingerprint: str
    """sha256 of the recipe."""

    # Numbers.
    load_in_4bit: bool
    """The base's linear layers are quantized."""
    quant_storage: str
    """dtype that packed 4-bit weights are stored in."""
    compute_dtype: str
    """dtype of the matrix products."""

    # How it fits the GPUs.
    settings: PlannedSettings
    gpu_memory: int
    """Bytes of the smallest GPU; 0: not known."""
    data_workers: int | None
    """Of each process; None: by the cores of its node."""

    # Where it comes from. Older versions wrote a plan.json without these.
    versions: dict[str, str]
    """Installed packages where the plan was made."""
    begin: StreamOffset = field(default_factory=StreamOffset)
    """Where the arithmetic of the sample stream begins."""
    allowed: list[str] = field(default_factory=list)
    """What may differ from the run's older checkpoints (`--allow`)."""
    started_from: str = ""
    """The checkpoint of another run that this one began with; empty without one."""
    identity: dict[str, str] = field(default_factory=dict)
    """Digest of every part of `launch.inputs.identity`; empty where an older version planned."""
    samples_digest: SamplesDigest = "positions"
    """What `metrics.jsonl` names the samples of a step by."""
    strategy_reason: str = ""
    """Why the strategy was taken where `auto` was asked for; empty: it was named."""

    @property
    def parallelism(self) -> Strategy:
        """The value that the name `strategy` stands for."""
        return STRATEGIES[self.strategy]

    @property
    def topology(self) -> Topology:
        """What the plan was made for."""
        memory = self.gpu_memory or None
        return Topology(
            self.strategy,
            self.nodes,
            self.gpus_per_node,
            self.device,
            memory,
            strategy_reason=self.strategy_reason,
        )

    def with_settings(self, **changes: Any) -> Plan:
        """Return a copy with other values of fields of `settings`."""
        return replace(self, settings=replace(self.settings, **changes))

    def to_json(self) -> str:
        """Text of plan.json."""
        return json.dumps(_flat(asdict(self)), indent=2) + "\n"

    @staticmethod
    def from_json(text: str, name: str = "plan.json") -> Plan:
        """Parse the text of plan.json, called `name`. ConfigError when it is damaged or of another version."""
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ConfigError(f"{name}: not a plan ({error}); run the same `samestep run` again") from None
        try:
            plan = _plan_reader().validate_json(json.dumps(_nested(values)))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(
                f"{name}: not a plan of this version ({f'{where}: ' if where else ''}{first['msg']}); "
                "run the same `samestep run` again"
            ) from error
        if plan.strategy not in STRATEGIES:
            raise ConfigError(
                f"{name}: not a plan of this version (strategy: {plan.strategy!r:.40} is none of "
                f"{', '.join(STRATEGIES)}); run the same `samestep run` again"
            )
        if plan.parallelism.shards_layers and plan.quant_storage == "uint8":  # an older version's zero3
            plan = replace(plan, quant_storage=plan.parallelism.quant_storage)
        return plan

    @staticmethod
    def read(file: Path) -> Plan:
        """Read a plan.json, as `from_json`. OSError when the disk does not give it."""
        return Plan.from_json(read_text(file), printable(str(file)))

    def digest(self) -> str:
        """sha256 of the whole plan, hexadecimal: ranks compare it before they start. No file holds it."""
        return hashlib.sha256(json.dumps(_flat(asdict(self)), sort_keys=True).encode()).hexdigest()


def samples_consumed(plan: Plan, step: int) -> int:
    """Samples of the stream that the first `step` optimizer steps have seen."""
    return plan.begin.sample + (step - plan.begin.step) * plan.global_batch_size


# plan.json is flat, as older versions wrote it: a run that one of them planned goes on. Its key -> the field of
# `settings`.
_ON_DISK = {
    "resident_weights": "keep_dequantized",
    "recompute_every": "activation_checkpoint_every",
    "whole_layers": "whole_layers",
    "settings_reason": "reason",
    "planned_memory": "planned_memory",
    "settings_tried": "tried",
    "out_of_memory": "out_of_memory",
}
_NO_LONGER_READ = ("autocast",)  # that older versions wrote


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    settings = values["settings"]
    ours = {key: value for key, value in values.items() if key != "settings"}
    return ours | {key: settings[name] for key, name in _ON_DISK.items()}


def _nested(values: object) -> object:
    """The content of plan.json as `Plan` has it; what it lacks is missing in the answer too."""
    if not isinstance(values, dict):
        return values
    ours = {key: value for key, value in values.items() if key not in (*_ON_DISK, *_NO_LONGER_READ)}
    return ours | {"settings": {name: values[key] for key, name in _ON_DISK.items() if key in values}}


@cache
def _plan_reader() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)
