"""The samples of one step with their own losses; and the steps from there on, with some of the samples left out.

    python -m trainer.audit.blame --run-dir COPY --step 120 --last 120 --output FILE [--without 17,40]

Started by `samestep blame` in a copy of a run, in one process.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from launch.atomic_files import atomic_write
from launch.option_values import add_option, place
from trainer.audit.restore import ended_by, open_task, packed, train_through
from trainer.data.splits import open_split
from trainer.distributed.collectives import end_process
from trainer.loop.trainer import PlannedTrainer
from trainer.task import LeftOut

LONGEST = 500  # characters of a question or an answer that are kept


@torch.no_grad()
def sample_losses(trainer: PlannedTrainer, step: int) -> list[dict[str, Any]]:
    """The samples of `step` (counted from 1), each with its loss at the weights that the trainer has now.

    `share`: what the sample adds to the step's loss; the shares add up to it. `loss`: per target token of its own.
    Each is computed alone, in training mode, with the dropout masks that it has in the step.
    """
    split, rows = trainer.index.splits["train"], open_split(trainer.recipe, "train")
    samples = trainer.step_plan.samples(step - 1).tolist()
    step_tokens = int(split.target_tokens[samples].sum())
    losses = []
    for sample in samples:
        share = float(trainer.micro_batch_loss(trainer.model_wrapped, packed(trainer, [sample], step)))
        number, own_tokens = int(split.rows[sample]), int(split.target_tokens[sample])
        row = rows[number]
        losses.append(
            {
                "row": number,
                "loss": share * step_tokens / own_tokens if own_tokens else 0.0,
                "share": share,
                "target_tokens": own_tokens,
                "tokens": int(split.tokens[sample]),
                "question": row.query[:LONGEST],
                "target": (row.label[0] if row.label else "")[:LONGEST],
            }
        )
    return losses


def blame(folder: Path, step: int, last: int, without: Sequence[int], output: Path) -> None:
    """Write the losses of the step's samples as JSON, and train on to `last` without the rows `without`."""
    task = open_task(folder, LeftOut())
    positions = {int(row): sample for sample, row in enumerate(task.index.splits["train"].rows)}
    left_out = LeftOut(frozenset(positions[row] for row in without), step - 1)
    task = open_task(folder, left_out)
    losses: list[dict[str, Any]] = []
    train_through(task, step, last, lambda trainer: losses.extend(sample_losses(trainer, step)))
    atomic_write(output, json.dumps(losses))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.audit.blame", description=__doc__)
    for name in ("--run-dir", "--output"):
        add_option(parser, name, place, required=True)
    for name in ("--step", "--last"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--without", default="", help="rows of the training split, separated by commas")
    given = parser.parse_args(arguments)
    rows = [int(row) for row in given.without.split(",") if row]
    return ended_by(lambda: blame(given.run_dir, given.step, given.last, rows, given.output))


if __name__ == "__main__":
    end_process(main())
