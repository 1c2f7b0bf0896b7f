"""A checkpoint is there whole or not at all, and every damage is named and passed over."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from launch.checkpoints.manifest import MANIFEST, read_manifest
from launch.checkpoints.publish import publish
from launch.checkpoints.rotation import clear_unpublished, rotate_checkpoints
from launch.checkpoints.scan import Checkpoint, newest_valid, scan_checkpoints
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


def _forge(folder: Path, **changed: Any) -> None:
    """Write a manifest with other facts or files and the seal that belongs to them."""
    old = json.loads((folder / MANIFEST).read_text())
    new = {"facts": old["facts"], "files": old["files"], **changed}
    seal = hashlib.sha256(json.dumps(new, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({**new, "sha256": seal}))


# reading ----------------------------------------------------------------------------------


def test_a_published_checkpoint_is_read_back_with_its_facts_and_every_file(tmp_path: Path) -> None:
    final = published(tmp_path, 20)
    manifest = read_manifest(final, verify=True)
    assert manifest["facts"] == {"step": 20}
    assert sorted(manifest["files"]) == [ADAPTER, STATES]
    assert manifest["files"][ADAPTER]["bytes"] == 1000
    assert names(tmp_path) == {"checkpoint-20"}
    (found,) = scan_checkpoints(tmp_path)
    size = 1000 + len('{"step": 20}') + (final / MANIFEST).stat().st_size
    assert found == Checkpoint(final, 20, True, {"step": 20}, size, ())
    assert found.valid


def test_facts_are_sealed_as_json_reads_them_back(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-20"
    publish(write_aside(tmp_path, 20), final, {"step": 20, "ranks": {10: "b", 9: "a"}, "pair": (1, 2)})
    facts = read_manifest(final)["facts"]
    assert facts == {"step": 20, "ranks": {"10": "b", "9": "a"}, "pair": [1, 2]}


def test_the_newest_is_the_highest_step_not_the_last_in_the_alphabet_or_in_time(tmp_path: Path) -> None:
    published(tmp_path, 100, 20, 3)
    assert newest_step(tmp_path) == 100
    assert [found.step for found in scan_checkpoints(tmp_path)] == [3, 20, 100]


def test_a_run_without_a_published_checkpoint_has_no_newest(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "not there") == (None, [])
    assert scan_checkpoints(tmp_path / "not there") == clear_unpublished(tmp_path / "not there") == []
    rotate_checkpoints(tmp_path / "not there", keep=2)
    write_aside(tmp_path, 20)
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-40").write_text("a file")
    (tmp_path / "checkpoint-50").symlink_to("nowhere")
    for name in ("checkpoint-best", "checkpoint-060", "checkpoint-٣", "checkpoint-70.removed-0"):
        (tmp_path / name).mkdir()
    newest, passed_over = newest_valid(tmp_path)
    assert newest is None
    assert [(found.step, found.published) for found in passed_over] == [
        (50, True),
        (40, True),
        (30, True),
        (20, False),
    ]
    assert passed_over == scan_checkpoints(tmp_path)[::-1]


def test_a_run_that_cannot_be_read_is_an_error_and_not_a_run_without_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for look in (scan_checkpoints, newest_valid, clear_unpublished):
        with pytest.raises(CheckpointError, match=r"file: cannot be read \(Not a directory\); "):
            look(tmp_path / "file")


def _loop_of_links(folder: Path) -> None:
    (folder / ADAPTER).unlink()
    (folder / ADAPTER).symlink_to(ADAPTER)


def _link(folder: Path) -> None:
    (folder / ADAPTER).rename(folder.parent / "elsewhere")
    (folder / ADAPTER).symlink_to(folder.parent / "elsewhere")


def _linked_folder(folder: Path) -> None:
    (folder / "rank states").rename(folder.parent / "elsewhere")
    (folder / "rank states").symlink_to(folder.parent / "elsewhere")


def _directory(folder: Path) -> None:
    (folder / ADAPTER).unlink()
    (folder / ADAPTER).mkdir()
    (folder / ADAPTER / "inside").write_text("x")


def _pipe(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


def _add(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text("new") and None


def _forged(**changed: Any) -> Callable[[Path], None]:
    return lambda folder: _forge(folder, **changed)


def _listed(name: str, **entry: Any) -> Callable[[Path], None]:
    return _forged(files={name: {"bytes": 3, "sha256": "0" * 64} | entry})


OTHER_SIZE, OTHER_CONTENT = "has another size ({}, {} were published)", "has another content (sha256 "
# What is done to checkpoint-40 (beside a good 20), the file that is named, the words, and whether only reading tells.
DAMAGES: dict[str, tuple[Callable[[Path], Any], str, str, bool]] = {
    "truncated": (
        lambda f: halve(f / ADAPTER),
        ADAPTER,
        OTHER_SIZE.format("500 bytes", "1,000"),
        False,
    ),
    "emptied": (
        lambda f: (f / ADAPTER).write_text(""),
        ADAPTER,
        OTHER_SIZE.format("0 bytes", "1,000"),
        False,
    ),
    "grown": (lambda f: (f / ADAPTER).write_bytes(b"(" * 1001), ADAPTER, "(1,001 bytes, 1,000", False),
    "bit-flipped": (lambda f: change_one_bit(f / ADAPTER), ADAPTER, OTHER_CONTENT, True),
    "missing": (lambda f: (f / ADAPTER).unlink(), ADAPTER, "is missing (1,000 bytes", False),
    "folder missing": (lambda f: shutil.rmtree(f / "rank states"), STATES, "is missing (12 bytes", False),
    "folder a file": (
        lambda f: (shutil.rmtree(f / "rank states"), (f / "rank states").write_text("")),
        STATES,
        "is missing (12 bytes",
        False,
    ),
    "of another checkpoint": (
        lambda f: shutil.copy(f.parent / "checkpoint-20" / ADAPTER, f / ADAPTER),
        ADAPTER,
        OTHER_CONTENT,
        True,
    ),
    "link": (_link, ADAPTER, "is no plain file (a link)", False),
    "loop of links": (_loop_of_links, ADAPTER, "is no plain file (a link)", False),
    "linked folder": (_linked_folder, "rank states", "was not published (", False),
    "directory": (_directory, ADAPTER, "is no plain file (a folder)", False),
    "pipe": (_pipe(ADAPTER), ADAPTER, "is no plain file (a device, pipe or socket)", False),
    "foreign": (_add("adapter.bin"), "adapter.bin", "was not published (3 bytes, not in manifest", False),
    "foreign below": (_add("rank states/1.json"), "rank states/1.json", "was not published (3", False),
    "foreign manifest": (_add("rank states/" + MANIFEST), "rank states/" + MANIFEST, "was not pub", False),
    "foreign like nfs": (_add(".nfs1"), ".nfs1", "was not published (3 bytes", False),
    "foreign of odd name": (_add("a\nb\x1b[1m"), r"a\nb\x1b[1m", "was not published (3 bytes", False),
    "manifest missing": (lambda f: (f / MANIFEST).unlink(), MANIFEST, "is missing", False),
    "manifest half": (lambda f: halve(f / MANIFEST), MANIFEST, "cannot be read (", False),
    "manifest empty": (lambda f: (f / MANIFEST).write_text(""), MANIFEST, "cannot be read (", False),
    "manifest a list": (lambda f: (f / MANIFEST).write_text("[]"), MANIFEST, "is no manifest (", False),
    "manifest of nothing": (lambda f: (f / MANIFEST).write_text("{}"), MANIFEST, "is no manifest (", False),
    "manifest deep": (lambda f: (f / MANIFEST).write_text("[" * 10**5), MANIFEST, "cannot be read (", False),
    "manifest of no text": (lambda f: (f / MANIFEST).write_bytes(b"\xff"), MANIFEST, "cannot be re", False),
    "manifest a directory": (
        lambda f: ((f / MANIFEST).unlink(), (f / MANIFEST).mkdir()),
        MANIFEST,
        "is no plain file (a folder)",
        False,
    ),
    "manifest a pipe": (_pipe(MANIFEST), MANIFEST, "is no plain file (a device", False),
    "manifest of another": (
        lambda f: shutil.copy(f.parent / "checkpoint-20" / MANIFEST, f / MANIFEST),
        MANIFEST,
        "is of another step than its folder (20, the folder says 40)",
        False,
    ),
    "facts a list": (_forged(facts=[40]), MANIFEST, "its facts name no step ([40])", False),
    "step missing": (_forged(facts={"epoch": 1}), MANIFEST, "its facts name no step (", False),
    "step a text": (_forged(facts={"step": "40"}), MANIFEST, "its facts name no step (", False),
    "step negative": (_forged(facts={"step": -40}), MANIFEST, "its facts name no step (", False),
    "files a list": (_forged(files=[ADAPTER]), MANIFEST, "its files are no mapping (", False),
    "entry a number": (_forged(files={ADAPTER: 1000}), MANIFEST, "has no size and sha256 of", False),
    "size negative": (_listed(ADAPTER, bytes=-1), MANIFEST, "has no size and sha256 of", False),
    "size a truth": (_listed(ADAPTER, bytes=True), MANIFEST, "has no size and sha256 of", False),
    "digest short": (_listed(ADAPTER, sha256="0"), MANIFEST, "has no size and sha256 of", False),
    "path above": (_listed("../x"), MANIFEST, "that cannot be in the folder ('../x')", False),
    "path through": (_listed("a/../../x"), MANIFEST, "that cannot be in the folder (", False),
    "path absolute": (_listed("/etc/passwd"), MANIFEST, "that cannot be in the folder (", False),
    "path twice": (_listed("a//x"), MANIFEST, "that cannot be in the folder (", False),
    "path of nothing": (_listed(""), MANIFEST, "that cannot be in the folder (", False),
    "path no file has": (_listed("a\0b"), MANIFEST, "that cannot be in the folder ('a\\x00b')", False),
    "path of no encoding": (_listed("\ud800"), r"\ud800", "cannot be read (", False),
    "path of itself": (_listed(MANIFEST), MANIFEST, "that cannot be in the folder (", False),
    "folder emptied": (lambda f: (shutil.rmtree(f), f.mkdir()), MANIFEST, "is missing", False),
    "folder a broken link": (
        lambda f: (shutil.rmtree(f), f.symlink_to("nowhere")),
        MANIFEST,
        "is missing",
        False,
    ),
    "folder a file itself": (lambda f: (shutil.rmtree(f), f.write_text("")), MANIFEST, "cannot be r", False),
}


@pytest.mark.parametrize(("harm", "file", "words", "hidden"), DAMAGES.values(), ids=DAMAGES)
def test_every_damage_is_named_passed_over_and_written_over(
    harm: Callable[[Path], Any], file: str, words: str, hidden: bool, tmp_path: Path
) -> None:
    published(tmp_path, 20, 40)
    good, bad = (tmp_path / f"checkpoint-{step}" for step in (20, 40))
    harm(bad)
    newest, (passed_over,) = newest_valid(tmp_path)
    assert newest is not None
    assert (newest.step, newest.metadata) == (20, {"step": 20})
    assert f"{bad}/{file}: {words}" in "\n".join(passed_over.problems) or (
        passed_over.problems[0].startswith(f"{bad}/{file}: ") and words in passed_over.problems[0]
    )
    assert all("; " in line and line == line.splitlines()[0] for line in passed_over.problems)
    assert (passed_over.step, passed_over.published, passed_over.valid) == (40, True, False)
    assert scan_checkpoints(tmp_path) == [newest, passed_over]
    with pytest.raises(CheckpointError) as caught:
        read_manifest(bad, verify=True)
    assert str(caught.value).splitlines() == list(passed_over.problems)
    assert [found.valid for found in scan_checkpoints(tmp_path, verify=False)] == [True, hidden]
    published(tmp_path, 40)
    assert newest_step(tmp_path) == 40
    assert read_manifest(good, verify=True)["facts"] == {"step": 20}
    assert names(tmp_path) - {"elsewhere"} == {good.name, bad.name}


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """It says what the run is; no other file would notice a change in it."""
    manifest = published(tmp_path, 20) / MANIFEST
    content = manifest.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        manifest.write_bytes(changed)
        assert newest_step(tmp_path) is None, changed


def test_every_damaged_file_is_named_at_once_with_its_sizes(tmp_path: Path) -> None:
    folder = published(tmp_path, 20)
    (folder / ADAPTER).write_bytes(b"short")
    (folder / STATES).unlink()
    (folder / "notes").write_text("")
    with pytest.raises(CheckpointError) as caught:
        read_manifest(folder)
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == [
        f"{folder}/{name}" for name in (ADAPTER, STATES, "notes")
    ]
    assert "has another size (5 bytes, 1,000 were published)" in str(caught.value)


def test_what_lies_in_a_folder_that_took_the_place_of_a_file_is_not_named_as_well(tmp_path: Path) -> None:
    _directory(published(tmp_path, 20))
    _, (passed_over,) = newest_valid(tmp_path)
    assert len(passed_over.problems) == 1


@pytest.mark.parametrize("name", [".", "rank states", ADAPTER, MANIFEST, "unlisted"])
def test_what_may_not_be_read_is_passed_over_and_not_taken_for_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    folder = published(Path(), 20, 40)
    (folder / "unlisted").mkdir()  # harmless while it is seen to be empty
    (folder / name).chmod(0)
    with as_nobody():
        newest, (passed_over,) = newest_valid(Path())
    assert newest is not None
    assert newest.step == 20
    assert passed_over.problems
    assert all("(Permission denied); " in line for line in passed_over.problems)
    tmp_path.chmod(0)
    with as_nobody(), pytest.raises(CheckpointError, match="cannot be read"):
        newest_valid(Path())
    tmp_path.chmod(0o700)


def test_what_an_nfs_client_leaves_and_empty_folders_do_no_harm(tmp_path: Path) -> None:
    folder = published(tmp_path, 20)
    (folder / ".nfs000000000123abcd0000002f").write_text("removed while open")
    (folder / "empty").mkdir()
    assert newest_step(tmp_path) == 20
    (folder / ".nfs000000000123abcd00000030").symlink_to(ADAPTER)
    assert newest_step(tmp_path) is None


def test_a_copy_under_a_name_of_its_own_can_be_read_and_one_under_another_step_cannot(tmp_path: Path) -> None:
    folder = published(tmp_path, 20)
    shutil.copytree(folder, tmp_path / "best")
    assert read_manifest(tmp_path / "best", verify=True)["facts"] == {"step": 20}
    folder.rename(tmp_path / "checkpoint-400")
    newest, (passed_over,) = newest_valid(tmp_path)
    assert newest is None
    assert "(20, the folder says 400)" in passed_over.problems[0]


def test_a_link_to_a_whole_checkpoint_is_one_and_rotation_takes_only_the_link(tmp_path: Path) -> None:
    run, archive = tmp_path / "run", tmp_path / "archive"
    published(run, 20, 40, 60)
    (run / "checkpoint-20").rename(archive)
    (run / "checkpoint-20").symlink_to(archive)
    assert all(found.valid for found in scan_checkpoints(run))
    rotate_checkpoints(run, keep=2)
    assert names(run) == {"checkpoint-40", "checkpoint-60"}
    assert (archive / MANIFEST).is_file()


def test_content_is_read_from_the_newest_down_and_only_as_far_as_needed(tmp_path: Path) -> None:
    published(tmp_path, 20, 40, 60, 80)
    change_one_bit(tmp_path / "checkpoint-80" / ADAPTER)
    read: list[str] = []
    real = hashlib.file_digest

    def digest(file: Any, name: str) -> Any:
        read.append(Path(file.name).parent.name)
        return real(file, name)

    with mock.patch.object(hashlib, "file_digest", digest):
        newest_valid(tmp_path)
        assert [name for name in read if name != "rank states"] == ["checkpoint-80", "checkpoint-60"]
        read.clear()
        rotate_checkpoints(tmp_path, keep=2)
        assert {*read} - {"rank states"} == {"checkpoint-80", "checkpoint-60", "checkpoint-40"}
        read.clear()
        rotate_checkpoints(tmp_path, keep=3)  # nothing to remove, whatever they hold
        scan_checkpoints(tmp_path, verify=False)
        assert read == []


def test_what_vanishes_while_it_is_looked_at_is_left_out(tmp_path: Path) -> None:
    published(tmp_path, 20, 40)

    def rotated_away(folder: Path) -> None:
        if folder.name == "checkpoint-20":
            shutil.rmtree(folder)

    assert [found.step for found in scan_checkpoints(tmp_path, telling=rotated_away)] == [40]


# publishing -------------------------------------------------------------------------------


def test_a_checkpoint_that_verifies_is_never_replaced(tmp_path: Path) -> None:
    folder = published(tmp_path, 20)
    before = (folder / MANIFEST).stat()
    again = write_aside(tmp_path, 20)
    with pytest.raises(CheckpointError, match="is published"):
        publish(again, folder, {"step": 20})
    assert (folder / MANIFEST).stat() == before
    change_one_bit(folder / ADAPTER)
    publish(again, folder, {"step": 20, "again": True})
    assert read_manifest(folder, verify=True)["facts"] == {"step": 20, "again": True}
    assert names(tmp_path) == {"checkpoint-20"}


def test_an_attempt_can_be_repeated_over_what_a_failed_one_left(tmp_path: Path) -> None:
    aside = write_aside(tmp_path, 20)
    (aside / MANIFEST).write_text("{")
    (aside / (MANIFEST + ".tmp")).write_text("{")
    publish(aside, tmp_path / "checkpoint-20", {"step": 20})
    assert newest_step(tmp_path) == 20


@pytest.mark.parametrize("name", ["checkpoint-40", "checkpoint-20.partial", "best"])
def test_facts_of_another_step_are_not_published(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="facts of step 20"):
        publish(write_aside(tmp_path, 20), tmp_path / name, {"step": 20})
    assert names(tmp_path) == {"checkpoint-20.partial"}


def test_what_could_not_be_verified_later_is_not_published(tmp_path: Path) -> None:
    aside = write_aside(tmp_path, 20)
    (aside / "link").symlink_to(ADAPTER)
    with pytest.raises(CheckpointError, match="link: is no plain file"):
        publish(aside, tmp_path / "checkpoint-20", {"step": 20})
