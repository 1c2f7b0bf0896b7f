"""A base's weights are in the system's cache before anybody loads them."""

import os
import time
from pathlib import Path

import pytest

from launch.local import read_ahead
from launch.local.read_ahead import reading_ahead

SIZE = 2 * read_ahead.CHUNK + 5
PATIENCE_S = 30.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model-1.safetensors", "model-2.safetensors", "training_args.bin"):
        (tmp_path / name).write_bytes(bytes(SIZE))
    return tmp_path


def test_the_weights_that_are_not_in_the_cache_are_read_once_and_other_files_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int, int]] = []
    plain = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = plain(descriptor, buffers, offset)
        read.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, offset, count))
        return count

    monkeypatch.setattr(read_ahead, "_is_cached", lambda _, offset: offset == 0)
    monkeypatch.setattr(os, "preadv", preadv)
    with reading_ahead(folder):
        deadline = time.monotonic() + PATIENCE_S
        while len(read) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    chunk = read_ahead.CHUNK
    expected = [(chunk, chunk), (2 * chunk, 5)]
    assert read == [(f"model-{n}.safetensors", *each) for n in (1, 2) for each in expected]


def test_what_was_just_written_is_in_the_cache_and_what_is_not_there_is_not(folder: Path) -> None:
    with (folder / "model-1.safetensors").open("rb") as opened:
        assert read_ahead._is_cached(opened.fileno(), 0)
        assert not read_ahead._is_cached(opened.fileno(), 2 * SIZE)


def test_weights_that_would_push_each_other_out_are_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 3 * SIZE

    monkeypatch.setattr(read_ahead.psutil, "virtual_memory", lambda: Memory)
    assert read_ahead._that_fit(folder) == []
    Memory.available = 4 * SIZE
    assert [file.name for file in read_ahead._that_fit(folder)] == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]


def test_a_folder_that_is_gone_stops_nobody(tmp_path: Path) -> None:
    with reading_ahead(tmp_path / "gone"), reading_ahead(None):
        pass
