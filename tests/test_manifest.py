"""A checkpoint is there whole or not at all, damage is named, and rotation never takes the last good one."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.errors import CheckpointError
from launch.manifest import (
    MANIFEST,
    aside_folder,
    newest_published,
    publish,
    read_manifest,
    rotate,
)


def _write_aside(run_dir: Path, step: int) -> Path:
    aside = aside_folder(run_dir, step)
    (aside / "rank states").mkdir(parents=True)
    (aside / "adapter.safetensors").write_bytes(bytes([step % 256]) * 1000)
    (aside / "rank states" / "0.json").write_text(f'{{"step": {step}}}')
    return aside


def _published(run_dir: Path, step: int) -> Path:
    final = run_dir / f"checkpoint-{step}"
    publish(_write_aside(run_dir, step), final, {"step": step})
    return final


def _change_one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_published_checkpoint_is_read_back_with_its_facts_and_every_file(tmp_path: Path) -> None:
    final = _published(tmp_path, 20)
    manifest = read_manifest(final, verify=True)
    assert manifest["facts"] == {"step": 20}
    assert sorted(manifest["files"]) == ["adapter.safetensors", "rank states/0.json"]
    assert manifest["files"]["adapter.safetensors"]["bytes"] == 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-20"]


def test_the_newest_is_the_highest_step_not_the_last_in_the_alphabet_or_in_time(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        _published(tmp_path, step)
    assert newest_published(tmp_path) == tmp_path / "checkpoint-100"


def test_a_run_without_a_published_checkpoint_has_no_newest(tmp_path: Path) -> None:
    assert newest_published(tmp_path / "not there") is None
    _write_aside(tmp_path, 20)
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-40").write_text("a file")
    assert newest_published(tmp_path) is None


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "list", "file missing", "file short"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, damage: str) -> None:
    good, bad = _published(tmp_path, 20), _published(tmp_path, 40)
    manifest, adapter = bad / MANIFEST, bad / "adapter.safetensors"
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_text(manifest.read_text()[:40])
    elif damage == "list":
        manifest.write_text("[]")
    elif damage == "file missing":
        adapter.unlink()
    else:
        adapter.write_bytes(b"short")
    assert newest_published(tmp_path) == good
    with pytest.raises(CheckpointError, match="adapter.safetensors" if "file" in damage else MANIFEST):
        read_manifest(bad)


def test_every_damaged_file_is_named_at_once_with_its_sizes(tmp_path: Path) -> None:
    folder = _published(tmp_path, 20)
    (folder / "adapter.safetensors").write_bytes(b"short")
    (folder / "rank states" / "0.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        read_manifest(folder)
    assert "adapter.safetensors: has another size (5 bytes, 1,000 were published)" in str(caught.value)
    assert "0.json: is missing" in str(caught.value)


def test_a_changed_byte_of_the_same_size_is_found_by_verifying(tmp_path: Path) -> None:
    folder = _published(tmp_path, 20)
    _change_one_byte(folder / "adapter.safetensors")
    read_manifest(folder)
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors: has another content"):
        read_manifest(folder, verify=True)


class PowerCut(BaseException):
    """The machine went off."""


def _cut_power_after(calls: int, patch: pytest.MonkeyPatch) -> None:
    """Let all but the first `calls` calls that reach the disk, or rename, fail."""
    left = iter(range(calls))

    def mortal(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if next(left, None) is None:
                raise PowerCut
            return real(*arguments)

        return call

    patch.setattr(os, "fsync", mortal(os.fsync))
    patch.setattr(Path, "rename", mortal(Path.rename))
    patch.setattr(Path, "replace", mortal(Path.replace))


def test_a_crash_at_any_write_leaves_the_old_newest_or_the_whole_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for calls in range(12):
        run_dir = tmp_path / str(calls)
        old, new = _published(run_dir, 20), run_dir / "checkpoint-40"
        aside = _write_aside(run_dir, 40)
        with monkeypatch.context() as patch:
            _cut_power_after(calls, patch)
            with contextlib.suppress(PowerCut):
                publish(aside, new, {"step": 40})
        newest = newest_published(run_dir)
        assert newest in (old, new)
        assert newest is not None
        read_manifest(newest, verify=True)
        outcomes.append(newest == new)
    # Two files, the manifest and its name, two folders, the rename: seven calls must have happened.
    assert outcomes == [False] * 7 + [True] * 5


def test_publishing_replaces_a_damaged_checkpoint_but_never_a_sound_one(tmp_path: Path) -> None:
    folder = _published(tmp_path, 20)
    again = _write_aside(tmp_path, 20)
    with pytest.raises(CheckpointError, match="is published"):
        publish(again, folder, {"step": 20})
    (folder / "adapter.safetensors").unlink()
    publish(again, folder, {"step": 20, "again": True})
    assert read_manifest(folder, verify=True)["facts"] == {"step": 20, "again": True}


def test_rotation_keeps_the_newest_and_leaves_what_was_never_published(tmp_path: Path) -> None:
    for step in (100, 20, 40, 60):
        _published(tmp_path, step)
    (tmp_path / "checkpoint-60" / MANIFEST).unlink()
    _write_aside(tmp_path, 120)
    rotate(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-40",
        "checkpoint-60",
        "checkpoint-100",
        "checkpoint-120.partial",
    }
    rotate(tmp_path, keep=2)
    assert newest_published(tmp_path) == tmp_path / "checkpoint-100"


def test_rotation_removes_nothing_while_the_newest_is_damaged(tmp_path: Path) -> None:
    for step in (20, 40, 60):
        _published(tmp_path, step)
    _change_one_byte(tmp_path / "checkpoint-60" / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="another content"):
        rotate(tmp_path, keep=1)
    assert len(list(tmp_path.iterdir())) == 3
