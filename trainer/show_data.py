"""`python -m trainer.show_data RECIPE`: what a run of the recipe will read, and its first rows as the model sees them.

Prepares the data when it must. Started by `samestep data`.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.atomic_files import place_of
from launch.console import table_console, write_to_nowhere
from launch.errors import RunError, SamestepError
from launch.inputs.dataset_index import Index, Split, splits_of
from launch.recipe.loading import load_recipe
from launch.recipe.schema import Recipe
from launch.untrusted_files import printable, printable_lines
from trainer.data.encoder import Encoder
from trainer.data.rows import Row
from trainer.data.splits import open_split
from trainer.logging_setup import print_error, setup_logging
from trainer.prepare import prepare
from trainer.pretrained import load_processor

BARS, BAR_WIDTH = 10, 40
LONGEST = 5
_TARGET = "bold green"


def show_data(recipe: Recipe, index: Index, count: int, console: Console) -> None:
    """Splits, a histogram of the training split's tokens, its longest rows and its first `count` rows."""
    console.print(_splits_table(recipe, index))
    train = index.splits["train"]
    block = "#" if console.options.ascii_only else "█"
    console.print(_histogram("tokens a sample (train)", train.tokens, block))
    console.print(_histogram("targets a sample (train)", train.target_tokens, block))
    console.print(_longest_table(recipe, train))
    encoder = Encoder(load_processor(recipe), recipe.data.system_message, recipe.data.loss)
    rows = open_split(recipe, "train")
    mark = "green" if console.is_terminal and not console.no_color else "between » and «"
    console.print(
        Text(f"the first rows as the model sees them; the targets of the loss are {mark}", style="bold")
    )
    for sample in range(min(count, len(train))):
        number = int(train.rows[sample])
        heading = f"row {number}: {train.tokens[sample]:,} tokens, {train.target_tokens[sample]:,} targets"
        console.print(Text(heading, style="bold"))
        text = conversation_text(
            encoder, rows[number], train.tokens_of_images(sample), colour=mark == "green"
        )
        console.print(text, soft_wrap=True)


def _splits_table(recipe: Recipe, index: Index) -> Table:
    columns = ("split", "is", "rows", "images", "a row", "mean tokens", "longest", "targets")
    table = Table(title=Text(printable(f"{recipe.data.dataset}")), title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("split", "is") else "right")
    for name, source in splits_of(recipe).items():
        split = index.splits[name]
        images = _images_a_row(split)
        table.add_row(
            *(name, printable(source), f"{len(split):,}", f"{images.sum():,}", _counts(images)),
            *(f"{split.tokens.mean():,.0f}", f"{split.tokens.max():,}", f"{split.target_tokens.sum():,}"),
        )
    return table


def _images_a_row(split: Split) -> NDArray[np.int64]:
    return np.array([len(split.tokens_of_images(sample)) for sample in range(len(split))], dtype=np.int64)


def _counts(images: NDArray[np.int64]) -> str:
    least, most = int(images.min()), int(images.max())
    return f"{least}" if least == most else f"{least} to {most}, mean {images.mean():.1f}"


def _histogram(title: str, values: NDArray[np.int64], block: str) -> RenderableType:
    """Bars of equal steps from the least to the most."""
    low, high = int(values.min()), int(values.max())
    step = max(1, -(-(high - low + 1) // BARS))
    counts = np.bincount((values - low) // step)
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    for place, rows in enumerate(counts.tolist()):
        first, last = low + place * step, low + (place + 1) * step - 1
        bar = block * max(1 if rows else 0, round(BAR_WIDTH * rows / counts.max()))
        span = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        table.add_row(span, Text(bar, style="cyan"), f"{rows:,}")
    return Group(table, "")


def _longest_table(recipe: Recipe, split: Split) -> Table:
    rows = open_split(recipe, "train")
    table = Table(title="longest rows (train)", title_justify="left")
    for column in ("row", "tokens", "of images", "targets", "question"):
        table.add_column(column, justify="left" if column == "question" else "right")
    for sample in np.argsort(-split.tokens, kind="stable")[:LONGEST].tolist():
        number = int(split.rows[sample])
        question = Text(printable(rows[number].query)[:60])
        numbers = (number, split.tokens[sample], split.visual_tokens[sample], split.target_tokens[sample])
        table.add_row(*(f"{value:,}" for value in numbers), question)
    return table


def conversation_text(
    encoder: Encoder, row: Row, visual_tokens: Sequence[int], *, colour: bool = True
) -> Text:
    """The chat as the template writes it, each image as its count of tokens, targets in colour or between » and «.

    The line breaks that end a target are targets too: they are written out.
    """
    conversation = encoder.conversation(row)
    spans = [(0, len(conversation.text))] if encoder.loss == "sequence" else list(conversation.answers)
    counts = iter(visual_tokens)
    text = Text()
    for begin, end, is_target in _pieces(len(conversation.text), spans):
        words = ""
        for place, part in enumerate(conversation.text[begin:end].split(encoder.processor.image_token)):
            words += (f"[image: {next(counts, 0):,} tokens]" if place else "") + part
        words = printable_lines(words)
        if is_target:
            line = words.rstrip("\n")
            breaks = len(words) - len(line)
            line += "\\n" * breaks
            words = (line if colour else f"»{line}«") + "\n" * breaks
        text.append(words, style=_TARGET if is_target else "")
    return text


def _pieces(length: int, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, bool]]:
    done = 0
    for begin, end in spans:
        yield from ((done, begin, False), (begin, end, True))
        done = end
    yield done, length, False


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.show_data", description=__doc__)
    parser.add_argument("recipe", help="a recipe file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value")
    parser.add_argument(
        "--rows", type=int, default=3, help="rows to show as the model sees them (default: 3)"
    )
    options = parser.parse_args(arguments)
    setup_logging()
    try:
        recipe = load_recipe(Path(options.recipe), options.set)
        index = prepare(recipe)
        show_data(recipe, index, options.rows, table_console())
    except SamestepError as error:
        return print_error(error)
    except OSError as error:  # of what is printed: a file to which the shell sends it is on a full disk
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        write_to_nowhere(sys.stdout.fileno())  # the rest of it, which the end of the process would try again
        return print_error(
            RunError(f"{place_of(error, 'standard output')}; make room, or write it elsewhere")
        )
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
