"""What a merge will do, all of it checked before the first byte is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from launch.checkpoints.adapter_file import ADAPTER_CONFIG
from launch.errors import CheckpointError
from launch.run.merge_options import BaseKind, DtypeChoice
from launch.run.merged_model import COMPARISON, RECORD
from launch.run.output_folder import refuse_place
from launch.untrusted_files import TABLE, open_plain
from trainer.export.adapter import Adapter, AdapterOverrides, LoraPair, Saved, read_adapter, refuse_untrained
from trainer.export.base_model import (
    COPIED,
    BaseCheck,
    check_base,
    find_base,
    has_vision,
    refuse_quantized_base,
    run_recipe,
    ties_embeddings,
)
from trainer.export.own_template import OwnTemplate, own_template
from trainer.export.requantize import Rounding, rounding_of
from trainer.formats.key_names import canonical_name
from trainer.formats.safetensors_blocks import FLOATS, Shard, read_base_shards
from trainer.formats.validated import unreadable_is_refused

STORED = {"bfloat16": "BF16", "float32": "F32"}
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
CARD = "README.md"
_NOT_COPIED = (
    "*.index.json", ADAPTER_CONFIG, RECORD, COMPARISON, "trainer_state.json", "manifest.json",
)  # fmt: skip


@dataclass(frozen=True)
class MergePlan:
    """Everything that is known, and was checked, before the first byte is written."""

    adapter: Adapter
    base: Path
    base_check: BaseCheck
    output: Path
    shards: tuple[Shard, ...]
    targets: dict[str, LoraPair | Saved]  # by the tensor name in the base
    rounding: Rounding | None  # with `--base dequantized`
    rounded: frozenset[str]  # tensor names in the base that it rounds
    dtypes: dict[str, str]  # stored type of every tensor, as safetensors says it
    files: tuple[Path, ...]  # copied beside the weights
    template: OwnTemplate | None = None  # in the place of the base's

    @property
    def base_kind(self) -> BaseKind:
        return "original" if self.rounding is None else "dequantized"

    @property
    def bytes_read(self) -> int:
        """Size of the base's tensors."""
        return sum(entry.bytes_as(entry.dtype) for shard in self.shards for entry in shard.entries.values())

    @property
    def bytes_written(self) -> int:
        """Size of the result, headers and copied files included."""
        tensors = sum(
            e.bytes_as(self.dtypes[name]) for shard in self.shards for name, e in shard.entries.items()
        )
        return tensors + sum(f.stat().st_size for f in self.files) + sum(s.header_bytes for s in self.shards)


@dataclass(frozen=True)
class MergeRequest:
    """What is asked for. `recipe`: of an adapter outside a run, for `base: dequantized`.

    `allow`: parts of the base that may differ from the training's.
    """

    source: Path
    output: Path
    base: BaseKind = "original"
    dtype: DtypeChoice = "auto"
    recipe: Path | None = None
    missing: AdapterOverrides = field(default_factory=AdapterOverrides)
    allow: tuple[str, ...] = ()


@unreadable_is_refused()
def plan_merge(request: MergeRequest) -> MergePlan:
    """Read adapter and base, check that they fit and that there is room. Writes nothing.

    Raises:
        CheckpointError: the request cannot be met.
    """
    output = request.output.expanduser().absolute()
    refuse_place(output, 0)
    adapter = read_adapter(request.source, request.missing)
    refuse_untrained(adapter)
    folder = find_base(adapter, request.missing.base_model)
    base_check = check_base(adapter, folder, request.allow)
    refuse_quantized_base(folder)
    shards = tuple(read_base_shards(folder))
    targets = match_targets(adapter, folder, shards)
    rounding = None
    if request.base == "dequantized":
        rounding = rounding_of(run_recipe(request.source, request.recipe), folder)
    plan = MergePlan(
        adapter,
        folder,
        base_check,
        output,
        shards,
        targets,
        rounding,
        _rounded_tensors(rounding, folder, shards),
        _stored_dtypes(shards, request.dtype),
        _files_to_copy(folder, adapter),
        own_template(adapter, run_recipe(request.source, request.recipe)),
    )
    refuse_place(output, plan.bytes_written)
    return plan


def match_targets(adapter: Adapter, base: Path, shards: Sequence[Shard]) -> dict[str, LoraPair | Saved]:
    """Match every LoRA pair and saved tensor to the one tensor of its shape, by that tensor's name on disk."""
    entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
    names: dict[str, list[str]] = {}
    for name in entries:
        names.setdefault(canonical_name(name), []).append(name)
    trained: list[tuple[str, LoraPair | Saved]] = [
        *((canonical_name(pair.module) + ".weight", pair) for pair in adapter.pairs),
        *((f"{canonical_name(saved.module)}.{saved.parameter}", saved) for saved in adapter.saved),
    ]
    tied = ties_embeddings(base)
    targets: dict[str, LoraPair | Saved] = {}
    problems: list[str] = []
    for name, target in trained:
        matches = names.get(name, [])
        if tied and name in ("lm_head.weight", "text.embed_tokens.weight"):
            problems.append(
                f"{target.module} is tied (lm_head is the embedding): the other would change with it"
            )
        elif len(matches) != 1:
            problems.append(f"{target.module} matches {', '.join(matches) or 'no tensor'}")
        elif entries[matches[0]].shape != target.shape or entries[matches[0]].dtype not in FLOATS:
            entry = entries[matches[0]]
            problems.append(
                f"{target.module} is for {list(target.shape)}, {matches[0]} is {entry.dtype} {list(entry.shape)}"
            )
        elif matches[0] in targets:
            problems.append(f"{target.module} and {targets[matches[0]].module} both match {matches[0]}")
        else:
            targets[matches[0]] = target
    if problems:
        kinds = "lora pairs" if not adapter.saved else "lora pairs and saved tensors"
        raise CheckpointError(
            f"{adapter.path}: {len(problems)} of {len(trained)} {kinds} do not fit the base {base} "
            f"({'; '.join(problems[:5])}); give the base it was trained on with --base-model"
        )
    return targets


def _rounded_tensors(rounding: Rounding | None, base: Path, shards: Sequence[Shard]) -> frozenset[str]:
    if rounding is None:
        return frozenset()
    names = {canonical_name(name): name for shard in shards for name in shard.entries}
    if missing := sorted(rounding.names - names.keys()):
        raise CheckpointError(
            f"{base}: {len(missing)} weights that the training quantized are not there ({missing[0]}); "
            "give the base it was trained on with --base-model"
        )
    return frozenset(names[name] for name in rounding.names)


def _stored_dtypes(shards: Sequence[Shard], dtype: DtypeChoice) -> dict[str, str]:
    return {
        name: STORED[dtype] if dtype != "auto" and entry.dtype in FLOATS else entry.dtype
        for shard in shards
        for name, entry in shard.entries.items()
    }


def _files_to_copy(base: Path, adapter: Adapter) -> tuple[Path, ...]:
    """List the base's files beside its weights; where the base has no processor, the adapter folder's."""

    def chosen(folder: Path) -> dict[str, Path]:
        return {
            file.name: file
            for file in sorted(folder.iterdir())
            if file.is_file()
            and any(fnmatch(file.name, pattern) for pattern in COPIED)
            and not any(fnmatch(file.name, pattern) for pattern in _NOT_COPIED)
        }

    files = chosen(base)
    if not any(name in files for name in PROCESSOR_FILES) and adapter.path.is_dir():
        files = {**chosen(adapter.path), **files}
    if not any(name in files for name in PROCESSOR_FILES) and has_vision(base):
        raise CheckpointError(
            f"{base}: has no processor ({' or '.join(PROCESSOR_FILES)}); "
            "copy the processor and tokenizer files there"
        )
    for file in files.values():
        open_plain(file, TABLE).close()  # what cannot be read is to be known before anything is written
    return tuple(files.values())
