"""`python -m trainer.prepare RECIPE`: everything that needs a CPU and a network, once, before a GPU is asked for.

Builds the embedded charts and tiny base where the recipe uses them, fetches the base weights at the recipe's
revision into the shared cache, validates every row and writes the index (token counts, dataset fingerprint).
Several processes may start it at once: the first does the work, the others wait and find it done.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from launch.atomic_files import atomic_write
from launch.errors import ConfigError, SamestepError
from launch.hub_names import EMBEDDED
from launch.inputs.caches import cache_root, embedded_folder
from launch.inputs.data_report import notes_of, summarize_notes, write_data_report
from launch.inputs.dataset_index import (
    SPLITS,
    Index,
    SplitName,
    index_damage,
    read_index,
    splits_of,
)
from launch.inputs.identity import model_identity
from launch.recipe.loading import load_recipe
from launch.recipe.schema import Recipe
from launch.recipe.split_names import parse_split
from trainer.data.encoder import Encoder
from trainer.data.index_writer import bad_rows_file, bad_rows_message, json_lines, publish_index
from trainer.data.lengths import BadRow, Measured, check_against_processor, measure_split
from trainer.data.row_errors import RowError
from trainer.data.splits import open_split, sources
from trainer.logging_setup import print_error, setup_logging
from trainer.prepare_vision import fill, find_missing
from trainer.pretrained import fetch_base, load_processor
from trainer.progress_bars import BeginProgress, progress_reports

logger = logging.getLogger("trainer")


def prepare(recipe: Recipe, *, quiet: bool = False) -> Index:
    """Bring the recipe's base model and index into the cache, doing only what is missing.

    Raises:
        ConfigError: bad rows (all of them named, unless `data.on_bad_row: drop`), no network and nothing cached,
            no room or no permission to write the cache.
    """
    with _locked(cache_root() / "prepare.lock"), progress_reports(quiet=quiet) as begin:
        with _writing_the_cache():
            _build_embedded(recipe, begin)
        base = Path(fetch_base(recipe))
        model_identity(base)  # remembered: all weights are read here, not before each start
        if damage := index_damage(recipe):
            logger.warning("%s; it is made anew", damage)
        index = read_index(recipe)
        if index is not None and not _has_changed(recipe, index):
            return index
        return _write_index(recipe, begin)


def _has_changed(recipe: Recipe, index: Index) -> bool:
    """Whether image files that the rows name are others than when the index was made: its key knows the tables alone.

    Each start of a run trusts the index, and every sample is held against it when it is read.
    """
    for split in splits_of(recipe):
        rows, of_index = open_split(recipe, split), index.splits[split]
        if not rows.names_files:
            continue
        for number, digest in zip(of_index.rows.tolist(), of_index.digests, strict=True):
            try:
                same = rows[number].digest == digest
            except RowError:
                same = False
            if not same:
                logger.warning(
                    "%s row %s: changed since it was prepared; all are looked at anew", split, number
                )
                return True
    return False


@contextmanager
def _writing_the_cache() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"SAMESTEP_CACHE: {cache_root()} cannot be written ({error.strerror or error}); "
            "free some space or set SAMESTEP_CACHE to another folder"
        ) from error


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system releases it when the process ends, however it ends."""
    with _writing_the_cache():
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("a")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares ({file})", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)  # a signal ends it, and the watchdog when nobody waits for us
    with handle:
        yield


def _build_embedded(recipe: Recipe, begin: BeginProgress) -> None:
    """Draw the charts and train the tiny base on first use. Imported here: only embedded recipes need matplotlib."""
    if EMBEDDED not in (recipe.model.name_or_path, recipe.data.dataset):
        return
    from trainer.embedded.pretrain import build_tiny
    from trainer.embedded.questions import build_charts

    charts, model = embedded_folder() / "data", embedded_folder() / "model"
    if not charts.is_dir():
        build_charts(charts, progress=begin("drawing the embedded charts"))
    if recipe.model.name_or_path == EMBEDDED and not model.is_dir():
        build_tiny(model, charts, progress=begin("training the tiny base model"))


def _write_index(recipe: Recipe, begin: BeginProgress) -> Index:
    encoder = Encoder(load_processor(recipe), recipe.data.system_message, recipe.data.loss)
    _check_system_message(encoder)
    measured: dict[SplitName, list[Measured]] = {split: [] for split in SPLITS}
    bad: list[BadRow] = []
    opened = [(split, open_split(recipe, split)) for split in splits_of(recipe)]
    for split, rows in opened:
        report = begin(f"checking {splits_of(recipe)[split]}")
        usable, refused = measure_split(rows, split, encoder, report)
        refused += check_against_processor(rows, usable, encoder, split)
        bad += sorted(refused, key=lambda row: row.row)
        numbers = {row.row for row in refused}
        measured[split] = [row for row in usable if row.row not in numbers]
    list_file = bad_rows_file(recipe)
    with _writing_the_cache():
        if bad and recipe.data.on_bad_row == "error":
            list_file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(list_file, json_lines(bad))
            raise ConfigError(bad_rows_message(bad, list_file))
        list_file.unlink(missing_ok=True)
    if empty := [split for split in splits_of(recipe) if not measured[split]]:
        raise ConfigError(
            f"data: no usable row in {', '.join(empty)}; check data.dataset and the split names"
        )
    for line in (*sources(opened), *_shared_rows(recipe, measured)):
        logger.info(line)
    with _writing_the_cache():
        return publish_index(recipe, measured, bad)


def _shared_rows(recipe: Recipe, measured: Mapping[SplitName, Sequence[Measured]]) -> Iterator[str]:
    """A line for every split that holds rows of the training split, or others of the same content."""
    splits = splits_of(recipe)
    train = parse_split(splits["train"]).name
    trained = {row.digest for row in measured["train"]}
    numbers = {row.row for row in measured["train"]}
    for split, rows in measured.items():
        shared = [row for row in rows if row.digest in trained]
        if not shared or split == "train":
            continue
        same_rows = parse_split(splits[split]).name == train and any(row.row in numbers for row in shared)
        advice = (
            f"write data.train: {train}[:90%] and data.{split}: {train}[90%:], say"
            if same_rows
            else "rows with the same images and texts stand in both; take them out of one"
        )
        yield f"data.{split}: {len(shared):,} of its {len(rows):,} rows are trained on too; {advice}"


def _check_system_message(encoder: Encoder) -> None:
    """It is in every row: a special token in it spoils them all."""
    if match := encoder.control_tokens.search(encoder.system_message or ""):
        raise ConfigError(
            f"data.system_message: holds the special token {match[0]}, which the model does not read as text; "
            "take it out"
        )


def prepare_vision(recipe: Recipe, index: Index, *, quiet: bool = False) -> None:
    """Compute the features of every image that a run will want, and keep them on disk.

    Raises:
        ConfigError: the recipe keeps them in memory, or they find no room.
    """
    if recipe.data.vision_cache == "memory":
        raise ConfigError(
            "--vision: the recipe keeps features in memory, where they end with a run (data.vision_cache); give --set "
            "data.vision_cache=disk"
        )
    with progress_reports(quiet=quiet) as begin:
        filling = find_missing(recipe, index, begin("looking at the images"))
    print("\n".join(filling.notes), flush=True)
    if filling.missing:
        with progress_reports(quiet=quiet) as begin:
            fill(filling, begin("computing vision features"))
    advice = (
        "; a run uses them with --set data.vision_cache=disk" if recipe.data.vision_cache == "off" else ""
    )
    print(f"vision features of {filling.images} images are in {filling.cache.folder}{advice}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a recipe file, e.g. recipes/embedded.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument(
        "--vision",
        action="store_true",
        help="fill the cache of vision features too (data.vision_cache: disk)",
    )
    options = parser.parse_args(arguments)
    setup_logging()
    try:
        recipe = load_recipe(Path(options.recipe), options.set)
        index = prepare(recipe, quiet=options.quiet)
        _say_prepared(recipe, index)
        if options.vision:
            prepare_vision(recipe, index, quiet=options.quiet)
    except SamestepError as error:
        return print_error(error)
    except KeyboardInterrupt:  # what is there stays; started again, it goes on
        return 130
    return 0


def _say_prepared(recipe: Recipe, index: Index) -> None:
    counts = ", ".join(f"{len(index.splits[split])} {split}" for split in splits_of(recipe))
    train = index.splits["train"]
    prefixes = train.tokens - train.own_tokens
    shared, count = int(prefixes.max()), int((prefixes > 0).sum())
    rows = f" in {count:,} of {len(train):,} rows" if count < len(train) else ""
    prefix = f", the first {shared} computed once for a micro-batch{rows}" if shared else ""
    print(
        f"prepared {recipe.data.dataset}: {counts} samples; train has {train.tokens.mean():.0f} tokens a sample "
        f"(longest {train.tokens.max()}{prefix}); fingerprint {index.fingerprint[:12]}"
    )
    if notes := notes_of(recipe, index.path):
        with _writing_the_cache():
            report = write_data_report(notes, index.path)
        print(*summarize_notes(notes), f"each of these rows is named in {report}", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
