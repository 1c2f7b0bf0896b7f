"""What a comparison of merged models is asked for: an adapter, its base, and the folders of merged models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from rich.console import Console

from launch.errors import CheckpointError, ConfigError
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from launch.run.merge_options import BaseKind, DtypeChoice
from launch.run.merged_model import RECORD
from launch.untrusted_files import TABLE, UNREADABLE, printable, read_mapping
from trainer.export.adapter import Adapter, AdapterOverrides
from trainer.export.base_model import run_containing
from trainer.export.merge import merge, print_report
from trainer.export.merge_plan import MergeRequest
from trainer.formats.validated import read_json_object


@dataclass(frozen=True)
class ComparisonRequest:
    """What is compared: an adapter and its base, the merged models, on which recipe's data.

    `both_bases`: make the merge onto the other base too (original or dequantized), compare it, and remove it.
    """

    source: Path
    adapter: Adapter
    base: Path
    merged: tuple[Path, ...]
    recipe: Recipe
    samples: int
    recipe_file: Path
    missing: AdapterOverrides
    both_bases: bool = False
    allow: tuple[str, ...] = ()


@contextmanager
def merged_folders(request: ComparisonRequest) -> Iterator[dict[str, Path]]:
    """The merged models by a name that says their base; with `both_bases` the other one is made meanwhile."""
    folders = {f"merged, {base_kind_of(folder)}": folder for folder in request.merged}
    if len(folders) < len(request.merged):
        raise CheckpointError(
            f"--merged: {len(request.merged)} folders of the same kind of base; give one of each kind"
        )
    if not request.both_bases or not request.recipe.quantization.load_in_4bit:
        yield folders
        return
    first = request.merged[0]
    other: BaseKind = "original" if base_kind_of(first) == "dequantized" else "dequantized"
    dtype = cast(DtypeChoice, str(stored_dtype(first)).removeprefix("torch."))
    with _room_beside(first) as room:
        twin = Path(room, first.name)
        print_report(
            merge(
                MergeRequest(
                    request.source, twin, other, dtype, request.recipe_file, request.missing, request.allow
                )
            ),
            Console(highlight=False, soft_wrap=True),
        )
        yield {**folders, f"merged, {other}": twin}


def _room_beside(folder: Path) -> TemporaryDirectory[str]:
    """A folder of our own on the same disk, which no other attempt and no user has made."""
    try:
        return TemporaryDirectory(prefix=f"{folder.name}.other-base-", dir=folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"{folder.parent}: cannot be written to ({error.strerror}); the merge onto the other base needs a place "
            "there, compare without it"
        ) from error


def base_kind_of(folder: Path) -> str:
    """Return `original` or `dequantized`, as the merge recorded it; the folder's name where nothing is recorded."""
    try:
        return printable(str(read_mapping(folder / RECORD, TABLE)["base"]))
    except (*UNREADABLE, KeyError):
        return folder.name


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype that config.json of a merged model names."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"--merged: no config.json in {folder}; give the folder of a merged model")
    config = read_json_object(folder / "config.json")
    name = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    return cast(torch.dtype, getattr(torch, name or "float32"))


def recipe_file_of(source: Path, run_dir: Path | None) -> Path:
    """Return the recipe of the run that `source` is or lies in, or of `run_dir`."""
    run = RunDirectory(run_dir) if run_dir else run_containing(source)
    if run is not None and run.recipe_file.is_file():
        return run.recipe_file
    raise ConfigError(
        f"{run_dir or source}: no recipe.yaml, which names the data to compare on; "
        "give the run's directory with --run-dir"
    )
