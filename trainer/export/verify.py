"""A merged model read back from the disk, tensor by tensor, against what the merge must give."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from launch.errors import CheckpointError
from launch.untrusted_files import open_plain
from trainer.export.adapter import LoraPair, Saved
from trainer.export.base_model import BaseCheck
from trainer.export.merge_plan import MergePlan
from trainer.export.requantize import Rounding
from trainer.formats.safetensors_blocks import (
    SAFETENSORS_DTYPES,
    Entry,
    Shard,
    block_rows,
    read_block,
    read_shard,
    tensor_bytes,
)


@dataclass(frozen=True)
class MergeReport:
    """What was written and read back. `largest_error`: against the sum in fp64, absolute.

    `rounded`: tensors that `--base dequantized` rounded to 4 bits and back, without those that a pair changed too;
    `converted`: of the rest those stored in another type than in the base, `converted_to` (None: there are none);
    `unchanged`: those with the base's bytes.
    """

    base: Path
    base_check: BaseCheck
    base_kind: str
    form: str
    output: Path
    files: int
    tensors: int
    pairs: int
    saved: int
    changed: int
    rounded: int
    converted: int
    converted_to: str | None
    unchanged: int
    bytes_written: int
    largest_error: float


@dataclass(frozen=True)
class _Check:
    """One tensor of the result. `right`: it is what the merge must give; `changed`: it is not what it was before."""

    right: bool
    changed: bool
    error: float = 0.0


class BaseRows:
    """Rows of the base as the merge starts from: as stored, or rounded to 4 bits and back.

    The last rounded tensor is kept, because its rows are asked for one block after the other.
    """

    def __init__(self, rounding: Rounding | None, rounded: frozenset[str]) -> None:
        self._rounding, self._names = rounding, rounded
        self._last: tuple[Path, str, torch.Tensor] | None = None

    def rows(self, file: BinaryIO, shard: Shard, name: str, begin: int, end: int) -> torch.Tensor:
        """Return rows [begin, end) of a tensor, [rows, width]."""
        entry = shard.entries[name]
        if self._rounding is None or name not in self._names:
            return read_block(file, entry, begin, end)
        if self._last is None or self._last[:2] != (shard.path, name):
            self._last = None  # before the next one is made: one at a time in memory
            whole = read_block(file, entry, 0, entry.rows)
            self._last = (shard.path, name, self._rounding.rounded(whole))
        return self._last[2][begin:end]


def verify_merged(
    plan: MergePlan,
    folder: Path,
    digests: Mapping[str, bytes] | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> MergeReport:
    """Read `folder` back: names, shapes, types, the sum of every merged tensor, the bytes of all others.

    `digests`: sha256 of what was to be written, taken from the base while it was read; with them the tensors that no
    pair changes are compared without reading (and rounding) the base a second time, and of those that one changes not
    only the sum must be right, but every bit.

    Raises:
        CheckpointError: naming the tensors that are not what they must be.
    """
    checks: dict[str, _Check] = {}
    start = BaseRows(plan.rounding, plan.rounded)
    for shard in plan.shards:
        written = read_shard(folder / shard.path.name)
        if list(written.entries) != list(shard.entries):
            raise CheckpointError(f"{written.path}: other tensors than in the base; merge again")
        with open_plain(shard.path) as before, open_plain(written.path) as after:
            for name in shard.entries:
                digest = None if digests is None else digests[name]
                checks[name] = (
                    _check_tensor(plan, name, digest, start, (before, shard), (after, written), advance)
                    if digest is None or name in plan.targets
                    else _check_digest(plan, name, digest, shard.entries[name], (after, written), advance)
                )
    _refuse_damage(plan, folder, checks)
    return _report(plan, checks)


def _refuse_damage(plan: MergePlan, folder: Path, checks: Mapping[str, _Check]) -> None:
    damaged = [name for name, check in checks.items() if not check.right]
    if damaged:
        raise CheckpointError(
            f"{folder}: {len(damaged)} tensors are not what was written ({', '.join(damaged[:5])}); "
            "the disk may be faulty, merge to another place"
        )
    silent = [
        name
        for name, target in plan.targets.items()
        if isinstance(target, LoraPair) and not checks[name].changed
    ]
    if silent:
        raise CheckpointError(
            f"{folder}: {len(silent)} of {len(plan.targets)} merged tensors equal the base "
            f"({', '.join(silent[:5])}): the change is smaller than the stored precision; "
            "merge with --dtype float32"
        )


def _report(plan: MergePlan, checks: Mapping[str, _Check]) -> MergeReport:
    stored = {name: entry.dtype for shard in plan.shards for name, entry in shard.entries.items()}
    changed = {name for name in plan.targets if checks[name].changed}
    rounded = plan.rounded - changed
    kept = checks.keys() - changed - rounded
    converted = {name for name in kept if stored[name] != plan.dtypes[name]}
    types = {str(SAFETENSORS_DTYPES[plan.dtypes[name]]).removeprefix("torch.") for name in converted}
    return MergeReport(
        base=plan.base,
        base_check=plan.base_check,
        base_kind=plan.base_kind,
        form=plan.adapter.form,
        output=plan.output,
        files=len(plan.shards),
        tensors=len(checks),
        pairs=len(plan.adapter.pairs),
        saved=len(plan.adapter.saved),
        changed=len(changed),
        rounded=len(rounded),
        converted=len(converted),
        converted_to=" and ".join(sorted(types)) or None,
        unchanged=len(kept) - len(converted),
        bytes_written=plan.bytes_written,
        largest_error=max(check.error for check in checks.values()),
    )


def _check_digest(
    plan: MergePlan,
    name: str,
    digest: bytes,
    entry: Entry,
    after: tuple[BinaryIO, Shard],
    advance: Callable[[int], object],
) -> _Check:
    result = after[1].entries[name]
    hasher = hashlib.sha256()
    for begin, end in block_rows(result):
        hasher.update(tensor_bytes(read_block(after[0], result, begin, end)).numpy().data)
        advance(_bytes_of(entry, begin, end))
    same_kind = (result.shape, result.dtype) == (entry.shape, plan.dtypes[name])
    return _Check(right=same_kind and hasher.digest() == digest, changed=False)


def _check_tensor(
    plan: MergePlan,
    name: str,
    digest: bytes | None,
    start: BaseRows,
    before: tuple[BinaryIO, Shard],
    after: tuple[BinaryIO, Shard],
    advance: Callable[[int], object],
) -> _Check:
    entry, result, target = before[1].entries[name], after[1].entries[name], plan.targets.get(name)
    if (result.shape, result.dtype) != (entry.shape, plan.dtypes[name]):
        return _Check(right=False, changed=True)
    right, changed, largest, hasher = True, False, 0.0, hashlib.sha256()
    for begin, end in block_rows(entry):
        old = start.rows(before[0], before[1], name, begin, end)
        new = read_block(after[0], result, begin, end)
        hasher.update(tensor_bytes(new).numpy().data)
        expected = target.merged(old, begin) if isinstance(target, Saved) else old
        same = _same_bytes(expected, new)
        changed |= not (same if expected is old else _same_bytes(old, new))
        if isinstance(target, LoraPair):
            error, within_rounding = sum_error(target, old, new, begin)
            largest = max(largest, error)
            right &= within_rounding
        else:
            right &= same
        advance(_bytes_of(entry, begin, end))
    return _Check(right and digest in (None, hasher.digest()), changed, largest)


def _same_bytes(expected: torch.Tensor, new: torch.Tensor) -> bool:
    return torch.equal(tensor_bytes(expected.to(new.dtype)), tensor_bytes(new))


def _bytes_of(entry: Entry, begin: int, end: int) -> int:
    return (end - begin) * entry.width * SAFETENSORS_DTYPES[entry.dtype].itemsize


def sum_error(pair: LoraPair, old: torch.Tensor, new: torch.Tensor, begin: int) -> tuple[float, bool]:
    """Largest |new - what it must be|, computed in fp64, and whether rounding explains every element.

    It must be old + scaling * b @ a, with a magnitude (DoRA) each row brought to its length. Allowed per element:
    one rounding to the stored type, and fp32 rounding of a product of r terms, a sum, and a row's length.
    """
    unit, width = torch.finfo(torch.float32).eps, old.shape[1]
    b, a = pair.b[begin : begin + len(old)].double(), pair.a.double()
    exact = old.double() + (b @ a) * pair.scaling
    terms = old.double().abs() + (b.abs() @ a.abs()) * abs(pair.scaling)
    allowed = (a.shape[0] + 4) * unit * terms
    if pair.magnitude is not None:
        length = torch.linalg.norm(exact, dim=1, keepdim=True)
        factor = pair.magnitude[begin : begin + len(old), None].double() / length
        of_length = torch.linalg.norm(allowed, dim=1, keepdim=True) / length + 4 * width**0.5 * unit
        exact = factor * exact
        allowed = factor.abs() * allowed + exact.abs() * of_length
    allowed += torch.finfo(new.dtype).eps * exact.abs() + torch.finfo(new.dtype).tiny
    error = (new.double() - exact).abs()
    return float(error.max()), bool((error <= allowed).all())
