"""The time to the first step, by its parts."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import psutil
import pytest

from launch.subprocesses import STARTED
from trainer.startup_timer import StartupTimer


def test_the_parts_add_up_in_the_order_of_time() -> None:
    timer = StartupTimer(100.0)
    for part, now in (
        ("imports", 106.5),
        ("trial", 106.5),
        ("base", 108.0),
        ("step", 109.0),
        ("base", 110.0),
    ):
        timer.record(part, now)
    assert timer.seconds() == {"total": 10.0, "imports": 6.5, "base": 2.5, "step": 1.0}
    assert timer.summary() == "first step after 10.0 s: imports 6.5, base 2.5, step 1.0"


def test_a_launcher_of_ours_has_a_part_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    created = psutil.Process().create_time()
    monkeypatch.setenv(STARTED, str(created - 3))
    assert StartupTimer.of_this_process().seconds()["launcher"] == 3.0
    monkeypatch.delenv(STARTED)
    assert list(StartupTimer.of_this_process().seconds()) == ["total", "imports"]


def test_the_record_of_the_machine_keeps_them_beside_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "environment.json"
    timer = StartupTimer(1.0)
    timer.record("step", 3.0)
    timer.save(file, {"vision tower": "a kernel"})
    assert not file.exists()
    file.write_text('{"host": "here"}')
    timer.save(file, {"vision tower": "a kernel"})
    assert json.loads(file.read_text()) == {
        "host": "here",
        "first_step": {"total": 2.0, "step": 2.0},
        "kernels": {"vision tower": "a kernel"},
    }
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_leaves_the_record_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "environment.json"
    file.write_text('{"host": "here"}')

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    StartupTimer(1.0).save(file, {})
    assert file.read_text() == '{"host": "here"}'
    assert list(tmp_path.iterdir()) == [file]
