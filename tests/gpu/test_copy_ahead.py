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
    copying = tower_ahead._copying(DEVICE)
    copied = copy_ahead(pinned(1.0), DEVICE)
    torch.cuda.synchronize()
    place = copied["pixel_values"].data_ptr()
    del copied
    with torch.cuda.stream(copying):
        torch.cuda._sleep(BUSY)
    late = copy_ahead(pinned(2.0), DEVICE)["pixel_values"]
    assert late.data_ptr() == place  # whoever does not wait sees the ones
    read = late.clone()
    assert not copying.query()
    assert torch.equal(read.cpu(), torch.full((VALUES,), 2.0))


def test_a_copy_runs_beside_what_computes_and_not_over_what_it_has_yet_to_read() -> None:
    torch.cuda.synchronize()
    computing = torch.cuda.current_stream(DEVICE)
    first = copy_ahead(pinned(1.0), DEVICE)
    torch.cuda._sleep(BUSY)
    read = first["pixel_values"].clone()
    place = first["pixel_values"].data_ptr()
    del first  # as the pixels are, once the tower is launched
    second = copy_ahead(pinned(2.0), DEVICE)
    tower_ahead._copying(DEVICE).synchronize()
    assert not computing.query()  # the second copy was made while the first was not read yet
    assert second["pixel_values"].data_ptr() != place
    assert torch.equal(read.cpu(), torch.full((VALUES,), 1.0))
    assert torch.equal(second["pixel_values"].cpu(), torch.full((VALUES,), 2.0))
