"""ms-swift's own training with a clock: `swift_side.py` starts it with the Python that has ms-swift.

    PYTHON benchmarks/swift_training.py FILE

FILE holds the values of ms-swift's `SftArguments` as JSON. Nothing of samestep is imported here. The last line on
stdout begins with `RESULT `: seconds from step end to step end, losses, seconds to the end of the first step, peak
memory.

flash-attn has no wheel for every PyTorch, so `--attn_impl flash_attn` calls FlashAttention-2 as PyTorch ships it
(`torch.nn.attention.varlen`). A CPU has no such kernel; there each sample goes through `scaled_dot_product_attention`.
"""

from __future__ import annotations

import inspect
import itertools
import json
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, whose modules have common names

import psutil
import torch
from swift.arguments import SftArguments
from swift.pipelines.train.sft import SwiftSft
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel, TrainerCallback, modeling_flash_attention_utils


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """flash-attn's `flash_attn_varlen_func`; queries, keys, values [tokens, heads, channels]."""
    if not q.is_cuda:
        return attention_by_sample(q, k, v, cu_seqlens_q.tolist(), softmax_scale, causal)
    from torch.nn.attention.varlen import varlen_attn

    known = _parameters(varlen_attn)
    options: dict[str, Any] = {"scale": softmax_scale} if "scale" in known else {}
    if "window_size" in known:
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    longest = int(max_seqlen_q), int(max_seqlen_k)
    return varlen_attn(q, k, v, cu_seqlens_q.int(), cu_seqlens_k.int(), *longest, **options)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def attention_by_sample(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int], scale: float | None, causal: bool
) -> torch.Tensor:
    """The same numbers on any device."""
    outputs = [
        scaled_dot_product_attention(
            *(part[first:last].transpose(0, 1)[None] for part in (q, k, v)),
            is_causal=causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )[0].transpose(0, 1)
        for first, last in itertools.pairwise(bounds)
    ]
    return torch.cat(outputs)


def use_pytorchs_flash_attention() -> None:
    """In the place of the package flash-attn, for `attn_implementation="flash_attention_2"`."""
    module = modeling_flash_attention_utils
    functions = (None, packed_attention, None, module._pad_input, module._unpad_input)
    module._lazy_imports = lambda *_, **__: functions
    PreTrainedModel._flash_attn_can_dispatch = lambda *_, **__: True


class Clock(TrainerCallback):
    """When each step ended on the GPU."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.first_step_s = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if len(self.ends) == 2:
            self.first_step_s = time.time() - psutil.Process().create_time()
        print(f"swift: step {len(self.ends) - 1}, {self.ends[-1] - self.ends[-2]:.2f} s", flush=True)


class TimedSft(SwiftSft):
    """`swift sft` with the clock, and with the image token of the base's own vocabulary."""

    clock = Clock()

    def _prepare_template(self) -> None:
        super()._prepare_template()
        self.template.image_token_id = self.model.config.image_token_id

    def train(self, trainer: Any) -> Any:
        trainer.add_callback(self.clock)
        return super().train(trainer)


def main(file: str) -> None:
    """Train, and print what was measured."""
    use_pytorchs_flash_attention()
    training = TimedSft(SftArguments(**json.loads(Path(file).read_text())))
    history = training.main()["log_history"]
    clock = training.clock
    result = {
        "seconds": [round(after - before, 4) for before, after in itertools.pairwise(clock.ends)],
        "loss": [entry["loss"] for entry in history if "loss" in entry],
        "first_step_s": clock.first_step_s,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
