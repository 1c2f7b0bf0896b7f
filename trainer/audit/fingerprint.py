"""Fingerprints of everything that one micro-batch computes in a step of a run, module by module.

    python -m trainer.audit.fingerprint --run-dir COPY --step 6 --rows DIGEST,DIGEST --output FILE

Started by `samestep diff --deep` for each of two runs, in one process: on a CPU through plain PyTorch, on a GPU through
the kernels that training takes there. A fused kernel computes several modules in one: then the module around them is
the first that can be named.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from launch.atomic_files import atomic_write
from launch.errors import ConfigError
from launch.option_values import add_option, place
from trainer.audit.restore import ended_by, open_task, packed, train_through
from trainer.checks.fingerprint import fingerprint
from trainer.distributed.collectives import end_process
from trainer.loop.trainer import PlannedTrainer
from trainer.task import LeftOut


class Recorder:
    """Hooks on every module of a model: the first output of each, and the gradient that arrives there."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[str, list[float]] = {}
        self.gradients: dict[str, list[float]] = {}
        self._handles = [
            module.register_forward_hook(self._hook_of(name))
            for name, module in model.named_modules()
            if name
        ]

    def _hook_of(self, name: str) -> Any:
        def record(_: nn.Module, __: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is None or name in self.outputs:  # again in a recomputation
                return
            self.outputs[name] = fingerprint(tensor)
            if tensor.requires_grad:
                tensor.register_hook(keep_gradient)

        def keep_gradient(gradient: Tensor) -> None:  # what a hook returns would replace the gradient
            self.gradients.setdefault(name, fingerprint(gradient))

        return record

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor | None:
    """The first floating-point tensor of what a module returns."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = (
        output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    )
    return next((tensor for value in values if (tensor := first_tensor(value)) is not None), None)


def fingerprints(trainer: PlannedTrainer, samples: Sequence[int], step: int) -> dict[str, Any]:
    """Of the adapters' weights, of every module's output in order of computation, and of gradients in theirs."""
    model = trainer.model
    weights = {name: fingerprint(parameter) for name, parameter in trainer.parameters.items()}
    batch = packed(trainer, samples, step)
    recorder = Recorder(model)
    try:
        loss = trainer.micro_batch_loss(model, batch)
        loss.backward()
    finally:
        recorder.remove()
    for name, parameter in trainer.parameters.items():
        if parameter.grad is not None:
            recorder.gradients[f"{name} (its own)"] = fingerprint(parameter.grad)
        parameter.grad = None
    return {
        "loss": float(loss.detach()),
        "weights": weights,
        "outputs": recorder.outputs,
        "gradients": recorder.gradients,
    }


def fingerprint_step(folder: Path, step: int, rows: Sequence[str], output: Path) -> None:
    """Write the fingerprints of the rows' micro-batch in `step`, as JSON. Takes the step, too."""
    task = open_task(folder, LeftOut())
    positions = {digest.hex(): sample for sample, digest in enumerate(task.index.splits["train"].digests)}
    if missing := [row for row in rows if row not in positions]:
        raise ConfigError(
            f"{task.recipe.data.dataset}: has no row {missing[0][:12]} of the other run's step; "
            "the runs can be compared on rows that both have"
        )
    seen: dict[str, Any] = {}

    def look(trainer: PlannedTrainer) -> None:
        seen.update(fingerprints(trainer, [positions[row] for row in rows], step))

    train_through(task, step, step, look)
    atomic_write(output, json.dumps(seen))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.audit.fingerprint", description=__doc__)
    for name in ("--run-dir", "--output"):
        add_option(parser, name, place, required=True)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--rows", required=True, help="digests of rows, separated by commas")
    given = parser.parse_args(arguments)
    rows = given.rows.split(",")
    return ended_by(lambda: fingerprint_step(given.run_dir, given.step, rows, given.output))


if __name__ == "__main__":
    end_process(main())
