"""What a comparison of merged models found: differences of logits, answers, accuracy; and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import Tensor

from trainer.data.relaxed_accuracy import correct
from trainer.data.rows import Row

UNMERGED, QUANTIZED = "base + adapter", "4-bit base + adapter"


@dataclass(frozen=True)
class LogitDifference:
    """How a merged model's logits differ from another's, over all answer positions and the whole vocabulary.

    `largest`, `mean`: absolute; `logit_range`: largest minus smallest logit of the other model, to read them by;
    `agreement`: share of positions at which both put the same token first.
    """

    largest: float
    mean: float
    logit_range: float
    agreement: float


@dataclass(frozen=True)
class Compared:
    """One merged model against the unmerged one, and against the quantized one when the recipe is quantized."""

    model: str
    folder: str
    unmerged: LogitDifference
    quantized: LogitDifference | None


@dataclass(frozen=True)
class Answered:
    """A model's own answers. `same`: share that equals the reference's; `accuracy`: relaxed, in percent."""

    model: str
    same: float
    accuracy: float
    correct: int


@dataclass(frozen=True)
class MergeComparison:
    """Every merged model beside the unmerged ones. `reference`: the model as it was trained."""

    samples: int
    positions: int
    dtype: str
    reference: str
    merged: tuple[Compared, ...]
    answers: tuple[Answered, ...]


@dataclass(frozen=True)
class Seen:
    """What one model gave: logits at the answers, and its own answers."""

    logits: Tensor
    answers: tuple[str, ...]


def answered(name: str, seen: Seen, reference: Seen, rows: Sequence[Row]) -> Answered:
    """Compare a model's answers with the reference's, and count those that are right."""
    right = sum(correct(answer, row.label[0]) for answer, row in zip(seen.answers, rows, strict=True))
    same = sum(mine == other for mine, other in zip(seen.answers, reference.answers, strict=True))
    return Answered(name, same / len(rows), 100 * right / len(rows), right)


def difference(merged: Tensor, other: Tensor) -> LogitDifference:
    """Compare the logits of two models, both [positions, vocabulary]."""
    gap = (merged - other).abs()
    return LogitDifference(
        largest=float(gap.max()),
        mean=float(gap.mean()),
        logit_range=float(other.max() - other.min()),
        agreement=float((merged.argmax(-1) == other.argmax(-1)).float().mean()),
    )


def print_comparison(comparison: MergeComparison, console: Console) -> None:
    """Print a table of logits and one of answers."""
    title = (
        f"logits ({comparison.dtype}) at {comparison.positions} answer tokens "
        f"of {comparison.samples} validation samples"
    )
    table = Table(title=title, title_justify="left")
    for column in (
        "model",
        "against",
        "largest difference",
        "mean difference",
        "logit range",
        "same first token",
    ):
        table.add_column(column, justify="left" if column in ("model", "against") else "right")
    for each in comparison.merged:
        for name, differences in ((f"{UNMERGED}, unmerged", each.unmerged), (QUANTIZED, each.quantized)):
            if differences is not None:
                table.add_row(
                    each.model,
                    name,
                    f"{differences.largest:.3g}",
                    f"{differences.mean:.3g}",
                    f"{differences.logit_range:.3g}",
                    f"{100 * differences.agreement:.1f} %",
                )
    console.print(table)
    table = Table(title=f"answers to the same {comparison.samples} questions", title_justify="left")
    for column in ("model", f"same as {comparison.reference}", "relaxed accuracy"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for answers in comparison.answers:
        accuracy = f"{answers.accuracy:.1f} % ({answers.correct})"
        table.add_row(answers.model, f"{100 * answers.same:.1f} %", accuracy)
    console.print(table)
