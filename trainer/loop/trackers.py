"""Trackers besides trackio: Weights & Biases, TensorBoard and MLflow, each one run over all attempts of a run.

All of them work without a network, and whatever ails one of them, the training goes on: metrics.jsonl has it all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launch.atomic_files import atomic_write
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from launch.untrusted_files import LINE, UNREADABLE, read_text

logger = logging.getLogger("trainer")


class Backend(Protocol):
    """An open run of a tracker."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Add the figures of a step."""

    def finish(self) -> None:
        """Write what is left, and close."""


Open = Callable[[Recipe, RunDirectory, str, int], Backend]
"""Opens a tracker's run of a name, whose attempt goes on after a step."""


class TrackerCallback(TrainerCallback):
    """Hands every logged figure to several trackers. `name`: of the attempts together, as of `tracking_name`.

    One callback for all: transformers warns of two of a class.
    """

    def __init__(
        self,
        trackers: Sequence[str],
        recipe: Recipe,
        run: RunDirectory,
        name: Callable[[], str],
        resumed_at: int,
    ) -> None:
        self._trackers, self._recipe, self._run, self._name = trackers, recipe, run, name
        self._resumed_at = resumed_at
        self._backends: dict[str, Backend] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for tracker in self._trackers:
            try:
                opened = OPEN[tracker](self._recipe, self._run, self._name(), self._resumed_at)
                self._backends[tracker] = opened
            except Exception as error:  # of a foreign library
                self._give_up(tracker, error)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs:
            self._guarded(lambda backend: backend.log(dict(logs), state.global_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._guarded(lambda backend: backend.finish())

    def _guarded(self, action: Callable[[Backend], None]) -> None:
        for tracker, backend in [*self._backends.items()]:
            try:
                action(backend)
            except Exception as error:  # of a foreign library
                self._give_up(tracker, error)

    def _give_up(self, tracker: str, error: Exception) -> None:
        self._backends.pop(tracker, None)
        reason = str(error).strip().splitlines()[:1]
        logger.warning("%s: not used (%s: %s)", tracker, type(error).__name__, *(reason or [""]))


def open_wandb(recipe: Recipe, run: RunDirectory, name: str, resumed_at: int) -> Backend:
    """Offline without a key, as wandb would ask for one on the terminal; `WANDB_MODE` decides where it is set."""
    import wandb

    class Wandb:
        def __init__(self) -> None:
            known = os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").is_file()
            self._run = wandb.init(
                project=recipe.tracking.project.translate(_NOT_IN_PROJECTS)[:128],
                id=name[:128],
                name=run.name,
                dir=str(run.path),
                config=recipe.model_dump(mode="json"),
                resume="allow",
                mode=None if os.environ.get("WANDB_MODE") or known else "offline",  # type: ignore[arg-type]
                settings=wandb.Settings(console="off", silent=True),
            )

        def log(self, figures: Mapping[str, float], step: int) -> None:
            self._run.log(dict(figures), step=step)

        def finish(self) -> None:
            self._run.finish()

    return Wandb()


_NOT_IN_PROJECTS = str.maketrans(dict.fromkeys("/\\#?%:", "-"))  # wandb 0.31


def open_tensorboard(recipe: Recipe, run: RunDirectory, name: str, resumed_at: int) -> Backend:
    """Event files in `tensorboard/` of the run's folder; what a lost attempt wrote of later steps is purged."""
    from torch.utils.tensorboard import SummaryWriter

    class TensorBoard:
        def __init__(self) -> None:
            purged = resumed_at + 1 if resumed_at else None
            folder = str(run.path / "tensorboard")
            self._writer = SummaryWriter(folder, purge_step=purged)  # type: ignore[no-untyped-call]

        def log(self, figures: Mapping[str, float], step: int) -> None:
            for key, value in figures.items():
                self._writer.add_scalar(key, value, step)  # type: ignore[no-untyped-call]
            self._writer.flush()  # type: ignore[no-untyped-call]

        def finish(self) -> None:
            self._writer.close()  # type: ignore[no-untyped-call]

    return TensorBoard()


def open_mlflow(recipe: Recipe, run: RunDirectory, name: str, resumed_at: int) -> Backend:
    """On the server of `MLFLOW_TRACKING_URI`, else in files in `mlruns/` beside the runs."""
    from mlflow import MlflowClient

    class Mlflow:
        def __init__(self) -> None:
            # MLflow 3.17 refuses its own file store unless it is told so.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            address = os.environ.get("MLFLOW_TRACKING_URI") or (run.path.parent / "mlruns").as_uri()
            self._client = MlflowClient(address)
            self._id = self._known_run() or self._new_run()
            self._client.update_run(self._id, status="RUNNING")

        def _known_run(self) -> str | None:
            """Of an earlier attempt, if the server still has it."""
            try:
                known = read_text(_mlflow_file(run), LINE).strip()
                self._client.get_run(known)
            except (*UNREADABLE, Exception):
                return None
            return known

        def _new_run(self) -> str:
            project = recipe.tracking.project
            existing = self._client.get_experiment_by_name(project)
            experiment = existing.experiment_id if existing else self._client.create_experiment(project)
            made = self._client.create_run(experiment, run_name=name)
            identifier = str(made.info.run_id)
            for section, values in recipe.model_dump(mode="json").items():
                for key, value in values.items() if isinstance(values, dict) else ((section, values),):
                    self._client.log_param(identifier, f"{section}.{key}", str(value)[:500])
            atomic_write(_mlflow_file(run), identifier)
            return identifier

        def log(self, figures: Mapping[str, float], step: int) -> None:
            for key, value in figures.items():
                self._client.log_metric(self._id, key, value, step=step)

        def finish(self) -> None:
            self._client.set_terminated(self._id)

    return Mlflow()


def _mlflow_file(run: RunDirectory) -> Path:
    return run.path / ".mlflow"


OPEN: dict[str, Open] = {"wandb": open_wandb, "tensorboard": open_tensorboard, "mlflow": open_mlflow}
