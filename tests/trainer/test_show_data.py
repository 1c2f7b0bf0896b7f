"""`samestep data`, as its process ends."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from trainer import show_data


def test_a_full_disk_below_what_is_printed_ends_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def print_to_a_full_disk(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    closed: list[int] = []
    monkeypatch.setattr(show_data, "setup_logging", lambda: None)
    monkeypatch.setattr(show_data, "prepare", lambda _: None)
    monkeypatch.setattr(show_data, "show_data", print_to_a_full_disk)
    monkeypatch.setattr(show_data, "write_to_nowhere", closed.append)
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "embedded.yaml"
    assert show_data.main([str(recipe)]) == 1
    assert closed == [sys.stdout.fileno()]
    assert "error: standard output: No space left on device; make room" in capfd.readouterr().err
