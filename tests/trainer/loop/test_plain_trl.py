"""The notebook to the letter: our steps are those of plain trl with its own collator, on the same samples."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from launch.inputs.dataset_index import Index
from launch.planning.make_plan import make_plan
from launch.planning.plan import Plan
from launch.planning.run_steps import step_plan
from launch.planning.topology import Topology
from launch.recipe.loading import recipe_from_dict
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from tests.conftest import recipe_values
from trainer.data.encoder import Encoder
from trainer.data.images import decode_image
from trainer.data.splits import open_split
from trainer.distributed.stop_requests import StopRequests
from trainer.loop.build import build_trainer
from trainer.metrics_log import read_lines
from trainer.model.base import load_base
from trainer.model.lora import add_lora
from trainer.prepare import prepare
from trainer.pretrained import load_processor
from trainer.startup_timer import StartupTimer
from trainer.task import Task

STEPS = 3


class Gradients(TrainerCallback):
    """Copies of the LoRA gradients and losses of every step, as the optimizer sees them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({n: p.grad.detach().clone() for n, p in named if p.grad is not None})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


@pytest.fixture(scope="module")
def recipe(world: Path) -> Recipe:
    values = recipe_values(world)
    values["lora"] = {"lora_dropout": 0.0}
    values["data"]["loss"] = "sequence"
    values["evaluation"]["every_steps"] = 100
    values["training"] |= {"max_steps": STEPS, "lr_scheduler_type": "constant", "warmup_steps": 0}
    return recipe_from_dict(values)


@pytest.fixture(scope="module")
def ours(
    recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Gradients, RunDirectory, Plan, Index]:
    index = prepare(recipe, quiet=True)
    plan = make_plan(recipe, index, Topology("single", 1, 1, "cpu"))
    run = RunDirectory(tmp_path_factory.mktemp("ours"))
    encoder = Encoder(load_processor(recipe), recipe.data.system_message, recipe.data.loss)
    seen = Gradients()
    model = add_lora(load_base(recipe, torch.device("cpu")), recipe)
    task, watch = Task(recipe, plan, index, run), StopRequests(run, 0, os.getppid())
    trainer = build_trainer(model, task, encoder, watch, 0, StartupTimer(time.time()))
    trainer.add_callback(seen)
    trainer.train()
    return seen, run, plan, index


@pytest.fixture(scope="module")
def plain(recipe: Recipe, ours: tuple[Any, ...], tmp_path_factory: pytest.TempPathFactory) -> Gradients:
    """trl as the notebook uses it: messages and images, its own collator, micro-batches of 2."""
    _, _, plan, index = ours
    order = [int(sample) for step in range(STEPS) for sample in step_plan(recipe, index, plan).samples(step)]
    rows = open_split(recipe, "train")
    dataset = Dataset.from_list(
        [
            {
                "images": [decode_image(rows[sample].images[0])],
                "messages": [
                    {"role": "system", "content": recipe.data.system_message},
                    {"role": "user", "content": rows[sample].query},
                    {"role": "assistant", "content": rows[sample].label[0]},
                ],
            }
            for sample in order
        ],
        features=Features(
            {
                "images": List(ImageFeature()),
                "messages": List({"role": Value("string"), "content": Value("string")}),
            }
        ),
    )
    training = recipe.training
    seen = Gradients()
    trainer = SFTTrainer(
        model=add_lora(load_base(recipe, torch.device("cpu")), recipe),
        args=SFTConfig(
            output_dir=str(tmp_path_factory.mktemp("plain")),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            learning_rate=training.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=training.max_grad_norm,
            optim=training.optim,
            max_length=None,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        ),
        train_dataset=dataset,
        processing_class=load_processor(recipe),
        callbacks=[seen],
    )
    trainer.train()
    return seen


def test_losses_are_plain_trls(ours: tuple[Gradients, RunDirectory, Plan, Index], plain: Gradients) -> None:
    losses = [line["loss"] for line in read_lines(ours[1].metrics_file)]
    print("ours", losses, "trl", plain.losses)
    assert losses == pytest.approx(plain.losses, rel=1e-5)
    assert len(set(losses)) == STEPS


def test_gradients_are_plain_trls(
    ours: tuple[Gradients, RunDirectory, Plan, Index], plain: Gradients
) -> None:
    assert len(ours[0].steps) == len(plain.steps) == STEPS
    for mine, theirs in zip(ours[0].steps, plain.steps, strict=True):
        assert mine.keys() == theirs.keys()
        for name, gradient in theirs.items():
            apart = (mine[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert apart <= 1e-5, f"{name}: {apart}"
