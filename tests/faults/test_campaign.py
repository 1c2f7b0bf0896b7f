"""Random faults, one after the other: nothing lost, nothing hung, nothing done by hand. `make test-faults`."""

from __future__ import annotations

import os

import pytest

from tests.faults.campaign import campaign, troubles

pytestmark = [pytest.mark.long, pytest.mark.faults]


def test_every_fault_is_survived_by_the_same_command_again() -> None:
    faults = int(os.environ.get("FAULTS", "100"))
    results = campaign(int(os.environ.get("SEED", "1")), faults)
    assert sum(len(result.outcomes) for result in results) >= faults
    assert troubles(results) == []
