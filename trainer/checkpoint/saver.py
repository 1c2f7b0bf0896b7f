"""Saving and loading what a run trains: between two steps the state is copied, threads write it beside the training."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
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

from launch.atomic_files import atomic_dir
from launch.checkpoints.manifest import Entries
from launch.checkpoints.publish import partial_folder, publish, sync_and_hash
from launch.checkpoints.rotation import rotate
from launch.planning.plan import samples_consumed
from launch.recipe.schema import altering_values
from trainer import metrics_log
from trainer.checkpoint.background import Publisher
from trainer.checkpoint.best import protected_steps
from trainer.distributed.collectives import gather_objects, lost_contact, run_on_all_ranks
from trainer.distributed.stop_requests import StopRequests, warn_of_slow_save
from trainer.engine.replicated import Replicated
from trainer.engine.zero import Zero
from trainer.formats.detect import SHARDS, read_sharded
from trainer.formats.portable import (
    OPTIMIZER_FILE,
    State,
    load_adapter,
    matching_optimizer_state,
    put_adapter,
    read_optimizer_state,
    save_adapter,
    save_adapter_config,
    save_state,
)
from trainer.formats.sharded import DistributedPart, ZeroPart
from trainer.task import Task

logger = get_logger("trainer")
Form = Literal["portable", "sharded"]
LARGE = 10**9
"""Bytes of weights and moments from which on `checkpoint.format: auto` means sharded."""
PATIENCE = timedelta(hours=1)  # ranks that write to a busy disk wait for the slowest


def form_of(chosen: str, parameters: int) -> Form:
    """The form of a run's checkpoints; `parameters`: how many numbers it trains, each with two moments, in fp32."""
    return "sharded" if chosen == "sharded" or (chosen == "auto" and 12 * parameters >= LARGE) else "portable"


@dataclass(frozen=True)
class _Save:
    """What is written beside the state. `waited`: seconds that the training stood still for the copy."""

    task: Task
    step: int
    facts: dict[str, Any]
    trainer_state: str
    waited: float


class Saver:
    """Writes the checkpoints of one attempt. Portable ones: rank 0 alone; sharded ones: every rank its part."""

    def __init__(self, chosen: str, model: PeftModel, engine: Replicated | Zero, watch: StopRequests) -> None:
        self._model, self._engine = model, engine
        self._group: dist.ProcessGroup | None = None  # of the threads; gloo, whatever the training uses
        self._is_first = not dist.is_initialized() or dist.get_rank() == 0
        self.publisher = Publisher(watch.fail)
        count = sum(parameter.numel() for parameter in engine.parameters.values())
        self.form = form_of(chosen, count)

    def save(self, task: Task, state: TrainerState, learning_rate: float, asked: bool) -> None:
        """Copy the state and go on; threads write and publish it. A collective.

        `asked`: by the file SAVE, which is answered herewith.
        """
        began = time.perf_counter()
        self.publisher.wait()
        step = state.global_step
        part = self._part(step) if self.form == "sharded" else self._engine.state()
        if part is None:
            return
        if asked and self._is_first:
            with suppress(OSError):
                task.run.save_file.unlink()
        facts = facts_of(task, step, learning_rate, self.form)
        trainer_state = json.dumps(asdict(state), indent=2, sort_keys=True) + "\n"
        save = _Save(task, step, facts, trainer_state, time.perf_counter() - began)
        self.publisher.start(lambda: self._write(save, part))

    def _part(self, step: int) -> DistributedPart | ZeroPart:
        if dist.is_initialized() and self._group is None:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
        return self._engine.part(step)

    def _write(self, save: _Save, part: State | DistributedPart | ZeroPart) -> None:
        """In the thread of each rank that has something to write."""
        began = time.perf_counter()
        aside = partial_folder(save.task.run.path, save.step)
        try:
            if isinstance(part, State):
                _make_anew(aside)
                save_state(self._model, part, aside)
                self._publish(save, aside, {})
            else:
                self._write_part(save, part, aside)
        except BaseException as error:
            if (
                isinstance(error, OSError) and error.filename is None
            ):  # a write that finds no room says not where
                error.filename = str(aside)
            if self._is_first:
                shutil.rmtree(aside, ignore_errors=True)  # a full disk needs the room
            lost = lost_contact(error) if isinstance(error, RuntimeError) else None
            raise lost or error from None
        if self._is_first:
            keep = save.task.recipe.checkpoint.keep
            rotate(save.task.run.path, keep, newest=save.step, protected=protected_steps(save.task))
            self._say(save, time.perf_counter() - began)

    def _write_part(self, save: _Save, part: DistributedPart | ZeroPart, aside: Path) -> None:
        """All ranks together, or none: rank 0 makes the folder, each fills in its files, rank 0 publishes them."""

        def begin() -> None:
            if self._is_first:
                _make_anew(aside)
                (aside / SHARDS).mkdir()

        def write() -> Entries:
            names = part.write(aside / SHARDS, self._group)
            return sync_and_hash(aside, [f"{SHARDS}/{name}" for name in names])

        def finish() -> None:
            if self._is_first:
                save_adapter_config(self._model, aside)
                self._publish(save, aside, known)

        run_on_all_ranks(begin, self._group)
        written = run_on_all_ranks(write, self._group)
        known = {
            name: entry for entries in gather_objects(written, self._group) for name, entry in entries.items()
        }
        run_on_all_ranks(finish, self._group)

    def _publish(self, save: _Save, aside: Path, known: Entries) -> None:
        run = save.task.run
        (aside / TRAINER_STATE_NAME).write_text(save.trainer_state)
        metrics_log.sync_to_disk(run.metrics_file)
        metrics_log.sync_to_disk(run.evaluations_file)
        # What stands there was passed over when this attempt began: damaged, or out of reach for a moment.
        publish(aside, run.checkpoint(save.step), save.facts, replace=True, known=known)

    def _say(self, save: _Save, took: float) -> None:
        name = f"checkpoint-{save.step}"
        logger.info(f"{name}: published in {took:.2f} s, for which the training waited {save.waited:.3f} s")
        if slow := warn_of_slow_save(took):
            logger.warning(f"{name}: {slow}")


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def facts_of(task: Task, step: int, learning_rate: float, form: Form) -> dict[str, Any]:
    """What a resuming run, or a reader years later, wants to know of a checkpoint."""
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


def publish_adapter(
    model: PeftModel, folder: Path, weights: dict[str, Tensor] | None, beside: Callable[[Path], object]
) -> None:
    """Write the result of a run, replacing an older one whole. On rank 0.

    `weights`: as of `save_adapter`. `beside`: writes into a folder what belongs beside the adapter.
    """
    with atomic_dir(folder) as aside:
        save_adapter(model, aside, weights)
        beside(aside)
        if folder.exists():
            shutil.rmtree(folder)


def load_checkpoint(
    model: PeftModel, shapes: Mapping[str, torch.Size], checkpoint: Path
) -> dict[str, Tensor] | None:
    """Put the adapter of a verified checkpoint, of either form, into a model that nothing has wrapped.

    Returns the moments and step counts by name; None of a form that has none. Every rank reads all of it, the
    parts of other ranks too, whatever wrote it: one way for every strategy and world size.

    Raises:
        CheckpointError: it does not fit the model, or cannot be read.
    """
    found = read_sharded(checkpoint)
    if found is not None:
        put_adapter(model, found.tensors, checkpoint / SHARDS)
        return matching_optimizer_state(found.moments, shapes, checkpoint / SHARDS)
    load_adapter(model, checkpoint)
    has_moments = (checkpoint / OPTIMIZER_FILE).exists()  # else taken over from a form without them
    return read_optimizer_state(shapes, checkpoint) if has_moments else None
