"""LoRA dropout whose mask belongs to the sample, not to the layout.

Whether a value is dropped is a function of (seed, optimizer step, sample, position of the token within the sample,
module, channel) and of nothing else: packing, micro-batch, rank, world size, recomputation and resuming cannot
change it, and no generator has a state to restore. All of it is integer arithmetic that wraps, so CPU and CUDA
agree to the bit, and nothing is read back from the device. A sample that one step holds twice, where two epochs meet,
has one mask for both. The prefix that samples share (`trainer.data.packing`) counts as a sample of its own, number -1:
it has one mask in a step, for all samples, in every micro-batch.

A step is 64 bits of sha256; a sample starts a SplitMix64 generator there, of which each token takes one output; a
token in a module is 64 bits again, (multiplier, addend). Only then come the channels, two to a 32-bit word:
`multiplier * constant of the word + addend` is pairwise independent (the strongly universal family of Dietzfelbinger,
STACS 1996), one round of xorshift, multiply, xorshift breaks the line it lies on, and each half of the word is one
draw of 16 bits. These are the only operations at the full size of an activation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from launch.errors import RunError

ARGUMENT = "dropout_keys"
"""The keyword under which the keys travel down to the decoder layers, beside `segments`."""

DRAWS = 1 << 16
"""Equally likely values of one draw: a dropout share is a multiple of 1 / 65536."""

# SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): increment, and the finalizer's (shift, multiplier) pairs.
_INCREMENT = 0x9E3779B97F4A7C15
_ROUNDS_64 = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
# lowbias32 (Chris Wellons, github.com/skeeto/hash-prospector), likewise.
_ROUNDS_32 = ((16, 0x7FEB352D), (15, 0x846CA68B))


def token_keys(seed: int, step: int, sample_ids: Tensor, positions: Tensor) -> Tensor:
    """Return 64 bits for each of T tokens, int64 [T].

    `sample_ids`, `positions`: int64 [T], the sample of a token and its place in the sample, counted from 0.
    """
    samples = _mix(sample_ids ^ _named(f"step/{seed}/{step}"))
    return _mix(samples + positions * _signed(_INCREMENT))


def module_keys(names: list[str]) -> Tensor:
    """Return 64 bits for each module, int64 [M]. Names count from the language model, without any wrapper's prefix."""
    return torch.tensor([_named(f"module/{name}") for name in names], dtype=torch.int64)


def row_keys(tokens: Tensor, modules: Tensor) -> Tensor:
    """Return (odd multiplier, addend) of each token in each module, int32 [M, T, 2], from int64 [T] and [M]."""
    mixed = _mix(tokens ^ modules[:, None])
    return mixed.bitwise_or_(1).view(torch.int32).unflatten(-1, (-1, 2))


def keep_mask(rows: Tensor, channels: int, dropped: int) -> Tensor:
    """Return what is kept, bool [T, channels], of row keys int32 [T, 2]: `dropped` of 65536 draws are not."""
    words = torch.addcmul(rows[:, 1:], rows[:, :1], channel_words((channels + 1) // 2, rows.device))
    draws = words.view(torch.int16)  # the low half of a word is the even channel
    low, high = draws.unflatten(-1, (-1, 2)).unbind(-1)
    low.bitwise_xor_(high)  # a logical xorshift by 16: int32 has only the arithmetic one
    words.mul_(_ROUNDS_32[0][1])
    low.bitwise_xor_(high)
    return draws[:, :channels] >= dropped - DRAWS // 2


class DropoutKeys:
    """The row keys of the decoder layer that is being computed: one per model, shared by all its `SampleDropout`."""

    def __init__(self, seed: int, names: list[str]) -> None:
        self._seed, self._modules = seed, module_keys(names)
        self.current: Tensor | None = None
        self.read_positions: Tensor | None = None

    def of(self, step: int, sample_ids: Tensor, positions: Tensor) -> Tensor:
        """Return the row keys of a micro-batch, int32 [M, T, 2]: 8 bytes for each token in each module."""
        self._modules = self._modules.to(sample_ids.device)
        return row_keys(token_keys(self._seed, step, sample_ids, positions), self._modules)

    def take(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Make the layer's keys current: a forward pre-hook of a decoder layer's attention, the layer's first part.

        Being arguments of the layer, they come back with it in the recomputation, whatever ran in between. Its linear
        layers are called with activations alone, so that the last step to them goes through this object. The last layer
        computes some tokens alone in most of its modules (`trainer.model.last_layer`): which, is known here too.
        """
        self.current = kwargs.pop(ARGUMENT, None)
        queries = kwargs.get("queries")
        self.read_positions = None if queries is None else queries.positions
        return args, kwargs


class SampleDropout(nn.Module):
    """Stands in for PEFT's `nn.Dropout` of module `name`, number `index` of the model. Identity in evaluation."""

    def __init__(self, p: float, name: str, index: int, keys: DropoutKeys) -> None:
        super().__init__()
        self.p, self.name, self.index, self.keys = p, name, index, keys
        # At least one draw, so that a small share is not silently none; never all.
        self.dropped = min(max(round(p * DRAWS), 1), DRAWS - 1) if p > 0 else 0

    def forward(self, x: Tensor) -> Tensor:
        """Return x [1, T, channels] or [T, channels], with zeros where dropped and the rest scaled to the same
        expectation.
        """
        if not self.training or self.dropped == 0:
            return x
        rows = self.rows_of(x)
        keep = keep_mask(rows, x.shape[-1], self.dropped).view(x.shape)
        return cast(Tensor, _Drop.apply(x, keep, DRAWS / (DRAWS - self.dropped)))

    def rows_of(self, x: Tensor) -> Tensor:
        """Return the row keys int32 [T, 2] of the T tokens of x [1, T, channels] or [T, channels] in this module.

        Raises:
            RunError: there are no keys, or they are not of these tokens: the mask would be wrong.
        """
        if self.keys.current is None:
            raise RunError(
                f"lora.lora_dropout: {self.name} runs in training mode without the keys of its tokens; "
                "call the model with a packed micro-batch, or in evaluation mode"
            )
        rows = self.keys.current[self.index]
        tokens = x.shape[:-1].numel()
        read = self.keys.read_positions
        if read is not None and tokens == len(read):
            return rows.index_select(0, read)
        if tokens != len(rows):
            raise RunError(
                f"lora.lora_dropout: {self.name} is given {tokens} tokens, and keys for {len(rows)}; "
                "give a layer the whole packed micro-batch"
            )
        return rows

    def extra_repr(self) -> str:
        """Return the module's name and share, as `print(model)` shows them."""
        return f"{self.name}, p={self.p}"


class _Drop(torch.autograd.Function):
    """`x * keep * scale` in one pass, rounded once; keeps one byte a value for the backward pass, as `nn.Dropout`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return _scaled(x, keep, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return _scaled(gradients[0], keep, ctx.scale), None, None


def _scaled(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """PyTorch's name speaks of one use; it is the product alone. A mask in bf16 would round 1 / 0.95 by 0.2 %."""
    return cast(Tensor, torch.ops.aten.native_dropout_backward(x, keep, scale))


def use_sample_dropout(language_model: nn.Module, seed: int) -> DropoutKeys | None:
    """Replace the dropout of all LoRA layers in the decoder layers; None where there is none (a share of 0)."""
    keys = replace_dropout(language_model, seed)
    if keys is not None:
        for layer in cast(Any, language_model).layers:
            layer.self_attn.register_forward_pre_hook(keys.take, with_kwargs=True)
    return keys


def replace_dropout(
    part: nn.Module, seed: int, prefix: str = "", is_replaced: Callable[[str], bool] = lambda name: True
) -> DropoutKeys | None:
    """Replace the dropout of the LoRA layers for whose name in `part` `is_replaced` says so; None without any.

    They are keyed by their names in `part`, with `prefix`. Whoever calls the part gives it `current` keys.
    """
    dropouts = {
        (name, adapter): dropout
        for name, module in part.named_modules()
        if isinstance(module, LoraLayer) and is_replaced(name)
        for adapter, dropout in module.lora_dropout.items()
        if isinstance(dropout, nn.Dropout)
    }
    if not dropouts:
        return None
    keys = DropoutKeys(seed, [f"{prefix}{name}" for name, _ in dropouts])
    for index, ((name, adapter), dropout) in enumerate(dropouts.items()):
        layer: Any = part.get_submodule(name)
        layer.lora_dropout[adapter] = SampleDropout(dropout.p, f"{prefix}{name}", index, keys)
    return keys


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer, in place on int64."""
    for shift, factor in _ROUNDS_64:
        x.bitwise_xor_(_shifted(x, shift)).mul_(_signed(factor))
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: Tensor, shift: int) -> Tensor:
    """A logical shift to the right of int64, which has only the arithmetic one."""
    return (x >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _named(name: str) -> int:
    """64 bits of a name, as a signed number."""
    return int.from_bytes(
        hashlib.sha256(f"samestep/dropout/{name}".encode()).digest()[:8], "big", signed=True
    )


def _signed(number: int) -> int:
    """An unsigned number of 64 bits as int64 holds it."""
    return number - (1 << 64) if number >> 63 else number


@cache
def channel_words(words: int, device: torch.device) -> Tensor:
    """Return the constants of the channel pairs, int32 [words]: lowbias32 of their numbers, so all are different."""
    x = torch.arange(1, words + 1, dtype=torch.int64)
    for shift, factor in _ROUNDS_32:
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return (x ^ (x >> 16)).to(torch.int32).to(device)
