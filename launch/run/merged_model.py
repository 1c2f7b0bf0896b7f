"""Whether a merged model is of the adapter that its run has now: a run that goes on writes another adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.checkpoints.adapter_file import ADAPTER_WEIGHTS, read_digest
from launch.run.directory import RunDirectory
from launch.untrusted_files import TABLE, UNREADABLE, path_inside, plain_size, read_mapping

RECORD, DIGEST = "merge.json", "adapter_sha256"
COMPARISON = "comparison.json"
"""In a merged model: how it differs from base + adapter. Written last, so a merge without it is not compared yet."""


def is_of_another_adapter(run: RunDirectory, merged: Path) -> bool:
    """The merged model in the folder `merged` is not of the run's adapter, as far as that can be read.

    A merge that recorded no adapter (an older samestep's, or another tool's) is judged by age, which a copy without
    the files' times makes a guess.
    """
    weights, config = run.adapter / ADAPTER_WEIGHTS, merged / "config.json"
    if not (weights.is_file() and config.is_file()):
        return False
    recorded = merged_digest(merged)
    if recorded is None:
        return config.stat().st_mtime < weights.stat().st_mtime
    return read_digest(run.adapter) not in (recorded, None)


def merged_digest(merged: Path) -> str | None:
    """Return the digest of the adapter that a merged model is of, as `read_digest`; None where no merge recorded it, or
    there is no model.
    """
    recorded = read_record(merged).get(DIGEST)
    return None if recorded is None else str(recorded)


def read_record(merged: Path) -> dict[str, Any]:
    """merge.json of a merged model; empty where there is none that can be read."""
    try:
        return read_mapping(merged / RECORD)
    except UNREADABLE:
        return {}


def is_merged_already(adapter: Path, merged: Path, base: str, dtype: str | None) -> bool:
    """The same merge is there, whole: of this adapter, onto this kind of base, in this type.

    `base`: `original` or `dequantized`. `dtype`: None for the base's own.
    """
    record = read_record(merged)
    stored = {"float32": "F32", "bfloat16": "BF16"}.get(dtype or "")
    same_dtype = record.get("dtypes") == [stored] if stored else record.get("converted") == 0
    if record.get("base") != base or not same_dtype or record.get(DIGEST) is None:
        return False
    return (
        record[DIGEST] == read_digest(adapter)
        and (merged / "config.json").is_file()
        and weights_are_whole(merged)
    )


def weights_are_whole(folder: Path) -> bool:
    """Every weight file is as long as its header says, and all that the index names are there."""
    from safetensors import SafetensorError, safe_open

    files = set(folder.glob("*.safetensors"))
    try:
        for index in folder.glob("*.safetensors.index.json"):
            names = read_mapping(index, TABLE)["weight_map"].values()
            files |= {path_inside(folder, folder / name) for name in names}
        for file in files:
            plain_size(file)
            with safe_open(file, "np"):
                pass
    except (*UNREADABLE, LookupError, TypeError, AttributeError, SafetensorError):
        return False
    return bool(files)


def merge_behind(run: RunDirectory, merged: Path) -> str | None:
    """Say in a line that `merged` is of another adapter than the run's, and what makes it anew; None: it is not."""
    if not is_of_another_adapter(run, merged):
        return None
    base = "" if merged == run.merged else " --base dequantized"
    return (
        f"{merged}: is of another adapter than {run.adapter}; `samestep merge {run.path}{base}` makes it anew "
        "and keeps this one under another name"
    )


def merges_behind(run: RunDirectory) -> list[str]:
    """Say as `merge_behind` does of every merged model in the run's folder."""
    return [line for place in (run.merged, run.merged_dequantized) if (line := merge_behind(run, place))]


@contextlib.contextmanager
def made_anew(run: RunDirectory, merged: Path) -> Iterator[Path | None]:
    """Rename a merged model of another adapter, for the block to write another; back, if it writes none.

    Gives its name meanwhile; None where nothing was in the way.
    """
    if not is_of_another_adapter(run, merged):
        yield None
        return
    old = merged.with_name(f"{merged.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
    try:
        merged.rename(old)
    except FileNotFoundError:  # another merge of the same run was faster
        yield None
        return
    try:
        yield old
    finally:
        if not merged.exists():
            old.rename(merged)
