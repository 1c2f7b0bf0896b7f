"""Rotation never takes the last good checkpoints, and a crash anywhere leaves the old state or the new one."""

import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.checkpoints.manifest import MANIFEST
from launch.checkpoints.publish import partial_folder, publish
from launch.checkpoints.rotation import clear_unpublished, rotate_checkpoints
from launch.checkpoints.scan import newest_valid, scan_checkpoints
from launch.errors import CheckpointError
from tests.helpers.checkpoints import (
    ADAPTER,
    STATES,
    as_nobody,
    change_one_bit,
    halve,
    names,
    newest_step,
    published,
    write_aside,
)

# removing ---------------------------------------------------------------------------------


def test_rotation_keeps_the_newest_valid_and_leaves_what_is_damaged_or_was_never_published(
    tmp_path: Path,
) -> None:
    published(tmp_path, 10, 20, 30, 40, 60, 80, 100)
    (tmp_path / "checkpoint-20" / MANIFEST).unlink()
    change_one_bit(tmp_path / "checkpoint-80" / ADAPTER)
    (tmp_path / "checkpoint-60" / ADAPTER).unlink()
    write_aside(tmp_path, 40)
    write_aside(tmp_path, 120)
    rotate_checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == {
        "checkpoint-20",
        "checkpoint-40",
        "checkpoint-40.partial",
        "checkpoint-60",
        "checkpoint-80",
        "checkpoint-100",
        "checkpoint-120.partial",
    }


def test_rotation_removes_nothing_while_too_few_verify(tmp_path: Path) -> None:
    published(tmp_path, 20, 40, 60, 80)
    for step in (40, 60, 80):
        change_one_bit(tmp_path / f"checkpoint-{step}" / ADAPTER)
    rotate_checkpoints(tmp_path, keep=2)
    assert len(names(tmp_path)) == 4
    with pytest.raises(ValueError, match="keep 1: "):
        rotate_checkpoints(tmp_path, keep=1)


def test_what_claims_to_be_newer_than_the_one_just_published_does_not_push_it_out(tmp_path: Path) -> None:
    """It could not be read when the run was resumed before it, and can again."""
    published(tmp_path, 10, 20, 30, 40, 60)
    rotate_checkpoints(tmp_path, keep=2, newest=30)
    assert [found.step for found in scan_checkpoints(tmp_path)] == [20, 30, 40, 60]


def test_a_protected_checkpoint_stays_beside_the_newest_and_counts_for_none_of_them(tmp_path: Path) -> None:
    published(tmp_path, 10, 20, 30, 40, 50)
    rotate_checkpoints(tmp_path, keep=2, protected={20})
    assert names(tmp_path) == {"checkpoint-20", "checkpoint-40", "checkpoint-50"}
    rotate_checkpoints(tmp_path, keep=2, protected={50})  # the newest is the best: two others stay
    assert names(tmp_path) == {"checkpoint-20", "checkpoint-40", "checkpoint-50"}
    rotate_checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == {"checkpoint-40", "checkpoint-50"}


def test_a_file_that_cannot_be_removed_does_not_end_a_rotation_and_is_removed_by_the_next(
    tmp_path: Path,
) -> None:
    """A reader holding a file open on NFS makes the folder refuse to go."""
    published(tmp_path, 20, 40, 60)
    with mock.patch.object(os, "rmdir", side_effect=OSError(39, "Directory not empty")):
        for left in (3, 4):
            rotate_checkpoints(tmp_path, keep=2)
            assert [found.step for found in scan_checkpoints(tmp_path)] == [40, 60]
            assert len(names(tmp_path)) == left
            published(tmp_path, 20)  # the same step once more, and the same name
    rotate_checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == {"checkpoint-40", "checkpoint-60"}


def test_what_was_never_published_is_named_and_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(tmp_path, 20, 40)
    write_aside(tmp_path, 40)
    write_aside(tmp_path, 60)
    write_aside(tmp_path, 80).rename(tmp_path / "checkpoint-80.removed-0")
    newest, (passed_over,) = newest_valid(tmp_path)
    assert newest is not None
    assert newest.step == 40
    assert (passed_over.step, passed_over.published, passed_over.bytes) == (60, False, 1012)
    assert "checkpoint-60.partial: was never published (killed while it was" in passed_over.problems[0]
    (tmp_path / "checkpoint-60.partial").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-60.partial").symlink_to("elsewhere")
    cleared = clear_unpublished(tmp_path)
    assert cleared == [partial_folder(tmp_path, 40), partial_folder(tmp_path, 60)]
    assert names(tmp_path) == {"checkpoint-20", "checkpoint-40", "elsewhere"}
    assert names(tmp_path / "elsewhere") == {ADAPTER, "rank states"}
    write_aside(tmp_path, 80)
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o555)
    with as_nobody(), pytest.raises(CheckpointError, match=r"80.partial: .* \(Permission denied\); "):
        clear_unpublished(Path())
    tmp_path.chmod(0o755)


ACTIONS = st.one_of(
    st.tuples(st.just("publish"), st.integers(0, 1)),
    st.tuples(st.just("aside"), st.just(0)),
    st.tuples(st.sampled_from(["flip", "cut", "remove", "add", "unseal"]), st.integers(0, 5)),
    st.tuples(st.just("rotate"), st.integers(2, 4)),
    st.tuples(st.just("clear"), st.just(0)),
)


@settings(max_examples=60, deadline=None)
@given(actions=st.lists(ACTIONS, min_size=4, max_size=25))
def test_whatever_happens_the_newest_valid_and_a_second_one_stay(
    actions: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    step, sound, damaged = 0, set[int](), dict[int, bool]()  # damaged: step -> seen without reading content
    with mock.patch.object(os, "fsync", return_value=None):
        for action, number in actions:
            if action == "publish":
                # A new step, or a damaged one again: the run that passed it over came there once more.
                again = [damaged_step for damaged_step in damaged if damaged_step > max(sound, default=0)]
                step += 0 if again and number else 1
                new = min(again) if again and number else step
                shutil.rmtree(partial_folder(run, new), ignore_errors=True)
                published(run, new)
                sound.add(new)
                damaged.pop(new, None)
            elif action == "aside":
                step += 1  # the last step that was written, published or not
                write_aside(run, step)
            elif action == "clear":
                clear_unpublished(run)
            elif action == "rotate":
                before = set(sound)
                rotate_checkpoints(run, keep=number)
                left = {found.step for found in scan_checkpoints(run, verify=False) if found.published}
                sound = {*sorted(sound)[-number:]}
                assert left & before == sound
                assert {bad for bad, seen in damaged.items() if seen} <= left
                kept_from = min(sound) if len(before) >= number else 0
                assert {bad for bad in damaged if bad > kept_from} <= left
                damaged = {bad: seen for bad, seen in damaged.items() if bad in left}
            elif sound:
                victim = sorted(sound)[number % len(sound)]
                folder = run / f"checkpoint-{victim}"
                if action == "flip":
                    change_one_bit(folder / ADAPTER)
                elif action == "cut":
                    halve(folder / STATES)
                elif action == "remove":
                    (folder / ADAPTER).unlink()
                elif action == "add":
                    (folder / "notes").write_text("")
                else:
                    (folder / MANIFEST).unlink()
                sound.remove(victim)
                damaged[victim] = action != "flip"
            assert {found.step for found in scan_checkpoints(run) if found.valid} == sound
            assert newest_step(run) == max(sound, default=None)
    shutil.rmtree(run)


# crashes ----------------------------------------------------------------------------------

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")


def _dies_before(operation: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that is gone, as after `kill -9`, before its file operation of this number."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    try:
        left = iter(range(operation))

        def count() -> None:
            if next(left, None) is None:
                os._exit(9)

        sync = os.fsync
        os.fsync = lambda descriptor: (count(), sync(descriptor))[1]
        sys.addaudithook(lambda event, _: count() if event in FILE_EVENTS else None)
        action()
        os._exit(0)
    finally:
        os._exit(1)


def _states_after_every_crash(template: Path, action: Callable[[Path], object]) -> list[Path]:
    """The run as it lies there after a kill before every single file operation; the last one saw no kill."""
    states = []
    while True:
        run = template.with_name(f"{template.name}-{len(states)}")
        shutil.copytree(template, run)
        states.append(run)
        if not _dies_before(len(states) - 1, lambda run=run: action(run)):
            return states


def test_a_crash_at_any_operation_of_publish_leaves_the_old_newest_or_the_whole_new_one(
    tmp_path: Path,
) -> None:
    template = tmp_path / "run"
    published(template, 20)
    write_aside(template, 40)
    states = _states_after_every_crash(
        template, lambda run: publish(partial_folder(run, 40), run / "checkpoint-40", {"step": 40})
    )
    newest = [newest_step(run) for run in states]
    assert newest == sorted(newest)
    assert {*newest} == {20, 40}
    # Open and flush two files, the manifest and two folders, rename twice, then the run's folder.
    assert newest.count(20) >= 12
    for run in states[:-1]:
        had = clear_unpublished(run)
        assert bool(had) == (newest[states.index(run)] == 20)
        _, passed_over = newest_valid(run)
        assert passed_over == []


def test_a_crash_while_a_damaged_checkpoint_is_replaced_keeps_the_one_before(tmp_path: Path) -> None:
    template = tmp_path / "run"
    change_one_bit(published(template, 20, 40) / ADAPTER)
    write_aside(template, 40)
    states = _states_after_every_crash(
        template, lambda run: publish(partial_folder(run, 40), run / "checkpoint-40", {"step": 40})
    )
    newest = [newest_step(run) for run in states]
    assert newest == sorted(newest)
    assert {*newest} == {20, 40}
    for run in states:
        clear_unpublished(run)
        assert names(run) <= {"checkpoint-20", "checkpoint-40"}


def test_a_crash_at_any_operation_of_rotate_leaves_each_checkpoint_whole_or_none(tmp_path: Path) -> None:
    template = tmp_path / "run"
    published(template, 20, 40, 60, 80)
    states = _states_after_every_crash(template, lambda run: rotate_checkpoints(run, keep=2))
    left = [[found.step for found in scan_checkpoints(run) if found.valid] for run in states]
    assert left == sorted(left, key=len, reverse=True)
    assert {tuple(steps) for steps in left} == {(20, 40, 60, 80), (40, 60, 80), (60, 80)}
    for run in states:
        assert all(found.valid for found in scan_checkpoints(run))
        rotate_checkpoints(run, keep=2)
        assert names(run) == {"checkpoint-60", "checkpoint-80"}


@pytest.mark.parametrize("place", ["files", "manifest"])
def test_a_disk_that_is_full_half_way_leaves_the_older_checkpoint_untouched(
    place: str, tmp_path: Path
) -> None:
    """A limit on the size of a file makes a real write fail after its first bytes, as a full disk does."""
    old = published(tmp_path, 20)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    child = os.fork()
    if not child:
        try:
            if place == "manifest":
                write_aside(tmp_path, 40)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            try:
                aside = partial_folder(tmp_path, 40) if place == "manifest" else write_aside(tmp_path, 40)
                publish(aside, tmp_path / "checkpoint-40", {"step": 40})
            except OSError as error:
                os._exit(error.errno or 1)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 27  # EFBIG: the write did fail
    left = partial_folder(tmp_path, 40)
    if place == "files":
        assert (left / ADAPTER).stat().st_size == 100
    assert not [path for path in left.iterdir() if MANIFEST in path.name]
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    newest, (passed_over,) = newest_valid(tmp_path)
    assert newest is not None
    assert (newest.step, passed_over.published) == (20, False)
    assert clear_unpublished(tmp_path) == [partial_folder(tmp_path, 40)]
    published(tmp_path, 40)  # there is room again
    assert newest_step(tmp_path) == 40
