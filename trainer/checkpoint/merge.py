"""Adapter + base -> merged model, block by block, proven by reading back.

    python -m trainer.checkpoint.merge SOURCE --output DIR [--dtype bfloat16|float32|auto] [--base PATH]

SOURCE is a run directory, a checkpoint or a PEFT adapter folder. The base is the original, unquantized model:
merging into 4-bit weights would round the sum to 4 bits again. Every lora pair must hit exactly one tensor of
the base and change it; every other tensor keeps its bytes. The result has the base's file and tensor names.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from launch.errors import CheckpointError, SamestepError
from launch.recipe import load_recipe
from launch.run_directory import RunDirectory, hold_lock, lock_holder
from trainer.checkpoint.adapter import ADAPTER_CONFIG, Adapter, Pair, find_adapter, read_adapter
from trainer.checkpoint.shards import (
    DTYPES,
    FLOATS,
    INDEX_FILE,
    Shard,
    block_rows,
    read_base_shards,
    read_block,
    read_shard,
    tensor_bytes,
    write_shard,
)
from trainer.speech import complain, speak_plainly

DtypeChoice = Literal["auto", "bfloat16", "float32"]
STORED = {"bfloat16": "BF16", "float32": "F32"}
COPIED = (
    "*.json",
    "*.txt",
    "*.jinja",
    "*.model",
    "LICENSE*",
)  # all but the weights
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_OURS = ".samestep-merge"  # locked while a merge writes; a folder with it is ours to throw away

# Module names of transformers 4 and 5, and tensor names on the hub, in one form. The first match counts.
_LAYOUTS = (
    (re.compile(r"^model\.language_model\."), "text."),  # transformers >= 4.52 in memory
    (re.compile(r"^model\.visual\."), "visual."),
    (re.compile(r"^language_model\.model\."), "text."),
    (re.compile(r"^model\."), "text."),  # the hub, and transformers < 4.52 in memory (visual.* stays)
)


@dataclass(frozen=True)
class MergePlan:
    """Everything that is known, and was checked, before the first byte is written."""

    base: Path
    output: Path
    shards: tuple[Shard, ...]
    targets: dict[str, Pair]  # by the tensor name in the base
    dtypes: dict[str, str]  # stored type of every tensor, as safetensors says it
    files: tuple[Path, ...]  # copied beside the weights

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
class MergeReport:
    """What was written and read back. `largest_error`: against the sum in fp64, absolute."""

    base: Path
    output: Path
    files: int
    tensors: int
    pairs: int
    changed: int
    unchanged: int
    bytes_written: int
    largest_error: float


def merge(source: Path, output: Path, *, base: str | None = None, dtype: DtypeChoice = "auto") -> MergeReport:
    """Merge the adapter of `source` into its base and publish the verified result as `output`.

    `dtype`: what the merged model is stored as; `auto` keeps each tensor's own. `base`: folder or hub id, by
    default the one the adapter names.

    Raises:
        CheckpointError: the request cannot be met (then nothing is written), or the result is not right.
    """
    plan = plan_merge(source, output, base=base, dtype=dtype)
    aside = plan.output.with_name(plan.output.name + ".partial")
    _refuse_strange_rest(aside)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        with hold_lock(aside, _OURS):
            report = _write_then_verify(plan, aside)
            _sync_folder(aside)
            aside.rename(plan.output)
        (plan.output / _OURS).unlink()
        _sync_folder(plan.output.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"{plan.output}: could not be written ({error.strerror or error}); free or choose another place"
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return report


def plan_merge(
    source: Path, output: Path, *, base: str | None = None, dtype: DtypeChoice = "auto"
) -> MergePlan:
    """Read adapter and base, check that they fit and that there is room. Writes nothing."""
    output = output.expanduser().absolute()
    if output.exists() or output.is_symlink():
        raise CheckpointError(f"--output: {output} exists already; choose another folder or move it away")
    adapter = read_adapter(find_adapter(source))
    folder = find_base(adapter, base)
    _refuse_quantized_base(folder)
    shards = tuple(read_base_shards(folder))
    targets = match_pairs(adapter, folder, shards)
    plan = MergePlan(
        folder, output, shards, targets, _stored_dtypes(shards, dtype), _files_to_copy(folder, adapter)
    )
    _refuse_without_room(plan)
    return plan


def find_base(adapter: Adapter, base: str | None = None) -> Path:
    """The folder of the base model: `base`, or what the adapter names; a local folder or a hub id."""
    name = base or adapter.base
    if not name:
        raise CheckpointError(f"{adapter.path / ADAPTER_CONFIG}: names no base model; give it with --base")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json; give the base model's folder with --base")
        return folder.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such folder; give the base model's folder or hub id with --base")
    return _snapshot(name, _revision(name, adapter))


def _revision(name: str, adapter: Adapter) -> str:
    """The revision that the run was trained on, when its recipe lies beside the adapter; else the adapter's."""
    recipe_file = RunDirectory(adapter.path.parent).recipe_file
    if recipe_file.is_file() and (model := load_recipe(recipe_file).model).name_or_path == name:
        return model.revision
    return adapter.revision if adapter.revision and adapter.base == name else "main"


def _snapshot(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.safetensors", *COPIED]
    try:
        cached = Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True)
        )
        read_base_shards(cached)
        return cached
    except (LocalEntryNotFoundError, CheckpointError):
        pass  # not in the cache, or only a part of it
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{name}: the hub knows no such model; correct --base or log in") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{name}: the base at revision {revision} is not in the cache and the hub cannot be reached "
            f"({type(error).__name__}); run `samestep prepare RECIPE` once on a machine with a network and "
            "the same HF_HOME, or give a local folder with --base"
        ) from error


def _refuse_quantized_base(folder: Path) -> None:
    quantization = json.loads((folder / "config.json").read_text()).get("quantization_config")
    if quantization:
        kind = quantization.get("quant_method", "unknown method")
        raise CheckpointError(
            f"{folder}: its weights are quantized ({kind}); merging would round the sum again, "
            "give the original bf16 or fp32 model with --base"
        )


def canonical_name(name: str) -> str:
    """One name for a module or tensor of transformers 4, of transformers 5 and on the hub."""
    for pattern, replacement in _LAYOUTS:
        changed, hits = pattern.subn(replacement, name)
        if hits:
            return changed
    return name


def match_pairs(adapter: Adapter, base: Path, shards: Sequence[Shard]) -> dict[str, Pair]:
    """Every lora pair by the name of its tensor on disk. Anything but one tensor of its shape is refused."""
    entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
    names: dict[str, list[str]] = {}
    for name in entries:
        names.setdefault(canonical_name(name), []).append(name)
    targets: dict[str, Pair] = {}
    problems: list[str] = []
    for pair in adapter.pairs:
        found = names.get(canonical_name(pair.module) + ".weight", [])
        if len(found) != 1:
            problems.append(f"{pair.module} matches {', '.join(found) or 'no tensor'}")
        elif entries[found[0]].shape != pair.shape or entries[found[0]].dtype not in FLOATS:
            entry = entries[found[0]]
            problems.append(
                f"{pair.module} is for {list(pair.shape)}, {found[0]} is {entry.dtype} {list(entry.shape)}"
            )
        elif found[0] in targets:
            problems.append(f"{pair.module} and {targets[found[0]].module} both match {found[0]}")
        elif canonical_name(pair.module) == "lm_head" and _tied(base):
            problems.append("lm_head is tied to the embedding, which would change with it")
        else:
            targets[found[0]] = pair
    if problems:
        raise CheckpointError(
            f"{adapter.path}: {len(problems)} of {len(adapter.pairs)} lora pairs do not fit the base {base} "
            f"({'; '.join(problems[:5])}); give the base it was trained on with --base"
        )
    return targets


def _tied(base: Path) -> bool:
    config = json.loads((base / "config.json").read_text())
    return bool(config.get("tie_word_embeddings") or config.get("text_config", {}).get("tie_word_embeddings"))


def _stored_dtypes(shards: Sequence[Shard], dtype: DtypeChoice) -> dict[str, str]:
    return {
        name: STORED[dtype] if dtype != "auto" and entry.dtype in FLOATS else entry.dtype
        for shard in shards
        for name, entry in shard.entries.items()
    }


def _files_to_copy(base: Path, adapter: Adapter) -> tuple[Path, ...]:
    """The base's files beside its weights; where the base has no processor, the adapter folder's."""

    def chosen(folder: Path) -> dict[str, Path]:
        return {
            file.name: file
            for file in sorted(folder.iterdir())
            if file.is_file()
            and any(fnmatch(file.name, pattern) for pattern in COPIED)
            and not fnmatch(file.name, "*.index.json")
            and file.name != ADAPTER_CONFIG
        }

    files = chosen(base)
    if not any(name in files for name in PROCESSOR_FILES):
        files = {**chosen(adapter.path), **files}
    if not any(name in files for name in PROCESSOR_FILES) and _has_vision(base):
        raise CheckpointError(
            f"{base}: has no processor ({' or '.join(PROCESSOR_FILES)}); "
            "copy the processor and tokenizer files there"
        )
    return tuple(files.values())


def _has_vision(base: Path) -> bool:
    return "vision_config" in json.loads((base / "config.json").read_text())


def _refuse_without_room(plan: MergePlan) -> None:
    parent = plan.output.parent
    while not parent.is_dir():
        if parent.exists():
            raise CheckpointError(f"--output: {parent} is a file; choose another folder")
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < plan.bytes_written:
        raise CheckpointError(
            f"--output: {parent} has {free / 1e9:.2f} GB free where the merged model needs "
            f"{plan.bytes_written / 1e9:.2f} GB; free some space or choose another place"
        )
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"--output: {parent} cannot be written to; choose another place")


def _refuse_strange_rest(aside: Path) -> None:
    """The rest of a merge that was killed may be thrown away, anything else of that name may not."""
    if aside.exists() and not (aside / _OURS).is_file():
        raise CheckpointError(f"{aside}: exists and is not the rest of a merge; move it away")
    if holder := lock_holder(aside, _OURS):
        raise CheckpointError(f"{aside}: {holder} is merging to it now; wait, or choose another --output")


def _write_then_verify(plan: MergePlan, aside: Path) -> MergeReport:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        writing = progress.add_task("merge ", total=plan.bytes_read)
        _copy_files(plan, aside)
        for shard in plan.shards:
            write_shard(
                aside / shard.path.name,
                shard,
                plan.dtypes,
                lambda name, begin, rows: (
                    plan.targets[name].merged(rows, begin) if name in plan.targets else rows
                ),
                lambda count: progress.advance(writing, count),
            )
        verifying = progress.add_task("verify", total=plan.bytes_read)
        return verify(plan, aside, lambda count: progress.advance(verifying, count))


def _copy_files(plan: MergePlan, aside: Path) -> None:
    for file in plan.files:
        shutil.copyfile(file, aside / file.name)
    config_file, index_file = aside / "config.json", plan.base / INDEX_FILE
    config: dict[str, Any] = json.loads(config_file.read_text())
    if _set_dtype(config, plan):
        config_file.write_text(json.dumps(config, indent=2) + "\n")
    if index_file.exists():
        index = json.loads(index_file.read_text())
        total = sum(
            e.bytes_as(plan.dtypes[name]) for shard in plan.shards for name, e in shard.entries.items()
        )
        if index.get("metadata", {}).get("total_size", total) == total:
            shutil.copyfile(index_file, aside / INDEX_FILE)
        else:
            index["metadata"]["total_size"] = total
            (aside / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _set_dtype(config: dict[str, Any], plan: MergePlan) -> bool:
    """Write the stored type into config.json where it differs from the base's; says whether it did."""
    before = {e.dtype for shard in plan.shards for e in shard.entries.values() if e.dtype in FLOATS}
    after = {
        plan.dtypes[name] for shard in plan.shards for name, e in shard.entries.items() if e.dtype in FLOATS
    }
    if before == after:
        return False
    name = str(DTYPES[after.pop()]).removeprefix("torch.")
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in section:
                section[key] = name
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class TensorCheck:
    """One tensor of the result. `right`: it is what the merge must give; `changed`: it is not the base's."""

    right: bool
    changed: bool
    error: float = 0.0


def verify(
    plan: MergePlan, folder: Path, advance: Callable[[int], object] = lambda count: None
) -> MergeReport:
    """Read `folder` back: names, shapes, types, the sum of every merged tensor, the bytes of all others.

    Raises:
        CheckpointError: naming the tensors that are not what they must be.
    """
    checks: dict[str, TensorCheck] = {}
    for shard in plan.shards:
        written = read_shard(folder / shard.path.name)
        if list(written.entries) != list(shard.entries):
            raise CheckpointError(f"{written.path}: other tensors than in the base; merge again")
        with shard.path.open("rb") as before, written.path.open("rb") as after:
            for name in shard.entries:
                checks[name] = _check_tensor(plan, name, (before, shard), (after, written), advance)
    damaged = [name for name, check in checks.items() if not check.right]
    if damaged:
        raise CheckpointError(
            f"{folder}: {len(damaged)} tensors are not what was written ({', '.join(damaged[:5])}); "
            "the disk may be faulty, merge to another place"
        )
    silent = [name for name in plan.targets if not checks[name].changed]
    if silent:
        raise CheckpointError(
            f"{folder}: {len(silent)} of {len(plan.targets)} merged tensors equal the base "
            f"({', '.join(silent[:5])}): the change is smaller than the stored precision; "
            "merge with --dtype float32"
        )
    changed = sum(check.changed for check in checks.values())
    return MergeReport(
        base=plan.base,
        output=plan.output,
        files=len(plan.shards),
        tensors=len(checks),
        pairs=len(plan.targets),
        changed=changed,
        unchanged=len(checks) - changed,
        bytes_written=plan.bytes_written,
        largest_error=max(check.error for check in checks.values()),
    )


def _check_tensor(
    plan: MergePlan,
    name: str,
    before: tuple[BinaryIO, Shard],
    after: tuple[BinaryIO, Shard],
    advance: Callable[[int], object],
) -> TensorCheck:
    entry, result, pair = before[1].entries[name], after[1].entries[name], plan.targets.get(name)
    if (result.shape, result.dtype) != (entry.shape, plan.dtypes[name]):
        return TensorCheck(right=False, changed=True)
    right, changed, largest = True, False, 0.0
    for begin, end in block_rows(entry):
        old, new = read_block(before[0], entry, begin, end), read_block(after[0], result, begin, end)
        same = torch.equal(tensor_bytes(old.to(new.dtype)), tensor_bytes(new))
        changed |= not same
        if pair is None:
            right &= same
        else:
            error, within_rounding = sum_error(pair, old, new, begin)
            largest = max(largest, error)
            right &= within_rounding
        advance(old.nbytes)
    return TensorCheck(right, changed, largest)


def sum_error(pair: Pair, old: torch.Tensor, new: torch.Tensor, begin: int) -> tuple[float, bool]:
    """Largest |new - (old + scaling * b @ a)|, the sum in fp64, and whether rounding explains every element.

    Allowed per element: one rounding to the stored type, and fp32 rounding of a product of r terms and a sum.
    """
    b, a = pair.b[begin : begin + len(old)].double(), pair.a.double()
    exact = old.double() + (b @ a) * pair.scaling
    error = (new.double() - exact).abs()
    terms = old.double().abs() + (b.abs() @ a.abs()) * abs(pair.scaling)
    rounding = torch.finfo(new.dtype).eps * exact.abs() + torch.finfo(new.dtype).tiny
    allowed = rounding + (a.shape[0] + 4) * torch.finfo(torch.float32).eps * terms
    return float(error.max()), bool((error <= allowed).all())


def print_report(report: MergeReport, console: Console) -> None:
    """The counts that prove the merge, as a table."""
    table = Table(title=f"merged model: {report.output}", show_header=False, title_justify="left")
    table.add_row("base", str(report.base))
    table.add_row(
        "weight files", f"{report.files} ({report.bytes_written / 1e9:.2f} GB with the files beside them)"
    )
    table.add_row("tensors", f"{report.tensors}, names and shapes as in the base")
    table.add_row("changed", f"{report.changed} for {report.pairs} lora pairs")
    table.add_row("byte-identical", f"{report.unchanged}")
    table.add_row("largest error", f"{report.largest_error:.2e} against the sum in fp64")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.checkpoint.merge",
        description="Merge an adapter into its unquantized base model.",
        epilog="example: python -m trainer.checkpoint.merge runs/embedded --output runs/embedded/merged",
    )
    parser.add_argument("source", type=Path, help="run directory, checkpoint or PEFT adapter folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--dtype",
        choices=get_args(DtypeChoice),
        default="auto",
        help="stored type; auto keeps the base's (default)",
    )
    parser.add_argument(
        "--base", help="folder or hub id of the unquantized base; default: the one the adapter names"
    )
    given = parser.parse_args(arguments)
    speak_plainly()
    try:
        report = merge(given.source, given.output, base=given.base, dtype=given.dtype)
    except SamestepError as error:
        return complain(error)
    print_report(report, Console(highlight=False, soft_wrap=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
