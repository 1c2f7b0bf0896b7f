"""A shared prefix in Triton's kernels against PyTorch's own: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.compiling import compile_without_a_card
from trainer.model.attention import SharedPrefix
from trainer.model.prefix_kernels import turn_whole

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PREFIX, OWN = 5, (7, 3, 9)
"""The second sample does not begin with the prefix."""
SHARING = (0, 2)


def _shared() -> SharedPrefix:
    whole = [PREFIX + OWN[0], OWN[1], PREFIX + OWN[2]]
    starts = [0, whole[0], whole[0] + whole[1]]
    prefix = torch.arange(PREFIX)
    places = torch.cat(
        [
            prefix,
            *(
                torch.arange(start + (PREFIX if number in SHARING else 0), start + length)
                for number, (start, length) in enumerate(zip(starts, whole, strict=True))
            ),
        ]
    )
    rows = torch.empty(sum(whole), dtype=torch.int64)
    rows[places] = torch.arange(len(places))
    for number in SHARING:
        rows[starts[number] + prefix] = prefix
    of_sharing = torch.tensor([starts[number] for number in SHARING])
    return SharedPrefix(rows.to(DEVICE), places.to(DEVICE), of_sharing.to(DEVICE), PREFIX)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[0][:, None] + torch.cat((-second, first), dim=-1) * sin[0][:, None]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(6, 2, 16), (3, 3, 12), (1, 1, 4)])
def test_whole_samples_and_their_gradients_are_pytorchs(
    heads: int, key_heads: int, width: int, by_head: bool
) -> None:
    """`by_head`: queries and keys as the norms of Qwen3-VL leave them."""
    shared = _shared()
    tokens = PREFIX + sum(OWN)
    counts = (heads, key_heads, key_heads)
    given = [
        _random(1, tokens, count * width, seed=seed).requires_grad_() for seed, count in enumerate(counts)
    ]
    angles = _random(1, tokens, width // 2, seed=9)
    cos, sin = (torch.cat((each, each), dim=-1) for each in (angles.cos(), angles.sin()))
    query, key = (each.view(1, tokens, -1, width) if by_head else each for each in given[:2])
    found = turn_whole(query, key, given[2], cos, sin, width, shared)
    q, k, v = (each[0].view(tokens, -1, width) for each in given)
    expected = [shared.whole(each) for each in (_turn(q, cos, sin), _turn(k, cos, sin), v)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    back = [_random(*each.shape, seed=seed) for seed, each in enumerate(found)]
    back[0] = (
        shared.once(back[0]).new_zeros(back[0].shape).index_copy_(0, shared.places, shared.once(back[0]))
    )
    of_found = torch.autograd.grad(found, given, back)
    for one, other in zip(of_found, torch.autograd.grad(expected, given, back), strict=True):
        torch.testing.assert_close(one, other)


def test_the_gradient_of_a_prefix_is_the_sum_over_its_samples() -> None:
    shared = _shared()
    x = _random(PREFIX + sum(OWN), 3, seed=0).requires_grad_()
    back = _random(len(shared.rows), 3, seed=1)
    (found,) = torch.autograd.grad(shared.whole(x), x, back)
    (expected,) = torch.autograd.grad(x[shared.rows], x, back)
    torch.testing.assert_close(found, expected)
    (once,) = torch.autograd.grad(shared.once(back.requires_grad_()), back, found)
    assert torch.equal(once[shared.places], found)
    assert int(once.ne(0).any(1).sum()) == len(x)


def test_the_kernels_compile_for_the_heads_of_the_7b_shape(tmp_path: Path) -> None:
    program = """
def report(kernel, compiled):
    print(kernel.__name__, compiled.metadata.shared)

import torch
from tests.trainer.model.test_prefix_kernels import PREFIX, OWN, _shared
from trainer.model.prefix_kernels import turn_whole

tokens = PREFIX + sum(OWN)
given = [torch.zeros(1, tokens, heads * 128, dtype=torch.bfloat16, requires_grad=True) for heads in (28, 4, 4)]
angles = [torch.zeros(1, tokens, 128, dtype=torch.bfloat16) for _ in range(2)]
whole = turn_whole(*given, *angles, 128, _shared())
sum(each.float().sum() for each in whole).backward()
"""
    words = compile_without_a_card(program, tmp_path)
    assert words[::2] == ["_whole", "_whole_gradient"]
    assert all(int(used) <= 48 << 10 for used in words[1::2])
