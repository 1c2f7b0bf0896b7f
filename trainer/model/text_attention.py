"""The language model's attention with its gradient, through kernels of Triton's: Hopper's own where they compute.

Both are made for samples of any size in one call, and repeat to the bit on one GPU: `text_attention_kernel` and
`hopper_text_attention`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from trainer.model import text_attention_kernel as kernels
from trainer.model.chosen_kernels import record_kernel
from trainer.model.kernel_launch import cdiv, next_power_of_2

logger = logging.getLogger("trainer")

_Lengths = Sequence[int]


def _output(
    hopper: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, lengths: _Lengths, scale: float
) -> tuple[Tensor, Tensor]:
    """The output and the logarithms of the softmax's denominators, by Hopper's kernels or these."""
    if hopper:
        return cast(tuple[Tensor, Tensor], hopper.attend(q, k, v, bounds, lengths, scale))
    tokens, heads, width = q.shape
    out, sums = torch.empty_like(q), q.new_empty(heads, tokens, dtype=torch.float32)
    shape = (bounds, tokens, len(lengths), heads, heads // k.shape[1], scale)
    kernels.forward[(_tiles(lengths, kernels.FORWARD["M"]), heads)](
        q, k, v, out, sums, *shape, D=width, **kernels.FORWARD
    )
    return out, sums


def _gradients(
    hopper: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    gradient: Tensor,
    bounds: Tensor,
    lengths: _Lengths,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, width = q.shape
    along = hopper.numbers(heads, tokens, q.device) if hopper else torch.empty_like(sums)
    kernels.along[(tokens,)](out, gradient, along, tokens, heads, next_power_of_2(heads), width)
    if hopper:
        given = q, k, v, gradient, sums, along, bounds, lengths, scale
        return cast(tuple[Tensor, Tensor, Tensor], hopper.gradients(*given))
    of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    shape = (bounds, tokens, len(lengths), heads, heads // k.shape[1], scale)
    read = q, k, v, gradient, sums, along
    kernels.of_keys[(_tiles(lengths, kernels.OF_KEYS["N"]), k.shape[1])](
        *read, of_k, of_v, *shape, D=width, **kernels.OF_KEYS
    )
    kernels.of_queries[(_tiles(lengths, kernels.OF_QUERIES["M"]), heads)](
        *read, of_q, *shape, D=width, **kernels.OF_QUERIES
    )
    return of_q, of_k, of_v


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, lengths: _Lengths, scale: float
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        ctx.hopper = hopper_kernels(q.device, q.dtype, q.shape[2], q.shape[1], k.shape[1])
        ctx.lengths, ctx.scale = lengths, scale
        out, sums = _output(ctx.hopper, q, k, v, bounds, lengths, scale)
        ctx.save_for_backward(q, k, v, out, sums, bounds)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums, bounds = ctx.saved_tensors
        given = q, k, v, out, sums, gradients[0].contiguous(), bounds, ctx.lengths, ctx.scale
        return *_gradients(ctx.hopper, *given), None, None, None


@cache
def faster_than_pytorch(device: torch.device, width: int) -> bool:
    """Return whether these kernels were measured to be faster there: heads of 128 channels on Hopper (H100, H200)."""
    return device.type == "cuda" and width == 128 and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def hopper_kernels(device: torch.device, dtype: torch.dtype, width: int, heads: int, key_heads: int) -> Any:
    """`trainer.model.hopper_text_attention` where it computes what these kernels do: on Hopper, by a first use.

    Its language is experimental, so a version of Triton may not compile it, or otherwise.
    """
    if device.type != "cuda" or width != 128 or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    record_kernel("language model", "samestep's Triton kernels")
    try:
        from trainer.model import hopper_text_attention as hopper

        apart = _apart(hopper, device, dtype, width, heads, key_heads)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # after the latter no kernel computes any more
        raise
    except Exception as error:
        logger.info(f"attention: Hopper's kernels do not run here ({type(error).__name__}); Triton's compute")
        return None
    if not apart < 1e-2:
        logger.warning(f"attention: Hopper's kernels differ by {apart:.1e} here; Triton's compute")
        return None
    record_kernel("language model", "samestep's kernels for Hopper")
    return hopper


@torch.no_grad()
def _apart(
    hopper: Any, device: torch.device, dtype: torch.dtype, width: int, heads: int, key_heads: int
) -> float:
    """The largest relative difference of outputs and gradients, over samples shorter and longer than a tile.

    `heads`, `key_heads`: those of the training. Triton compiles another kernel for numbers of heads that 16 divides.
    """
    lengths = (1, 63, 200, 64, 65, 3)
    bounds = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, device=device)
    draw = torch.Generator(device).manual_seed(0)  # not the training's

    def random(count: int) -> Tensor:
        shape = sum(lengths), count, width
        return torch.randn(shape, generator=draw, dtype=dtype, device=device)

    given = random(heads), random(key_heads), random(key_heads)
    back, both = random(heads), (bounds, lengths, width**-0.5)
    results = []
    for module in (hopper, None):
        out, sums = _output(module, *given, *both)
        results.append((out, *_gradients(module, *given, out, sums, back, *both)))
    pairs = [(one.float(), other.float()) for one, other in zip(*results, strict=True)]
    return float(torch.stack([(one - other).norm() / other.norm() for one, other in pairs]).max())


def _tiles(lengths: Sequence[int], size: int) -> int:
    return sum(cdiv(length, size) for length in lengths)


def attend_causally(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, lengths: Sequence[int], scale: float
) -> Tensor:
    """Attend every token to itself and those before it in its sample: [T, heads, width], like q; has a gradient.

    k and v are [T, kv_heads, width], heads a multiple of kv_heads, all in half precision on CUDA. `bounds` [N + 1]
    int32 on the device and `lengths`, the same for the host. `scale` multiplies the scores. The width is a power of two
    from 16 on.

    Raises:
        RuntimeError: `bounds` and `lengths` are of different numbers of samples.
    """
    if len(lengths) + 1 != len(bounds):
        raise RuntimeError(f"attention: {len(bounds) - 1} samples on the device, {len(lengths)} for the host")
    return cast(Tensor, _Attention.apply(q, k, v, bounds, lengths, scale))
