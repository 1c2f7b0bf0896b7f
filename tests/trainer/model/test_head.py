"""The output head on scored tokens against torch's own log-softmax."""

from __future__ import annotations

import pytest
import torch

from trainer.model import head


@pytest.mark.parametrize("scored", [0, 1, 7, 8])
def test_log_probabilities_and_gradients_are_torchs(scored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_TOKENS", 4)  # several chunks, the last one short
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 16, generator=draw)
    labels = torch.randint(50, (scored,), generator=draw)
    mine = torch.randn(scored, 16, generator=draw).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    factors = torch.randn(scored, generator=draw)
    found = head._LogProbs.apply(mine, weight, labels)
    expected = torch.log_softmax(theirs @ weight.t(), -1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found, expected)
    (found * factors).sum().backward()
    (expected * factors).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
