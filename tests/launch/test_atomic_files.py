"""Whole or absent, with the modes of the folder around it; and what is said when there is no writing."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from launch.atomic_files import atomic_dir, atomic_write, follow_umask, place_of
from launch.checkpoints.publish import partial_folder, publish
from launch.checkpoints.rotation import rotate_checkpoints
from launch.checkpoints.scan import newest_valid
from launch.run.directory import RunDirectory, make_folder, request_stop, write_marker
from launch.run.lock import hold_lock
from trainer.export.output_folder import atomic_output

ROOT = os.geteuid() == 0
USERS = (54321, 54322) if ROOT else (os.geteuid(), os.geteuid())
GROUP = 54320 if ROOT else os.getegid()
TENSORS = {"a": np.zeros(4, np.float32)}


@pytest.fixture
def shared() -> Iterator[Path]:
    """A group's folder: setgid, no right for anybody else; below /tmp because pytest's folders are 0700."""
    folder = Path(tempfile.mkdtemp(prefix="samestep-"))
    os.chown(folder, -1, GROUP)
    folder.chmod(0o2770)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _write_a_run(run: RunDirectory) -> None:
    with hold_lock(run.path.parent, f".{run.name}.lock"):
        make_folder(run)
        with hold_lock(run.path):
            aside = partial_folder(run.path, 3)
            (aside / "shards").mkdir(parents=True)
            save_file(TENSORS, aside / "adapter_model.safetensors")
            save_file(TENSORS, aside / "shards" / "a.safetensors")
            publish(aside, run.checkpoint(3), {"step": 3})
            with atomic_dir(run.adapter) as folder:
                save_file(TENSORS, folder / "adapter_model.safetensors")
            with atomic_output(run.merged) as folder:
                save_file(TENSORS, folder / "model.safetensors")
            run.metrics_file.write_text("{}\n")


def _go_on_with_it(run: RunDirectory) -> None:
    for path in run.path.rglob("*"):
        assert path.is_dir() or path.read_bytes() is not None
    with hold_lock(run.path.parent, f".{run.name}.lock"), hold_lock(run.path):
        newest, _ = newest_valid(run.path)
        assert newest is not None
        for step in (newest.step + 3, newest.step + 6):
            partial_folder(run.path, step).mkdir()
            publish(partial_folder(run.path, step), run.checkpoint(step), {"step": step})
        rotate_checkpoints(run.path, 2)
        write_marker(run, "DONE", "step 9")
        with run.metrics_file.open("a") as file:
            file.write("{}\n")
        atomic_write(run.metrics_file, "{}\n")
        run.merged.rename(run.path / "merged.old")
        with atomic_output(run.merged):
            pass


def _as_user(user: int, act: Callable[[RunDirectory], None], run: RunDirectory) -> None:
    """In a child that has forked: where root's folders are closed, another user cannot start Python."""
    child = os.fork()
    if child == 0:
        try:
            if ROOT:
                os.setgroups([GROUP])
                os.setgid(GROUP)
                os.setuid(user)
            os.umask(0o002)
            act(run)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_second_user_of_a_group_reads_locks_and_goes_on_with_what_the_first_has_written(
    shared: Path,
) -> None:
    run = RunDirectory(shared / "runs" / "mine")
    (shared / "runs").mkdir()
    (shared / "runs").chmod(0o2775)
    _as_user(USERS[0], _write_a_run, run)
    for path in (run.path, *run.path.rglob("*"), run.path.parent / ".mine.lock"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o2775 if path.is_dir() else 0o664), f"{path} {mode:o}"
        assert path.stat().st_gid == GROUP, path
    _as_user(USERS[1], _go_on_with_it, run)
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-6", "checkpoint-9"]
    assert (run.path / "DONE").stat().st_uid == USERS[1]


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755)])
def test_modes_follow_the_umask(umask: int, file: int, folder: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with atomic_dir(tmp_path / "adapter") as aside:
            save_file(TENSORS, aside / "a.safetensors")
            (aside / "b").touch()
            (aside / "b").chmod(0o666)
        atomic_write(tmp_path / "plan.json", "{}")
        with hold_lock(tmp_path):
            pass
    finally:
        os.umask(before)
    found = {
        path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")
    }
    files = ("adapter/a.safetensors", "adapter/b", "plan.json", ".lock")
    assert found == {"adapter": folder, **dict.fromkeys(files, file)}


def _as_small_folder(tmp_path: Path) -> Path:
    with atomic_dir(tmp_path / "adapter") as folder:
        _two_files(folder)
    return tmp_path / "adapter"


def _as_checkpoint(tmp_path: Path) -> Path:
    _two_files(partial_folder(tmp_path, 3))
    publish(partial_folder(tmp_path, 3), tmp_path / "checkpoint-3", {"step": 3})
    return tmp_path / "checkpoint-3"


def _as_large_folder(tmp_path: Path) -> Path:
    with atomic_output(tmp_path / "merged") as folder:
        _two_files(folder)
    return tmp_path / "merged"


def _two_files(folder: Path) -> None:
    (folder / "shards").mkdir(parents=True)
    for name in ("config.json", "shards/weights"):
        (folder / name).write_text("{}")


@pytest.mark.parametrize("publish_folder", [_as_small_folder, _as_checkpoint, _as_large_folder])
def test_a_folder_is_on_the_disk_before_it_gets_its_name_and_the_name_is_after_it(
    publish_folder: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[int | str] = []
    flush, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        "os.fsync", lambda descriptor: (events.append(os.fstat(descriptor).st_ino), flush(descriptor))
    )
    monkeypatch.setattr(Path, "rename", lambda old, new: (events.append("rename"), rename(old, new))[1])
    folder = publish_folder(tmp_path)
    before, after = events[: events.index("rename")], events[events.index("rename") :]
    assert {path.stat().st_ino for path in (folder, *folder.rglob("*"))} <= {*before}
    assert tmp_path.stat().st_ino in after


def test_a_disk_that_changes_no_modes_keeps_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(Path, "chmod", refuse)
    with atomic_dir(tmp_path / "adapter") as aside:
        (aside / "weights").touch(mode=0o600)
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["weights"]


def test_the_mode_of_a_link_s_target_elsewhere_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "secret").touch(mode=0o600)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "secret")
    follow_umask(tmp_path / "folder")
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_a_file_that_finds_no_room_stays_as_it_was_and_is_named_with_its_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "plan.json"
    atomic_write(file, "old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        atomic_write(file, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("plan.json", "old")]
    said = place_of(caught.value, "a file")
    assert said.startswith(f"{file}: No space left on device (disk at /")
    assert said.endswith(" MB free)")
    assert place_of(OSError(errno.ENOSPC, "No space"), "a file") == "a file: No space"


ON_A_FULL_DISK = """
import sys
from pathlib import Path
import pytest
from tests.helpers.launcher import EMBEDDED, samestep, stand_in

patch = pytest.MonkeyPatch()
launcher = stand_in(patch, Path(sys.argv[1]))
patch.setattr("launch.local.planned_run.NEEDED_BYTES", 0)  # it is another program that takes the room meanwhile
status = samestep("run", *EMBEDDED, "--name", "mine")
assert not launcher.commands
assert not (Path(sys.argv[1]) / "runs" / "mine").exists()
assert samestep("status") == 0
sys.exit(status)
"""


@pytest.mark.parametrize("room", ["4k", "8k", "12k"])  # for one lock, two, and the plan: a page each
def test_a_disk_that_is_full_at_the_start_is_named_and_no_run_is_left(room: str, tmp_path: Path) -> None:
    script = f'mount -t tmpfs -o size={room} tmpfs {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    space = ["unshare", "--mount", *([] if ROOT else ["--map-root-user"]), "sh", "-c", script]
    done = subprocess.run(
        [*space, ON_A_FULL_DISK], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{tmp_path}/runs/")
    assert f": No space left on device (disk at {tmp_path}, 0 of 0 MB free); make room" in line
    assert "no runs yet" in done.stdout


ON_A_READ_ONLY_DISK = """
import sys
from pathlib import Path
import pytest
from tests.helpers.launcher import EMBEDDED, samestep, stand_in

patch = pytest.MonkeyPatch()
launcher = stand_in(patch, Path(sys.argv[1]))
assert samestep("evaluate", "embedded", "--models", "base") == 2
assert samestep("run", *EMBEDDED, "--allow", "training.max_steps", "--set", "training.max_steps=9") == 2
assert samestep("run", *EMBEDDED, "--name", "other") == 2
assert samestep("run", *EMBEDDED, "--dry-run") == 2
assert not launcher.commands
"""


def test_a_read_only_disk_is_asked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers.launcher import EMBEDDED, samestep, stand_in

    stand_in(monkeypatch, tmp_path).saves = (3, 6)
    assert samestep("run", *EMBEDDED) == 0
    before = sorted(tmp_path.rglob("*"))
    script = (
        f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path} && "
        f'exec {sys.executable} -c "$0" {tmp_path}'
    )
    space = ["unshare", "--mount", *([] if ROOT else ["--map-root-user"]), "sh", "-c", script]
    done = subprocess.run(
        [*space, ON_A_READ_ONLY_DISK],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    evaluate, *runs = done.stderr.splitlines()
    run = tmp_path / "runs" / "embedded"
    assert evaluate == (
        f"{run}: Read-only file system; the evaluation would be written there: make it writable, or work on a copy"
    )
    assert len(runs) == 3
    assert all("cannot be written; give permission, or choose another --runs-dir" in line for line in runs)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_the_trainer_refuses_of_a_new_run_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.helpers.launcher import EMBEDDED, samestep, stand_in

    launcher = stand_in(monkeypatch, tmp_path)
    launcher.saves = (3, 6)
    run = RunDirectory(tmp_path / "runs" / "embedded")
    assert samestep("run", *EMBEDDED) == 0
    launcher.saves, launcher.marker, launcher.text = (), "REFUSED", "model.name_or_path: no such thing"
    assert samestep("run", *EMBEDDED, "--name", "other") == 2
    assert not (tmp_path / "runs" / "other").exists()
    assert samestep("run", *EMBEDDED, "--fresh") == 2  # the older run has its name again
    assert [path.name for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")] == [
        "embedded"
    ]
    assert newest_valid(run.path)[0] is not None


def test_what_was_there_before_stays_when_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.helpers.launcher import EMBEDDED, samestep, stand_in

    launcher = stand_in(monkeypatch, tmp_path)
    launcher.marker, launcher.text = "REFUSED", "no"
    run = RunDirectory(tmp_path / "runs" / "embedded")
    assert make_folder(run)
    assert not make_folder(run)
    request_stop(run, "user")
    write_marker(run, "STOPPED", "user")
    assert samestep("run", *EMBEDDED) == 2
    assert run.plan_file.exists()


def test_a_new_run_that_has_taken_steps_stays_when_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.helpers.launcher import EMBEDDED, samestep, stand_in

    launcher = stand_in(monkeypatch, tmp_path)
    launcher.marker, launcher.text = "REFUSED", "another rank wrote to another disk"
    launcher.meanwhile = lambda run, _: run.metrics_file.write_text('{"step": 1}\n')
    assert samestep("run", *EMBEDDED) == 2
    assert (tmp_path / "runs" / "embedded" / "metrics.jsonl").exists()
