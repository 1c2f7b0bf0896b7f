"""Fingerprints of tensors and modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from launch.audit.deep import relative_difference
from trainer.audit.fingerprint import Recorder
from trainer.checks.fingerprint import fingerprint


@pytest.mark.parametrize("share", [1e-6, 1e-3, 0.3])
def test_the_difference_of_two_tensors_is_told_from_their_fingerprints(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(1, 700, 96, generator=generator) for _ in range(2))
    other = x + share * noise
    told = relative_difference(fingerprint(x), fingerprint(other))
    assert share / 4 < told < share * 4
    assert relative_difference(fingerprint(x), fingerprint(x.clone())) == 0
    # Values in another order have the same norm and are seen all the same.
    assert relative_difference(fingerprint(x), fingerprint(x.flip(1))) > 0.3


def test_the_first_module_that_computes_otherwise_comes_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    seen = []
    for change in (0.0, 0.5):
        with torch.no_grad():
            model[2].weight[0, 0] += change
        recorder = Recorder(model)
        model(torch.ones(4, 8)).sum().backward()
        recorder.remove()
        seen.append(recorder)
    before, after = seen
    assert list(before.outputs) == ["0", "1", "2"]
    assert [name for name in before.outputs if before.outputs[name] != after.outputs[name]] == ["2"]
    assert before.gradients.keys() == {"0", "1", "2"}
    assert before.gradients["0"] != after.gradients["0"]
