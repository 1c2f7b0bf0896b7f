"""Started by `accelerate launch` under fsdp or zero3: runs whose decoder layers are watched as they come and go.

A run named `fused-...` computes them by `trainer.model.fused`: its kernels of adapters in Triton's interpreter, and
plain PyTorch for Liger's and for those of a program for each row, at which the interpreter takes a minute. One named
`kept-...` has a plan that keeps a layer whole. `<run>.json`, beside each run, is what rank 0 saw: [`training` of a
micro-batch or `evaluation`, all-gathers, layers left whole, whether they are fused].
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.nn.functional import layer_norm, silu

from tests.helpers.foreign.fsdp_on_cpu import allow_fsdp_on_cpu
from tests.trainer.model.test_fused import plain_norm, plain_norm_of_sum
from trainer import train
from trainer.distributed.collectives import destroy_process_group, end_process
from trainer.loop import build
from trainer.loop.trainer import PlannedTrainer
from trainer.model import attention, base, fused, kernels
from trainer.model.layer_stand_ins import decoder_layers, frozen_weights

_gather = _fsdp_param_group.foreach_all_gather
_schedule = build.schedule_gathers
COLLECTIVES = [0]


def _rotate_in_place(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> None:
    for x in (query, key):
        left, right = x.chunk(2, dim=-1)
        turned = torch.cat((-right, left), dim=-1) * (-sin if back else sin).transpose(0, 1)
        x.copy_(x * cos.transpose(0, 1) + turned)


def _turn_whole(*turning: Any) -> tuple[Tensor, ...]:
    *turning, shared = turning
    return tuple(shared.whole(each) for each in fused._Rotated.apply(*turning))


def _norm_gradient(
    gradient: Tensor, residual: Tensor | None, x: Tensor, weight: Tensor, deviations: Tensor
) -> Tensor:
    weighted, scale = gradient * weight, deviations.view(*x.shape[:-1], 1)
    change = scale * (weighted - x * scale**2 * (weighted * x).mean(-1, keepdim=True))
    return change if residual is None else change + residual


def _layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    normed = layer_norm(total, weight.shape, weight, bias, epsilon)
    return total if after is None else total + after, normed


def _stock(*_: Any, **__: Any) -> Any:
    return NotImplemented


FUSED = [
    mock.patch.object(base, "_no_kernels", return_value=None),
    mock.patch.object(fused, "norm_forward", plain_norm),
    mock.patch.object(fused, "norm_of_sum_forward", plain_norm_of_sum),
    mock.patch.object(fused, "rotate_in_place", _rotate_in_place),
    mock.patch.object(fused, "turn_whole", _turn_whole),
    mock.patch.object(kernels, "norm_gradient", _norm_gradient),
    mock.patch.object(fused, "layer_norm", _layer_norm),
    mock.patch.object(fused, "swiglu", lambda gate, up: silu(gate) * up),
    mock.patch.object(fused, "varlen", attention._loop),
    mock.patch.object(fused, "vision_attention", _stock),
    mock.patch.object(fused, "quick_gelu", _stock),
]


def _count(*args: Any, **kwargs: Any) -> Any:
    COLLECTIVES[0] += 1
    return _gather(*args, **kwargs)


def _keep_one(model: Any, whole_layers: int) -> None:
    _schedule(model, 1)


def _whole_layers(trainer: PlannedTrainer) -> list[int]:
    """Numbers of the layers whose frozen weights are here whole."""
    layers = decoder_layers(trainer.model)
    return [
        number
        for number, layer in enumerate(layers)
        if not all(isinstance(weight, DTensor) for weight in frozen_weights(layer))
    ]


def watched(what: str, inner: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    """A method of the trainer: the collectives that it takes, and what it leaves together."""

    def method(self: PlannedTrainer, *args: Any, **kwargs: Any) -> Any:
        COLLECTIVES[0] = 0
        result = inner(self, *args, **kwargs)
        forward = cast(Any, decoder_layers(self.model)[0].forward)
        seen.append([what, COLLECTIVES[0], _whole_layers(self), forward.__func__ is fused.decoder_layer])
        return result

    return method


def main() -> None:
    """Arguments: a JSON file with a list of arguments of `trainer.train`."""
    asked = [train.parse(arguments) for arguments in json.loads(Path(sys.argv[1]).read_text())]
    indexes = [train.prepare_first(options) for options in asked]
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        allow_fsdp_on_cpu()
    state = train.init_process_group()
    _fsdp_param_group.foreach_all_gather = _count
    for options, index in zip(asked, indexes, strict=True):
        seen: list[Any] = []
        with ExitStack() as stack:
            for patch in FUSED if options.name.startswith("fused") else []:
                stack.enter_context(patch)
            if options.name.startswith("kept"):
                stack.enter_context(mock.patch.object(build, "schedule_gathers", _keep_one))
            for what, name in (("training", "training_step"), ("evaluation", "evaluate")):
                inner = getattr(PlannedTrainer, name)
                stack.enter_context(mock.patch.object(PlannedTrainer, name, watched(what, inner, seen)))
            train.train_once(options, index, state, os.getppid())
        if state.is_main_process:
            (options.runs_dir / f"{options.name}.json").write_text(json.dumps(seen))
    destroy_process_group()
    end_process(0)


if __name__ == "__main__":
    main()
