"""Speed, memory and utilization between two lines of progress: for the screen and the trackers, on rank 0."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launch.inputs.dataset_index import Index, Split
from launch.inputs.families import read_shape
from launch.inputs.model_shape import ModelShape
from launch.planning.plan import Plan
from launch.recipe.schema import Recipe
from launch.units import GIB
from trainer.data.loader import DATA_WAIT

PEAK_TFLOPS = {
    "B200": 2250.0, "H200": 989.0, "H100 NVL": 835.0, "H100 PCIE": 756.0, "H100": 989.0, "H800": 989.0,
    "A100": 312.0, "A800": 312.0, "A30": 165.0, "A10": 125.0, "L40S": 362.0, "L4": 121.0,
    "RTX 4090": 165.0, "RTX 3090": 71.0,
}  # fmt: skip
"""Dense bfloat16 matrix products of a card, 10**12 operations a second, as NVIDIA's data sheets have them."""


def peak_flops(device_name: str) -> float | None:
    """Operations a second that a card is made for; None for one that is not in the table."""
    words = device_name.upper().replace("-", " ").split()
    for name, tera in sorted(PEAK_TFLOPS.items(), key=lambda item: -len(item[0])):
        if all(word in words for word in name.split()):
            return tera * 1e12
    return None


def sample_flops(shape: ModelShape, split: Split, vision: bool) -> NDArray[np.float64]:
    """Floating-point operations that training on each sample cannot do without, [samples].

    The decoder forward and backward to its activations (its weights are frozen), causal attention, the head at target
    tokens, and with `vision` the tower forward, whose windowed blocks count attention within windows. Not counted:
    recomputation, LoRA (nor the backward of a tower that trains), padding, and the linear layers at the shared prefix,
    which micro-batches compute once. A multiply and an add are two operations.
    """
    tokens, own = split.tokens.astype(float), split.own_tokens.astype(float)
    visual = split.visual_tokens.astype(float)
    patches = visual * shape.patches_per_token
    linear = 4.0 * shape.layers * shape.layer_weights * own
    attention = 6.0 * shape.layers * shape.query_width * tokens**2
    head = 4.0 * shape.hidden * shape.vocabulary * split.target_tokens
    per_sample = linear + attention + head
    if vision:
        linears = shape.tower_linears.items()
        of_patch = sum(
            each.copies * each.outputs * each.inputs for name, each in linears if name.startswith("blocks.")
        )
        of_token = shape.tower_weights - of_patch  # the mergers'
        squares = split.visual_squares.astype(float) * shape.patches_per_token**2
        windowed = np.minimum(patches * shape.vision_window_patches, squares)
        pairs = (shape.vision_blocks - shape.windowed_blocks) * squares + shape.windowed_blocks * windowed
        within = 4.0 * shape.vision_width * pairs
        per_sample = per_sample + 2.0 * of_patch * patches + 2.0 * of_token * visual + within
    return np.asarray(per_sample)


def flops_per_step(shape: ModelShape, index: Index, plan: Plan, vision: bool) -> float:
    """Operations (`sample_flops`) of an average optimizer step, on all ranks together."""
    return float(sample_flops(shape, index.splits["train"], vision).mean()) * plan.global_batch_size


def memory_figures() -> dict[str, int]:
    """Bytes that PyTorch's allocator has given out and has taken from this rank's GPU; nothing on a CPU."""
    if not torch.cuda.is_available():
        return {}
    return {
        "memory_allocated": torch.cuda.memory_allocated(),
        "memory_reserved": torch.cuda.memory_reserved(),
    }


class StepFigures(TrainerCallback):
    """Adds the figures to what is logged of steps; the first of the reporters, which all get the same mapping.

    Speed is taken from the clock, so evaluations and saves between two lines of progress count as time. `seconds_left`:
    of the whole run at the speed of this attempt, None before its first line.
    """

    def __init__(self, recipe: Recipe, index: Index, plan: Plan) -> None:
        self._plan = plan
        self._tokens = float(index.splits["train"].tokens.mean()) * plan.global_batch_size
        shape = read_shape(recipe)
        cuda = torch.cuda.is_available() and plan.compute_dtype == "bfloat16"
        self._peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
        vision = recipe.data.vision_cache == "off"
        self._flops = None if isinstance(shape, str) else flops_per_step(shape, index, plan, vision)
        self._began, self._first_step = time.perf_counter(), 0
        self._last, self._last_step = self._began, 0
        self._waited = DATA_WAIT.seconds
        self.seconds_left: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = self._last = time.perf_counter()
        self._first_step = self._last_step = state.global_step
        self._waited = DATA_WAIT.seconds

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        now, step = time.perf_counter(), state.global_step
        steps = step - self._last_step
        if not logs or "loss" not in logs or steps <= 0:  # an evaluation's
            return
        seconds = max((now - self._last) / steps, 1e-9)
        logs["seconds_per_step"] = seconds
        logs["tokens_per_second"] = self._tokens / seconds
        logs["samples_per_second"] = self._plan.global_batch_size / seconds
        logs["data_wait"] = (DATA_WAIT.seconds - self._waited) / max(now - self._last, 1e-9)
        if self._peak and self._flops:
            logs["mfu"] = self._flops / seconds / (self._peak * self._plan.world_size)
        logs.update({f"{name}_gib": size / GIB for name, size in memory_figures().items()})
        whole = (now - self._began) / max(step - self._first_step, 1)
        self.seconds_left = whole * (self._plan.max_steps - step)
        self._last, self._last_step, self._waited = now, step, DATA_WAIT.seconds


def screen_text(logs: Mapping[str, float], seconds_left: float | None = None) -> str:
    """What of the figures fits on a line of progress: loss first, then speed, memory and the time that is left."""
    known = ("loss", "eval_loss", "eval_accuracy", "grad_norm", "learning_rate", "epoch")
    shown = [f"{name} {logs[name]:.4g}" for name in known if name in logs]
    if "seconds_per_step" in logs:
        shown.append(f"{logs['seconds_per_step']:.3g} s/step")
        shown.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if "memory_reserved_gib" in logs:
        shown.append(f"{logs['memory_reserved_gib']:.1f} GiB")
    if "seconds_per_step" in logs and seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        shown.append(f"{hours}:{minutes:02}:{seconds:02} left")
    return " ".join(shown)
