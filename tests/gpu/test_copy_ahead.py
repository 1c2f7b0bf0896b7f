"""Micro-batches that are copied to the GPU while it computes: whoever reads the copies reads them whole."""

from __future__ import annotations

import pytest
import torch

from trainer.loop import tower_ahead
from trainer.loop.tower_ahead import copy_ahead

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICE = torch.device("cuda", 0)
BUSY = 400_000_000  # clock cycles, some 0.2 s
VALUES = 8_000_000


def pinned(value: float) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.full((VALUES,), value).pin_memory()}


def test_the_gpu_waits_for_a_copy_that_is_late() -> None:
    copying, ones, twos = tower_ahead._copying(DEVICE), pinned(1.0), pinned(2.0)
    copied = copy_ahead(ones, DEVICE)
    torch.cuda.synchronize()
    place = copied["pixel_values"].data_ptr()
    del copied
    torch.cuda.synchronize()
    with torch.cuda.stream(copying):
        torch.cuda._sleep(BUSY)
    late = copy_ahead(twos, DEVICE)["pixel_values"]
    assert late.data_ptr() == place  # whoever does not wait sees the ones
    read = late.clone()
    assert not copying.query()
    assert torch.equal(read.cpu(), twos["pixel_values"])


def test_a_copy_runs_beside_what_computes_and_not_over_what_it_has_yet_to_read() -> None:
    computing, ones, twos = torch.cuda.current_stream(DEVICE), pinned(1.0), pinned(2.0)
    both = [copy_ahead(each, DEVICE) for each in (ones, twos)]  # so that there is memory for two
    torch.cuda.synchronize()
    del both
    torch.cuda.synchronize()
    first = copy_ahead(ones, DEVICE)
    place = first["pixel_values"].data_ptr()
    torch.cuda._sleep(BUSY)
    read = first["pixel_values"].clone()
    del first  # as the pixels are, once the tower is launched
    second = copy_ahead(twos, DEVICE)["pixel_values"]
    tower_ahead._copying(DEVICE).synchronize()
    assert not computing.query()  # the second copy was made while the first was not read yet
    assert second.data_ptr() != place
    assert torch.equal(read.cpu(), ones["pixel_values"])
    assert torch.equal(second.cpu(), twos["pixel_values"])
