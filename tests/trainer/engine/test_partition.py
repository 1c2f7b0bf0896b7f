"""Where ZeRO's shards hold a parameter: all of it, once, for every world size and every odd number of elements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from launch.errors import RunError
from trainer.engine.partition import piece_of_flat, piece_of_own
from trainer.engine.zero import Zero, _gather, _rows_of_shards
from trainer.formats.key_names import ADAM_STATE_KEYS

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=8)
WORLDS = st.integers(1, 5)


@given(SIZES, WORLDS, st.integers(0, 7))
def test_the_shards_of_a_row_hold_every_parameter_once(sizes: list[int], world: int, padding: int) -> None:
    """ZeRO-1 and 2: parameters end to end, the row padded and cut into equal shards."""
    share = math.ceil((sum(sizes) + padding) / world)
    row = [(number, place) for number, size in enumerate(sizes) for place in range(size)]
    shards = [row[rank * share : (rank + 1) * share] for rank in range(world)]
    offset = 0
    for number, size in enumerate(sizes):
        found: list[tuple[int, int]] = []
        for rank in range(world):
            piece = piece_of_flat(offset, size, rank * share, share)
            held = shards[rank][piece.at : piece.at + piece.count]
            assert held == [(number, place) for place in range(piece.begin, piece.begin + piece.count)]
            found += held
        assert found == [(number, place) for place in range(size)]
        offset += size


@given(SIZES, WORLDS)
def test_the_shares_of_each_parameter_hold_it_once(sizes: list[int], world: int) -> None:
    """ZeRO-3: each cut by itself, the last shares padded or empty, one after another in a process's shard."""
    for rank in range(world):
        at = 0
        for size in sizes:
            share = math.ceil(size / world)
            piece = piece_of_own(size, rank, share, at)
            assert at <= piece.at <= piece.at + piece.count <= at + share
            assert (piece.begin, piece.count) == (
                min(rank * share, size),
                max(0, min(share, size - rank * share)),
            )
            at += share
    for size in sizes:
        share = math.ceil(size / world)
        pieces = [piece_of_own(size, rank, share, 0) for rank in range(world)]
        held = [place for piece in pieces for place in range(piece.begin, piece.begin + piece.count)]
        assert held == list(range(size))


class _Ranks:
    """The processes of one world, one after another: what each adds to a reduction lies in `sums`."""

    def __init__(self, patch: pytest.MonkeyPatch, world: int) -> None:
        self.world, self.rank, self._number = world, 0, 0
        self.sums: list[Tensor] = []
        patch.setattr("torch.distributed.get_rank", lambda: self.rank)
        patch.setattr("torch.distributed.get_world_size", lambda: world)
        patch.setattr("torch.distributed.reduce", self._reduce)

    def become(self, rank: int) -> None:
        self.rank, self._number = rank, 0

    def _reduce(self, row: Tensor, dst: int) -> None:
        """Rank 0, which comes last, gets the sum."""
        if self._number == len(self.sums):
            self.sums.append(torch.zeros_like(row))
        self.sums[self._number] += row
        row.copy_(self.sums[self._number])
        self._number += 1


def _engine(stage: int, sizes: list[int], rank: int, world: int) -> tuple[Zero, Any]:
    """DeepSpeed's shards of parameters of ones, numbered from 0, as far as `Zero` looks at them."""
    parameters = {f"p{number}": nn.Parameter(torch.ones(size)) for number, size in enumerate(sizes)}
    inner = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    inner.state.clear()
    shares = [math.ceil(size / world) for size in sizes]
    optimizer: dict[str, Any] = {"optimizer": inner}
    if stage == 2:
        share = math.ceil(sum(sizes) / world)
        backwards = list(parameters.values())[::-1]  # round robin keeps no order of ours
        offsets = [sum(parameter.numel() for parameter in backwards[:n]) for n in range(len(sizes))]
        optimizer |= {
            "single_partition_of_fp32_groups": [nn.Parameter(torch.ones(share))],
            "round_robin_bit16_groups": [backwards],
            "round_robin_bit16_offsets": [offsets],
        }
    else:
        for parameter, share in zip(parameters.values(), shares, strict=True):
            parameter.ds_numel, parameter.ds_shape = parameter.numel(), parameter.shape  # type: ignore[attr-defined]
            parameter.partition_numel = lambda share=share: share  # type: ignore[attr-defined]
        optimizer |= {
            "fp32_partitioned_groups_flat": [nn.Parameter(torch.ones(sum(shares)))],
            "fp16_groups": [list(parameters.values())],
        }
    zero = Zero(parameters, stage)
    zero._engine = SimpleNamespace(optimizer=SimpleNamespace(**optimizer))
    return zero, inner


def _moments(sizes: list[int]) -> dict[str, Tensor]:
    """No element equals another."""
    count, found = 1, {}
    for number, size in enumerate(sizes):
        for key in ADAM_STATE_KEYS:
            found[f"p{number}.{key}"] = torch.arange(count, count + size, dtype=torch.float32)
            count += size
        found[f"p{number}.step"] = torch.tensor(7.0)
    return found


@pytest.mark.parametrize("stage", [2, 3])
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), world=st.integers(1, 4))
def test_moments_that_are_put_into_zeros_shards_before_the_first_step_come_out_of_them_whole(
    stage: int, sizes: list[int], world: int
) -> None:
    optimizer_state = _moments(sizes)
    with pytest.MonkeyPatch.context() as patch:
        ranks = _Ranks(patch, world)
        for rank in reversed(range(world)):
            ranks.become(rank)
            zero, inner = _engine(stage, sizes, rank, world)
            zero.load_optimizer_state(optimizer_state)
            # a second time it goes into the state that is there
            zero.load_optimizer_state(optimizer_state)
            _assert_nothing_but_moments(inner.state, optimizer_state)
            state = zero.full_state()
            assert (state is not None) == (rank == 0)
    assert state is not None
    assert state.optimizer.keys() == optimizer_state.keys()
    for name, expected in optimizer_state.items():
        assert torch.equal(state.optimizer[name], expected), name
    for number, size in enumerate(sizes):
        assert torch.equal(state.adapter[f"p{number}"], torch.ones(size))


def _assert_nothing_but_moments(states: Mapping[Any, Any], optimizer_state: Mapping[str, Tensor]) -> None:
    """A shard's padding stays zero, and no rank holds a moment that is none."""
    known = {
        value for name, tensor in optimizer_state.items() if "step" not in name for value in tensor.tolist()
    }
    for state in states.values():
        held = [value for key in ADAM_STATE_KEYS for value in state[key].tolist() if value]
        assert len(held) == len(set(held))
        assert set(held) <= known


def test_a_gradient_that_comes_after_the_reduction_ends_the_run_before_its_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _Ranks(monkeypatch, 1).become(0)
    monkeypatch.setattr("trainer.engine.zero.run_on_all_ranks", lambda action: action())
    zero, _ = _engine(3, [2, 3], rank=0, world=1)
    steps: list[str] = []
    engine = type("Engine", (), {"step": lambda _: steps.append("taken")})()
    zero._engine, engine.step = engine, zero._take_step
    zero.call_before_next_step(lambda: steps.append("looked at"))
    zero.parameters["p1"].grad = torch.ones(3)
    with pytest.raises(RunError, match="1 of 2 adapters got their gradients after DeepSpeed had"):
        engine.step()
    assert steps == []
    zero.parameters["p1"].grad = None
    zero.call_before_next_step(lambda: steps.append("looked at"))
    engine.step()
    engine.step()
    assert steps == ["looked at", "taken", "taken"]


def test_a_step_is_taken_after_its_sums_were_looked_at_and_not_if_they_forbid_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _Ranks(monkeypatch, 1).become(0)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values: values.mul_(2))
    zero, _ = _engine(3, [2, 3], rank=0, world=1)
    steps: list[Any] = []
    engine = type("Engine", (), {"step": lambda _: steps.append("taken")})()
    zero._engine, engine.step = engine, zero._take_step
    zero.all_reduce_before_step(torch.tensor([1.0, 3.0]), steps.append)
    assert steps == []
    engine.step()
    assert steps == [[2.0, 6.0], "taken"]

    def forbid(_: list[float]) -> None:
        raise RunError("not finite")

    zero.all_reduce_before_step(torch.tensor([1.0]), forbid)
    with pytest.raises(RunError, match="not finite"):
        engine.step()
    assert steps == [[2.0, 6.0], "taken"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_adapters_are_put_together_out_of_the_shards_of_all_ranks(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [5, 2, 7, 1]
    whole = [torch.arange(size, dtype=torch.float32) + 10 * number for number, size in enumerate(sizes)]
    shards = []
    for rank in range(world):
        shares = [-(-size // world) for size in sizes]
        parts = [
            nn.functional.pad(values[rank * share : (rank + 1) * share], (0, share), value=-1.0)[:share]
            for values, share in zip(whole, shares, strict=True)
        ]
        shards.append(torch.cat(parts))
    _Ranks(monkeypatch, world)
    monkeypatch.setattr(
        "torch.distributed.all_gather_into_tensor", lambda out, _: out.copy_(torch.cat(shards))
    )
    zero, _ = _engine(3, sizes, rank=0, world=world)
    optimizer = zero._engine.optimizer
    optimizer.fp16_partitioned_groups_flat = [shards[0]]
    (row,) = _rows_of_shards(optimizer)
    _gather(shards[0], optimizer.fp16_groups[0], row)
    for parameter, expected in zip(zero.parameters.values(), whole, strict=True):
        assert torch.equal(parameter.data, expected)
