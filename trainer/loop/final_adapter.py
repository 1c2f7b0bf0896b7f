"""The result of a run: `adapter/` and `adapter-best/`, with the processor of the training and a model card."""

from __future__ import annotations

import shutil
from pathlib import Path

from launch.atomic_files import atomic_dir
from trainer.checkpoint.best import write_best_adapter
from trainer.distributed.collectives import run_on_main
from trainer.export.merge_plan import CARD
from trainer.export.model_card import adapter_card
from trainer.formats.portable import save_adapter
from trainer.loop.trainer import PlannedTrainer
from trainer.pretrained import base_name


def save_final_adapter(trainer: PlannedTrainer) -> None:
    """Write `adapter/`, replacing an older one whole, and `adapter-best/` where the recipe keeps one. A collective."""
    run, recipe = trainer.run_directory, trainer.recipe
    weights = trainer.engine.weights()

    def add_processor_and_card(folder: Path) -> None:
        trainer.encoder.processor.save_pretrained(str(folder))
        (folder / CARD).write_text(adapter_card(run, recipe, base_name(recipe), folder), encoding="utf-8")

    def write() -> None:
        with atomic_dir(run.adapter) as folder:
            save_adapter(trainer.model, folder, weights)
            add_processor_and_card(folder)
            if run.adapter.exists():
                shutil.rmtree(run.adapter)

    run_on_main(write)
    run_on_main(lambda: write_best_adapter(trainer.task, add_processor_and_card))
