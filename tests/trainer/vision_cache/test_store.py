"""Kept vision features: what is read is what was written or nothing, within the bound, whoever writes or dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launch.errors import ConfigError
from launch.recipe.fingerprint import altering_values
from launch.recipe.loading import recipe_from_dict
from launch.recipe.schema import Recipe
from tests.conftest import recipe_values
from trainer.vision_cache.cache_key import MEANING, describe_difference, feature_facts, tower_digest
from trainer.vision_cache.file import HEADER_BYTES, Features, Kind
from trainer.vision_cache.place import bound_of, root_of
from trainer.vision_cache.store import FeatureCache, FullError, describe_cache, image_name, open_cache
from trainer.vision_cache.users import remove_unused
from trainer.vision_cache.writer import QUEUED, FeatureWriter

KIND = Kind(b"k" * 16, torch.bfloat16, hidden=24, merge=2)
NAMES = [image_name(bytes([number])) for number in range(200)]
SIZE = KIND.bytes_of(6)


def _features(number: int, kind: Kind = KIND) -> Features:
    """Six visual tokens of 24 values that belong to image `number` alone."""
    values = torch.randn(6, 24, generator=torch.Generator().manual_seed(number)).to(kind.dtype)
    return Features(values, (1, 4, 6))


def _same(found: Features | None, number: int) -> bool:
    return (
        found is not None and found.grid == (1, 4, 6) and torch.equal(found.values, _features(number).values)
    )


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureCache:
    monkeypatch.setenv("SAMESTEP_VISION_CACHE", str(tmp_path))
    return open_cache("disk", KIND, {"tower": "a"})


def test_features_come_back_as_they_were(disk: FeatureCache) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        cache = replace(disk, kind=replace(KIND, dtype=dtype))
        name = image_name(str(dtype).encode())
        assert cache.read(name) is None
        assert cache.write(name, _features(3, cache.kind))
        found = cache.read(name)
        assert found is not None
        assert found.grid == (1, 4, 6)
        assert found.values.dtype == dtype
        assert torch.equal(found.values, _features(3, cache.kind).values)
        assert not cache.write(name, _features(3, cache.kind))  # it is there


def _cut(content: bytearray) -> bytes:
    return bytes(content[:-5])


def _begin_only(content: bytearray) -> bytes:
    return bytes(content[: HEADER_BYTES // 2])


def _zero_end(content: bytearray) -> bytes:
    return bytes(content[:-64]) + bytes(64)


def _flip(place: int) -> Callable[[bytearray], bytes]:
    def damage(content: bytearray) -> bytes:
        content[place] ^= 1
        return bytes(content)

    return damage


DAMAGES: dict[str, tuple[Callable[[bytearray], bytes], str]] = {
    "cut": (_cut, "of 416"),
    "header cut": (_begin_only, "cut off"),
    "empty": (lambda content: b"", "cut off"),
    "longer": (lambda content: bytes(content) + b"0", "of 416"),
    "end not on disk": (_zero_end, "checksum"),
    "a flipped value": (_flip(HEADER_BYTES + 7), "checksum"),
    "a flipped checksum": (_flip(9), "checksum"),
    "no features": (lambda content: b"x" * 500, "no file of features"),
    "another version": (_flip(16), "of version"),
    "another tower": (_flip(41), "another vision tower"),
    "another image": (_flip(57), "another image"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_or_foreign_file_is_not_used_and_its_reason_is_said(
    disk: FeatureCache, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    change, reason = DAMAGES[damage]
    disk.write(NAMES[1], _features(1))
    path = disk.path_of(NAMES[1])
    path.write_bytes(change(bytearray(path.read_bytes())))
    assert disk.read(NAMES[1]) is None
    assert reason in caplog.text
    assert not path.exists()
    assert disk.write(NAMES[1], _features(1))
    assert _same(disk.read(NAMES[1]), 1)


def test_features_of_another_tower_are_ignored_with_the_reason(disk: FeatureCache) -> None:
    disk.write(NAMES[1], _features(1))
    facts = {"tower": "b", "processor": {"size": 4}}
    other = open_cache("disk", replace(KIND, key=b"o" * 16), facts)
    assert other.read(NAMES[1]) is None
    said = "\n".join(describe_cache(other, facts))
    assert f"in {disk.folder} are ignored: another vision tower (weights or quantization), other proc" in said
    assert (
        describe_difference({"tower": "a"}, {"tower": "a", "unheard": 1}) == "settings that are unknown here"
    )


def _write_all(cache: FeatureCache, numbers: list[int], full: list[int]) -> None:
    for number in numbers:
        try:
            cache.write(NAMES[number], _features(number))
        except FullError:
            full.append(number)


def test_writers_in_threads_and_processes_keep_the_bound_and_tear_nothing(disk: FeatureCache) -> None:
    """Every image is written by two threads of each of two processes; half of them find room."""
    cache = replace(disk, bound=SIZE * 50 + 17)
    fork = multiprocessing.get_context("fork")

    def work() -> None:
        full: list[int] = []
        orders = [list(range(100)), list(range(99, -1, -1))]
        threads = [threading.Thread(target=_write_all, args=(cache, order, full)) for order in orders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(full) >= 50

    processes = [fork.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    there: set[int] = set()
    while any(process.is_alive() for process in processes):  # a reader meanwhile
        for number in range(100):
            if cache.holds(NAMES[number]):
                assert _same(cache.read(NAMES[number]), number)
                there.add(number)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = [number for number in range(100) if _same(cache.read(NAMES[number]), number)]
    assert len(found) == 50
    assert there <= {*found}
    assert cache.used_bytes() == 50 * SIZE
    cache.recount()
    assert cache.used_bytes() == 50 * SIZE


def test_a_killed_writer_costs_no_room_for_ever(disk: FeatureCache) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_write_all, args=(disk, [*range(200)] * 500, [])
    )
    process.start()
    while not disk.holds(NAMES[20]):
        time.sleep(0.001)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    left = disk.folder / f".{NAMES[9][:16]}-elsewhere-1-1"
    left.write_bytes(bytes(SIZE))
    disk.recount()
    before = disk.used_bytes()
    assert left.exists()  # a live writer's may look so
    os.utime(left, (1, 1))
    disk.recount()
    assert not left.exists()
    assert disk.used_bytes() == before - SIZE
    found = [number for number in range(200) if disk.holds(NAMES[number])]
    assert found
    assert all(_same(disk.read(NAMES[number]), number) for number in found)


def test_the_bound_holds_for_all_towers_together(disk: FeatureCache) -> None:
    _write_all(disk, [*range(10)], [])
    other = open_cache("disk", replace(KIND, key=b"o" * 16), {})
    with pytest.raises(FullError, match="by other towers or settings; delete those in"):
        replace(other, bound=SIZE * 10).write(NAMES[50], _features(50))
    assert replace(other, bound=SIZE * 11).write(NAMES[50], _features(50))


def test_a_full_cache_is_said_once_and_stops_nobody(disk: FeatureCache) -> None:
    said: list[str] = []
    writer = FeatureWriter(replace(disk, bound=SIZE * 2), said.append)
    for number in range(10):
        writer.keep([NAMES[number]], [(1, 4, 6)], _features(number).values)
        writer.wait()
    writer.close()
    assert writer.kept == 2
    (line,) = said
    assert "is full: 0.0 MB of 0.0 MB are used; raise SAMESTEP_VISION_CACHE_GB" in line


def test_a_cache_that_went_away_is_said_and_stops_nobody(disk: FeatureCache) -> None:
    import shutil

    said: list[str] = []
    writer = FeatureWriter(disk, said.append)
    shutil.rmtree(disk.folder)
    writer.keep([NAMES[0]], [(1, 4, 6)], _features(0).values)
    writer.close()
    assert "cannot be written (No such file or directory)" in said[0]


def test_what_the_disk_is_too_slow_for_is_dropped(
    disk: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    write = FeatureCache.write

    def slow(self: FeatureCache, *of: Any) -> bool:
        go_on.wait(10)
        return write(self, *of)

    monkeypatch.setattr(FeatureCache, "write", slow)
    writer = FeatureWriter(disk, pytest.fail)
    began = time.monotonic()
    for number in range(20):
        both = torch.cat([_features(number).values, _features(number + 100).values])
        writer.keep([NAMES[number], NAMES[number + 100]], [(1, 4, 6)] * 2, both)
    assert time.monotonic() - began < 5
    go_on.set()
    writer.close()
    assert writer.kept + writer.dropped == 40
    assert QUEUED * 2 <= writer.kept <= (QUEUED + 1) * 2
    for number in (0, 100):
        assert _same(disk.read(NAMES[number]), number)


def _hold(place: Path, begun: Any) -> None:
    cache = open_cache("memory", KIND, {})
    cache.write(NAMES[0], _features(0))
    begun.set()
    time.sleep(60)


def test_features_in_memory_live_as_long_as_their_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMESTEP_VISION_CACHE", str(tmp_path))
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()
    process = fork.Process(target=_hold, args=(tmp_path, begun))
    process.start()
    assert begun.wait(10)
    mine = open_cache("memory", KIND, {})
    assert mine.folder.parent == tmp_path / "memory"
    assert _same(mine.read(NAMES[0]), 0)
    mine.close()
    assert mine.folder.is_dir()  # the other still uses it
    other = open_cache("memory", replace(KIND, key=b"o" * 16), {})
    assert mine.folder.is_dir()
    other.close()
    assert not other.folder.exists()
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert mine.folder.is_dir()
    remove_unused(mine=mine.folder)
    assert mine.folder.is_dir()
    later = open_cache("memory", replace(KIND, key=b"o" * 16), {})
    assert not mine.folder.exists()  # nobody was left to remove it
    remove_unused()
    assert later.folder.is_dir()
    later.close()
    assert list(tmp_path.iterdir()) == []


def test_features_in_memory_are_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMESTEP_VISION_CACHE", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "memory").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="its parent belongs to another user"):
        open_cache("memory", KIND, {})


def test_place_and_bound_are_chosen_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path))
    assert root_of("disk") == tmp_path / "vision"
    assert root_of("memory").parent == Path("/dev/shm")
    assert bound_of("disk", tmp_path) == 100 * 10**9
    monkeypatch.setenv("SAMESTEP_VISION_CACHE_GB", "0.5")
    assert bound_of("memory", tmp_path) == 5 * 10**8
    for wrong in ("much", "0", "-3", "nan", "inf"):
        monkeypatch.setenv("SAMESTEP_VISION_CACHE_GB", wrong)
        with pytest.raises(ConfigError, match="no number of gigabytes above 0"):
            bound_of("disk", tmp_path)


def _recipe(world: Path, **sections: dict[str, Any]) -> Recipe:
    values = recipe_values(world)
    for section, change in sections.items():
        values[section] = values[section] | change
    return recipe_from_dict(values)


def test_the_key_is_in_no_number_of_a_run_and_in_no_index(world: Path) -> None:
    from launch.inputs.dataset_index import index_key

    off, on = _recipe(world), _recipe(world, data={"vision_cache": "disk"})
    assert altering_values(off) == altering_values(on)
    assert index_key(off) == index_key(on)


def test_features_are_named_by_all_that_makes_them(world: Path) -> None:
    from trainer.model.base import load_base
    from trainer.pretrained import load_processor

    recipe = _recipe(world)
    processor = load_processor(recipe).image_processor
    model = load_base(recipe, torch.device("cpu"), layers=False)
    whole = load_base(recipe, torch.device("cpu")).model.visual
    tower: nn.Module = model.model.visual
    plain = feature_facts(recipe, tower, processor)
    assert plain == feature_facts(recipe, whole, processor)
    assert plain.keys() == MEANING.keys()

    smaller = load_processor(_recipe(world, data={"max_pixels": 28 * 28 * 4})).image_processor
    assert describe_difference(plain, feature_facts(recipe, tower, smaller)) == MEANING["processor"]
    half = _recipe(world, quantization={"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"})
    assert describe_difference(plain, feature_facts(half, tower, processor)) == MEANING["products"]
    packed = load_base(half, torch.device("cpu"), layers=False).model.visual
    float16 = load_base(half, torch.device("cpu"), "float16", layers=False).model.visual
    single = _recipe(world, quantization={"load_in_4bit": True, "bnb_4bit_use_double_quant": False})
    digests = [
        tower_digest(of)
        for of in (tower, packed, load_base(single, torch.device("cpu"), layers=False).model.visual)
    ]
    assert len({*digests}) == 3
    assert tower_digest(float16) == digests[1]  # how a strategy stores the same bytes
    with torch.no_grad():
        tower.merger.mlp[2].bias[3] += 1e-3  # type: ignore[union-attr, index, operator]
    assert describe_difference(plain, feature_facts(recipe, tower, processor)) == MEANING["tower"]
