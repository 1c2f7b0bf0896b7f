"""The sides of `throughput.py`: our training, and trl's on the same samples. Each runs in a process of its own."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import torch

from benchmarks import gpu_trace
from benchmarks.random_base import GLOBAL_BATCH, RECIPE, recipe_arguments
from launch.inputs.dataset_index import Index
from launch.inputs.families import read_shape
from launch.planning.make_plan import make_plan
from launch.planning.plan import Plan
from launch.planning.run_steps import step_plan
from launch.planning.step_plan import StepPlan
from launch.planning.topology import Topology
from launch.recipe.loading import find_recipe, load_recipe
from launch.recipe.schema import Recipe
from trainer.loop.step_figures import sample_flops
from trainer.prepare import prepare

FIRST_PROFILED, PROFILED = 4, 2
TRL = {
    "notebook": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": GLOBAL_BATCH // 4,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "tuned": {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": GLOBAL_BATCH // 8,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 8,
    },
}


def run_samestep(options: argparse.Namespace) -> dict[str, Any]:
    """`trainer.train` on one device, as `samestep run` starts it."""
    from trainer.metrics_log import read_lines
    from trainer.train import main as train

    side = options.side
    filling, waited = 0, 0.0
    if side == "samestep-cached":
        rows = sum(
            pq.read_metadata(file).num_rows for file in (options.folder / options.images).glob("train-*")
        )
        filling = -(-rows // GLOBAL_BATCH)
        options = changed(options, filling + options.steps, ["data.vision_cache=memory"])
    elif side == "samestep-disk":
        options = changed(options, options.steps, ["data.vision_cache=disk"])
        began = time.perf_counter()
        fill_disk_cache(options)
        waited = time.perf_counter() - began
    runs = options.folder / "runs" / side
    shutil.rmtree(runs, ignore_errors=True)
    saves, recording = Saves(), Recording(options.folder / f"{side}.trace.json")
    logging.getLogger("trainer").addHandler(saves)
    recording.watch(filling + FIRST_PROFILED if options.profile else 0)
    arguments = [RECIPE, "--runs-dir", str(runs), "--name", "benchmark", *recipe_arguments(options)]
    if status := train(arguments):
        raise SystemExit(status)
    lines = read_lines(runs / "benchmark" / "metrics.jsonl")
    recipe, index = prepared(options)
    plan = Plan.from_json((runs / "benchmark" / "plan.json").read_text())
    counted = lines[filling:]
    return {
        "side": side,
        "seconds": [line["seconds"] for line in counted],
        "profiled": recording.places(filling),
        "loss": [line["loss"] for line in lines[: len(counted)]],  # of the pass that fills a cache too
        "tokens": [line["tokens"] for line in counted],
        "flops": step_flops(
            recipe,
            index,
            step_plan(recipe, index, plan),
            [line["step"] - 1 for line in counted],
            side == "samestep",
        ),
        "first_step_s": (recording.first_step_s or 0.0) - waited,
        "first_step": json.loads((runs / "benchmark" / "environment.json").read_text())["first_step"],
        "peak_gib": peak_gib(),
        "planned_gib": plan.settings.planned_memory / 2**30,
        "filling_seconds": [line["seconds"] for line in lines[:filling]],
        "finite": all(math.isfinite(line["loss"]) for line in lines),
        "save_seconds": saves.seconds,
        "profile": recording.profile(),
    }


def changed(options: argparse.Namespace, steps: int, settings: list[str]) -> argparse.Namespace:
    """With other steps, and recipe values of the side's own."""
    return argparse.Namespace(**{**vars(options), "steps": steps, "set": [*options.set, *settings]})


def fill_disk_cache(options: argparse.Namespace) -> None:
    """As a user does it before the run."""
    recipe = str(find_recipe(RECIPE))
    command = [sys.executable, "-m", "trainer.prepare", "--quiet", "--vision", recipe]
    subprocess.run([*command, *recipe_arguments(options)], check=True)


def prepared(options: argparse.Namespace, *changes: str) -> tuple[Recipe, Index]:
    """The recipe of the arguments, with changes (key=value), and its index."""
    recipe = load_recipe(find_recipe(RECIPE), [*recipe_arguments(options)[1::2], *changes])
    return recipe, prepare(recipe, quiet=True)


def step_flops(recipe: Recipe, index: Index, steps: StepPlan, places: list[int], vision: bool) -> list[float]:
    """Counted operations of each of these steps."""
    shape = read_shape(recipe)
    assert not isinstance(shape, str), shape
    each = sample_flops(shape, index.splits["train"], vision)
    return [float(each[steps.samples(place)].sum()) for place in places]


class Recording:
    """When our first step ended, and the profile of PROFILED of them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.first_step_s: float | None = None
        self._profiler: Any = None
        self._first = 0
        self._began = self._seconds = 0.0

    def watch(self, first: int) -> None:
        """Put it at the end of the trainer's steps; `first`: of the profiled steps, or 0 for none."""
        from trainer.loop.callbacks import StepEnd

        on_step_end = StepEnd.on_step_end
        self._first = first if torch.cuda.is_available() else 0

        def end(callback: StepEnd, *args: Any, **kwargs: Any) -> None:
            on_step_end(callback, *args, **kwargs)
            if self.first_step_s is None:
                self.first_step_s = seconds_of_this_process()
            self._at_end_of(callback.trainer.state.global_step)

        StepEnd.on_step_end = end  # type: ignore[method-assign]

    def _at_end_of(self, step: int) -> None:
        if self._first and step == self._first - 1:
            self._profiler, self._began = gpu_trace.start_recording(), time.perf_counter()
        elif self._first and step == self._first + PROFILED - 1 and self._profiler is not None:
            torch.cuda.synchronize()
            self._seconds = time.perf_counter() - self._began
            gpu_trace.stop_recording(self._profiler)

    def places(self, filling: int) -> list[int]:
        """Of the profiled steps, and of the one that the end of profiling falls into; from 0, after `filling`."""
        if not self._first:
            return []
        return list(range(self._first - 1 - filling, self._first + PROFILED - filling))

    def profile(self) -> dict[str, Any] | None:
        """Of each of the steps: seconds, busy share, the kernels that took longest, waits of the host."""
        if not self._seconds:
            return None
        events = gpu_trace.events_of(self._profiler, self.file)
        kernels = gpu_trace.top_kernels(events, 25)
        return {
            "steps": PROFILED,
            "step_s": self._seconds / PROFILED,
            "busy_share": gpu_trace.busy_seconds(events) / self._seconds,
            "host_syncs": gpu_trace.host_syncs(events) / PROFILED,
            "launches": gpu_trace.launches(events) / PROFILED,
            "kernels": [
                {"name": name[:100], "seconds": seconds / PROFILED, "calls": calls / PROFILED}
                for name, seconds, calls in kernels
            ],
        }


class Saves(logging.Handler):
    """The seconds that the training waited for each checkpoint, from the trainer's log."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"the training waited ([\d.]+) s", record.getMessage()):
            self.seconds.append(float(found[1]))


def run_trl(options: argparse.Namespace) -> dict[str, Any]:
    """trl's SFTTrainer with its own collator on the same samples in the same order, the answer alone scored."""
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from trainer.model.base import load_base
    from trainer.model.lora import add_lora, trainable_parameters
    from trainer.pretrained import load_processor

    cuda = torch.cuda.is_available()
    count = options.notebook_steps if options.side == "notebook" else options.steps
    recipe, index = prepared(options, "batch.prefix_sharing=false")
    device = "cuda" if cuda else "cpu"
    plan = make_plan(recipe, index, Topology("single", 1, 1, device))
    steps = step_plan(recipe, index, plan)
    ends: list[float] = []
    first_step: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            if not first_step:
                first_step.append(seconds_of_this_process())
            if len(ends) % 5 == 2:
                print(f"{options.side}: step {len(ends) - 1}, {ends[-1] - ends[-2]:.2f} s", flush=True)

    training = recipe.training
    model = add_lora(load_base(recipe, torch.device("cuda", 0) if cuda else torch.device("cpu")), recipe)
    adapters = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(options.folder / "trl"),
            max_steps=count,
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.lr_scheduler_type,
            warmup_steps=plan.warmup_steps,
            max_grad_norm=training.max_grad_norm,
            optim=training.optim,
            bf16=plan.compute_dtype == "bfloat16",
            use_cpu=not cuda,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            **TRL[options.side],
        ),
        train_dataset=trl_dataset(recipe, steps, count),
        processing_class=load_processor(recipe),
        callbacks=[Clock()],
    )
    if options.fp32_adapters:
        for name, parameter in trainable_parameters(trainer.model).items():
            parameter.data = adapters[name]
    trainer.train()
    history = trainer.state.log_history
    places = list(range(count))
    split = index.splits["train"]
    return {
        "side": options.side,
        "seconds": [round(after - before, 4) for before, after in itertools.pairwise(ends)],
        "profiled": [],
        "loss": [entry["loss"] for entry in history if "loss" in entry],
        "tokens": [int(split.tokens[steps.samples(place)].sum()) for place in places],
        "flops": step_flops(recipe, index, steps, places, True),
        "first_step_s": first_step[0],
        "peak_gib": peak_gib(),
    }


def trl_dataset(recipe: Recipe, steps: StepPlan, count: int) -> Any:
    """The samples of the first `count` steps in their order, as prompt and completion."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    from trainer.data.splits import open_split

    rows = open_split(recipe, "train")
    text = {"role": Value("string"), "content": Value("string")}
    return Dataset.from_list(
        [
            {
                "images": [{"bytes": rows[sample].images[0], "path": None}],
                "prompt": [
                    {"role": "system", "content": recipe.data.system_message},
                    {"role": "user", "content": rows[sample].query},
                ],
                "completion": [{"role": "assistant", "content": rows[sample].label[0]}],
            }
            for step in range(count)
            for sample in steps.samples(step).tolist()
        ],
        features=Features({"images": List(ImageFeature()), "prompt": List(text), "completion": List(text)}),
    )


def seconds_of_this_process() -> float:
    """Since it was started: imports, loading and quantizing are in it."""
    return time.time() - psutil.Process().create_time()


def peak_gib() -> float | None:
    """Peak of the memory that tensors took on the GPU, GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
