"""Saving and loading checkpoints: between two steps the state is copied, and a thread writes it while training goes on.

A save is decided in `trainer.loop.callbacks`; this file collects the state, writes, publishes and rotates.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from accelerate.logging import get_logger
from peft import PeftModel
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from launch.checkpoints.manifest import OPTIMIZER_FILE, SHARDS, Entries
from launch.checkpoints.publish import partial_folder, publish, sync_and_hash
from launch.checkpoints.rotation import rotate_checkpoints
from launch.planning.plan import samples_consumed
from launch.recipe.fingerprint import altering_values
from trainer import metrics_log
from trainer.checkpoint.best import protected_steps
from trainer.distributed.collectives import gather_objects, lost_contact, run_on_all_ranks
from trainer.distributed.stop_requests import StopRequests, warn_of_slow_save
from trainer.engine.replicated import Replicated
from trainer.engine.zero import Zero
from trainer.formats.detect import read_sharded
from trainer.formats.portable import (
    TrainedState,
    load_adapter,
    matching_optimizer_state,
    read_optimizer_state,
    save_adapter_config,
    save_state,
    set_adapter,
)
from trainer.formats.sharded import DcpRankState, ZeroRankState
from trainer.task import Task

logger = get_logger("trainer")
Form = Literal["portable", "sharded"]
SHARDED_FROM_BYTES = 10**9
"""Bytes of weights and optimizer state from which on `checkpoint.format: auto` means sharded."""
SAVE_TIMEOUT = timedelta(hours=1)  # ranks that write to a busy disk wait for the slowest


def checkpoint_form(format_wanted: str, parameters: int) -> Form:
    """Return the form of a run's checkpoints; each of its `parameters` is saved with two AdamW moments, in fp32."""
    large = 12 * parameters >= SHARDED_FROM_BYTES
    return "sharded" if format_wanted == "sharded" or (format_wanted == "auto" and large) else "portable"


@dataclass(frozen=True)
class _Save:
    """What is written beside the state. `waited`: seconds that the training stood still for the copy."""

    task: Task
    step: int
    metadata: dict[str, Any]
    trainer_state: str
    waited: float


class Saver:
    """Writes the checkpoints of one attempt, one at a time, in a thread: a slow disk does not stop the steps.

    Portable ones are written by rank 0 alone, sharded ones by every rank in part. What goes wrong in the thread becomes
    a request of this rank to fail, which the next step's all-reduce tells the others.
    """

    def __init__(
        self, format_wanted: str, model: PeftModel, engine: Replicated | Zero, stop_requests: StopRequests
    ) -> None:
        self._model, self._engine, self._stop_requests = model, engine, stop_requests
        self._group: dist.ProcessGroup | None = None  # of the threads; gloo, whatever the training uses
        self._is_main = not dist.is_initialized() or dist.get_rank() == 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        count = sum(parameter.numel() for parameter in engine.parameters.values())
        self.form = checkpoint_form(format_wanted, count)

    # A save in its order: copy the state, then in the thread write, publish and rotate.

    def save(self, task: Task, state: TrainerState, learning_rate: float, requested: bool) -> None:
        """Copy the state and go on; a thread writes and publishes it. A collective.

        `requested`: by the file SAVE, which is removed herewith.
        """
        began = time.perf_counter()
        self.wait()
        step = state.global_step
        trained = self._rank_state(step) if self.form == "sharded" else self._engine.full_state()
        if trained is None:
            return
        if requested and self._is_main:
            with suppress(OSError):
                task.run.save_file.unlink()
        metadata = checkpoint_metadata(task, step, learning_rate, self.form)
        trainer_state = json.dumps(asdict(state), indent=2, sort_keys=True) + "\n"
        save = _Save(task, step, metadata, trainer_state, time.perf_counter() - began)
        self._pending = self._pool.submit(self._write_or_fail, save, trained)

    def wait(self) -> None:
        """Wait until nothing is being written: before the next save, before processes are forked, at the end."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _rank_state(self, step: int) -> DcpRankState | ZeroRankState:
        if dist.is_initialized() and self._group is None:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT))
        return self._engine.rank_state(step)

    def _write_or_fail(self, save: _Save, trained: TrainedState | DcpRankState | ZeroRankState) -> None:
        try:
            self._write(save, trained)
        except Exception as error:
            self._stop_requests.fail(error)

    def _write(self, save: _Save, trained: TrainedState | DcpRankState | ZeroRankState) -> None:
        """Write, publish and rotate; in the thread of each rank that has something to write."""
        began = time.perf_counter()
        partial = partial_folder(save.task.run.path, save.step)
        try:
            if isinstance(trained, TrainedState):
                _make_empty(partial)
                save_state(self._model, trained, partial)
                self._publish(save, partial, {})
            else:
                self._write_shards(save, trained, partial)
        except BaseException as error:
            # A write that finds no room does not say where.
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(partial)
            if self._is_main:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
            lost = lost_contact(error) if isinstance(error, RuntimeError) else None
            raise lost or error from None
        if self._is_main:
            keep = save.task.recipe.checkpoint.keep
            rotate_checkpoints(
                save.task.run.path, keep, newest=save.step, protected=protected_steps(save.task)
            )
            self._log(save, time.perf_counter() - began)

    def _write_shards(self, save: _Save, trained: DcpRankState | ZeroRankState, partial: Path) -> None:
        """All ranks together, or none: rank 0 makes the folder, each writes its files, rank 0 publishes them."""

        def begin() -> None:
            if self._is_main:
                _make_empty(partial)
                (partial / SHARDS).mkdir()

        def write() -> Entries:
            names = trained.write(partial / SHARDS, self._group)
            return sync_and_hash(partial, [f"{SHARDS}/{name}" for name in names])

        def finish() -> None:
            if self._is_main:
                save_adapter_config(self._model, partial)
                self._publish(save, partial, hashed)

        run_on_all_ranks(begin, self._group)
        written = run_on_all_ranks(write, self._group)
        hashed = {
            name: entry for entries in gather_objects(written, self._group) for name, entry in entries.items()
        }
        run_on_all_ranks(finish, self._group)

    def _publish(self, save: _Save, partial: Path, hashed: Entries) -> None:
        run = save.task.run
        (partial / TRAINER_STATE_NAME).write_text(save.trainer_state)
        # Before the checkpoint counts: a power cut must not take the metrics of its steps.
        metrics_log.sync_to_disk(run.metrics_file)
        metrics_log.sync_to_disk(run.evaluations_file)
        # What stands there was passed over when this attempt began: damaged, or out of reach for a moment.
        publish(partial, run.checkpoint(save.step), save.metadata, replace=True, known=hashed)

    def _log(self, save: _Save, seconds: float) -> None:
        name = f"checkpoint-{save.step}"
        logger.info(
            f"{name}: published in {seconds:.2f} s, for which the training waited {save.waited:.3f} s"
        )
        if slow := warn_of_slow_save(seconds):
            logger.warning(f"{name}: {slow}")


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def checkpoint_metadata(task: Task, step: int, learning_rate: float, form: Form) -> dict[str, Any]:
    """Return what a resuming run, or a reader years later, wants to know of a checkpoint."""
    plan, recipe = task.plan, task.recipe
    return {
        "step": step,
        "samples_consumed": samples_consumed(plan, step),
        "epoch": samples_consumed(plan, step) / plan.samples_per_epoch,
        "form": form,
        "strategy": plan.strategy,
        "world_size": plan.world_size,
        "global_batch_size": plan.global_batch_size,
        "begin": asdict(plan.begin),
        "learning_rate": learning_rate,
        "recipe": altering_values(recipe),
        "recipe_fingerprint": plan.recipe_fingerprint,
        "dataset_fingerprint": plan.dataset_fingerprint,
        "identity": plan.identity,
        "quantization": recipe.quantization.model_dump() | {"quant_storage": plan.quant_storage},
        "started_from": plan.started_from,
        "versions": plan.versions,
    }


def load_checkpoint(
    model: PeftModel, shapes: Mapping[str, torch.Size], checkpoint: Path
) -> dict[str, Tensor] | None:
    """Put the adapter of a verified checkpoint, of either form, into a model that nothing has wrapped.

    Returns the optimizer state by name; None of a form that has none. Every rank reads all of it, the
    parts of other ranks too, whatever wrote it: one way for every strategy and world size.

    Raises:
        CheckpointError: it does not fit the model, or cannot be read.
    """
    sharded = read_sharded(checkpoint)
    if sharded is not None:
        set_adapter(model, sharded.tensors, checkpoint / SHARDS)
        return matching_optimizer_state(sharded.optimizer_state, shapes, checkpoint / SHARDS)
    load_adapter(model, checkpoint)
    has_optimizer = (checkpoint / OPTIMIZER_FILE).exists()  # an imported checkpoint may have none
    return read_optimizer_state(shapes, checkpoint) if has_optimizer else None
