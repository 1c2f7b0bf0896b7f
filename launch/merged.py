"""Whether a merged model is of the adapter that its run has now: a run that goes on writes another adapter."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

from launch.run_directory import RunDirectory

RECORD, DIGEST = "merge.json", "adapter_sha256"
_WEIGHTS = "adapter_model.safetensors"


def digest_of(tensors: Mapping[str, bytes | memoryview]) -> str:
    """Of an adapter's tensors by name; not of its file, for a checkpoint of another form holds the same ones."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {len(tensors[name])}\n".encode())
        digest.update(tensors[name])
    return digest.hexdigest()


def read_digest(adapter: Path) -> str | None:
    """Of the adapter in a folder, without torch; None where none can be read."""
    try:
        content = memoryview((adapter / _WEIGHTS).read_bytes())
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(bytes(content[8:begin]))
        header.pop("__metadata__", None)
        places = {name: entry["data_offsets"] for name, entry in header.items()}
        return digest_of(
            {name: content[begin + first : begin + last] for name, (first, last) in places.items()}
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def is_of_an_earlier_adapter(run: RunDirectory, merged: Path) -> bool:
    """The merged model in the folder `merged` is not of the run's adapter.

    A merge that recorded no adapter (an older samestep's, or another tool's) is judged by age.
    """
    weights, config = run.adapter / _WEIGHTS, merged / "config.json"
    if not (weights.is_file() and config.is_file()):
        return False
    try:
        recorded = json.loads((merged / RECORD).read_text(encoding="utf-8")).get(DIGEST)
    except (OSError, ValueError, AttributeError):
        recorded = None
    if recorded is not None:
        return bool(recorded != read_digest(run.adapter))
    return config.stat().st_mtime < weights.stat().st_mtime


def merge_behind(run: RunDirectory, merged: Path) -> str | None:
    """In a line, that `merged` is of another adapter than the run's, and what makes it anew; None: it is not."""
    if not is_of_an_earlier_adapter(run, merged):
        return None
    base = "" if merged == run.merged else " --base dequantized"
    return (
        f"{merged}: is of an earlier adapter than {run.adapter}; `samestep merge {run.path}{base}` makes it anew "
        "and keeps this one under another name"
    )


def merges_behind(run: RunDirectory) -> list[str]:
    """As `merge_behind`, of every merged model in the run's folder."""
    return [line for place in (run.merged, run.merged_dequantized) if (line := merge_behind(run, place))]


@contextlib.contextmanager
def made_anew(run: RunDirectory, merged: Path) -> Iterator[Path | None]:
    """Rename a merged model of an earlier adapter, for the block to write another; back, if it writes none.

    Gives its name meanwhile; None where nothing was in the way.
    """
    if not is_of_an_earlier_adapter(run, merged):
        yield None
        return
    old = merged.with_name(f"{merged.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
    merged.rename(old)
    try:
        yield old
    finally:
        if not merged.exists():
            old.rename(merged)
