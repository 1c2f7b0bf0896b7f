"""What the workers of `make test` are told about its files."""

from __future__ import annotations

from benchmarks.launching import ROOT
from tests.helpers.scheduling import SECONDS, TOGETHER


def test_every_file_that_is_given_a_place_in_the_queue_exists() -> None:
    named = {*SECONDS, *TOGETHER, *TOGETHER.values()}
    assert [file for file in sorted(named) if not (ROOT / file).is_file()] == []
