"""What is otherwise here than where a run was trained."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.audit import environment
from launch.audit.diff import Parting
from launch.audit.environment import altered_libraries, environment_changes
from launch.audit.replay import Replay
from launch.run.directory import RunDirectory

RECORDED = {"versions": {"torch": "2.11.0", "peft": "1"}, "device": "NVIDIA H200", "threads": 1, "host": "n1"}


def _run(folder: Path, **values: object) -> RunDirectory:
    folder.mkdir()
    (folder / "environment.json").write_text(json.dumps(RECORDED | values))
    return RunDirectory(folder)


def test_versions_and_hardware_that_differ_are_listed_and_hosts_are_not(tmp_path: Path) -> None:
    recorded = _run(tmp_path / "a")
    here = _run(tmp_path / "b", versions={"torch": "2.12.0", "peft": "1"}, device="x86_64", host="n2")
    changes = environment_changes(recorded, here)
    assert [str(change) for change in changes] == ["device NVIDIA H200 -> x86_64", "torch 2.11.0 -> 2.12.0"]
    first, second = ({"vision tower": f"kernel {number}"} for number in (1, 2))
    one, other = _run(tmp_path / "c", kernels=first), _run(tmp_path / "d", kernels=second)
    (change,) = environment_changes(one, other)
    assert str(change) == "attention of the vision tower: kernel 1 -> kernel 2"
    (tmp_path / "b" / "environment.json").write_text("[")
    assert environment_changes(recorded, here) == environment_changes(recorded, recorded) == ()


def test_a_library_file_that_is_not_as_its_wheel_brought_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "brought-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1\n")
    record = []
    for name in ("same.py", "changed.py", "gone.py", "words.txt"):
        (tmp_path / name).write_text(name)
        digest = base64.urlsafe_b64encode(hashlib.sha256(name.encode()).digest()).decode().rstrip("=")
        record.append(f"{name},sha256={digest},{len(name)}")
    (folder / "RECORD").write_text("\n".join([*record, "brought-1.dist-info/RECORD,,"]) + "\n")
    (tmp_path / "changed.py").write_text("other")
    (tmp_path / "words.txt").write_text("other")
    (tmp_path / "gone.py").unlink()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(environment, "PACKAGES", ("brought", "not-installed"))
    altered_libraries.cache_clear()
    assert altered_libraries() == ("brought: changed.py",)
    altered_libraries.cache_clear()


def test_a_replay_says_what_of_the_environment_differs() -> None:
    same = Replay(6, 7, "checkpoint-4", "single", 1, 1e-6, None, True, 0.0, (), ())
    assert list(same.notes()) == []
    change = environment.Change("torch", "2.11.0", "2.12.0")
    other = Replay(6, 7, "checkpoint-4", "single", 1, 1e-6, None, False, 1e-7, (change,), ("torch: a.py",))
    assert list(other.notes()) == [
        "environment, of the run's newest attempt -> here: torch 2.11.0 -> 2.12.0",
        "library not as it was installed: torch: a.py",
    ]
    part = Parting("loss", 6, 1.0, 1.1, 0.09, 1e-6)
    different = replace(same, parting=part, bitwise=False)
    assert "no library file was changed" in next(different.notes())
    assert list(different.notes(["model.weights"])) == [
        "allowed to be other data or another base: model.weights"
    ]
