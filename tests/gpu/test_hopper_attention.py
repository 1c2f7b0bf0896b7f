"""Hopper's attention kernels against the loop over samples and images in fp32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer.data.packing import cumulative
from trainer.model.attention import Segments, attend
from trainer.model.text_attention import attend_causally, hopper_kernels

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs an H100 or H200")]


def random(*shape: int, seed: int) -> Tensor:
    draw = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=draw, device="cuda", dtype=torch.bfloat16)


def segments_of(*lengths: int) -> Segments:
    return Segments(cumulative(lengths).cuda(), lengths)


@pytest.mark.parametrize("queries", [64, 128])
@pytest.mark.parametrize("lengths", [(1,), (64, 128), (37, 129, 1, 200, 2304, 63, 65, 640)])
def test_the_tower_attends_within_every_image_as_the_loop_does_and_repeats_to_the_bit(
    lengths: tuple[int, ...], queries: int
) -> None:
    """v is a view of what one product wrote, as in the tower."""
    from trainer.model.hopper_tower_attention import attend_images_on_hopper

    segments, patches = segments_of(*lengths), sum(lengths)
    q, k = random(patches, 16, 80, seed=0), random(patches, 16, 80, seed=1)
    v = random(patches, 3, 16, 80, seed=2)[:, 2]

    def run() -> Tensor:
        return attend_images_on_hopper(q, k, v, segments.cu_seqlens, lengths, 80**-0.5, queries)

    expected = attend(q.float(), k.float(), v.float(), segments, False, 80**-0.5)
    assert (run().float() - expected).norm() < 5e-3 * expected.norm()
    assert torch.equal(run(), run())


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 2), (14, 2), (32, 8)])
@pytest.mark.parametrize("lengths", [(1,), (64, 128), (37, 129, 1, 200, 1023, 63, 65, 640, 816, 3)])
def test_text_attends_and_passes_gradients_back_as_the_loop_does_and_repeats_to_the_bit(
    lengths: tuple[int, ...], heads: int, key_heads: int
) -> None:
    segments, tokens = segments_of(*lengths), sum(lengths)
    device = segments.cu_seqlens.device
    assert hopper_kernels(device, torch.bfloat16, 128, heads, key_heads)  # else others would compute below
    leaves = [
        random(tokens, count, 128, seed=seed) for seed, count in enumerate((heads, key_heads, key_heads))
    ]
    back, scale = random(tokens, heads, 128, seed=9), 128**-0.5

    def run(attention: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        given = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        output = attention(*given)
        return [output.detach(), *torch.autograd.grad(output, given, back.to(dtype))]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_causally(q, k, v, segments.cu_seqlens, lengths, scale)

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, segments, True, scale)

    for found, expected in zip(run(ours, torch.bfloat16), run(loop, torch.float32), strict=True):
        assert (found.float() - expected).norm() < 1e-2 * expected.norm() + 1e-3
    assert all(map(torch.equal, run(ours, torch.bfloat16), run(ours, torch.bfloat16)))
