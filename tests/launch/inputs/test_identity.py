"""What makes a run the same run: every part by its content, all bytes of it, whatever names and times say."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from launch.errors import ConfigError, RunError
from launch.inputs import file_digests
from launch.inputs.dataset_index import Index, index_damage, read_index
from launch.inputs.file_digests import files_digest
from launch.inputs.identity import (
    MODEL_PARTS,
    NONE,
    RunIdentity,
    data_identity,
    find_identity,
    model_identity,
)
from launch.inputs.model_files import hub_commit, old_base_identity, old_kind, weight_files
from launch.recipe.loading import recipe_from_dict
from launch.recipe.schema import Recipe
from tests.conftest import SPLIT_SIZES, chart_rows, recipe_values, write_charts
from trainer.data.splits import open_split
from trainer.prepare import prepare


def recipe_on(world: Path, dataset: Path | None = None, base: Path | None = None) -> Recipe:
    values = recipe_values(world)
    values["data"]["dataset"] = str(dataset or values["data"]["dataset"])
    values["model"]["name_or_path"] = str(base or values["model"]["name_or_path"])
    return recipe_from_dict(values)


def charts(folder: Path, seed: int = 0) -> Path:
    return write_charts(
        folder, {split: chart_rows(12, seed + number) for number, split in enumerate(SPLIT_SIZES)}
    )


def rewritten(file: Path, content: bytes) -> None:
    """As `rsync -t` or `tar` leave it: other bytes, the old time."""
    before = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def damaged(content: bytes, place: int, count: int = 1) -> bytes:
    """With some bytes inverted."""
    return b"".join(
        [
            content[:place],
            bytes(byte ^ 0xFF for byte in content[place : place + count]),
            content[place + count :],
        ]
    )


# the base --------------------------------------------------------------------------------------------------


@pytest.fixture
def base(world: Path, tmp_path: Path) -> Path:
    """A copy of the base, to be changed."""
    return Path(shutil.copytree(world / "base", tmp_path / "base"))


FILES = {
    "model.weights": "model.safetensors",
    "model.config": "config.json",
    "model.processor": "processor_config.json",
    "model.chat_template": "chat_template.jinja",
    "model.tokenizer": "tokenizer.json",
    "model.generation": "generation_config.json",
}


def test_each_file_of_a_base_is_in_one_part_of_its_identity(base: Path) -> None:
    assert tuple(FILES) == MODEL_PARTS
    plain = model_identity(base).parts
    for part, name in FILES.items():
        content = (base / name).read_bytes() if (base / name).is_file() else None
        rewritten(base / name, damaged(content, len(content) // 2)) if content else (base / name).write_text(
            "{}"
        )
        changed = model_identity(base).parts
        assert {key for key in plain if plain[key] != changed[key]} == {part}
        (base / name).write_bytes(content) if content else (base / name).unlink()
    assert model_identity(base).parts == plain
    (base / "chat_template.jinja").unlink()
    assert model_identity(base).parts["model.chat_template"] == NONE


def test_one_block_that_a_sample_would_not_read_is_another_content(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    content = np.random.default_rng(0).bytes(16 << 20)
    file.write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    sampled, whole = old_base_identity(tmp_path), model_identity(tmp_path).parts["model.weights"]
    rewritten(file, damaged(content, (16 << 20) // 63 + (100 << 10), 4096))
    assert old_base_identity(tmp_path) == sampled
    assert model_identity(tmp_path).parts["model.weights"] != whole


def test_a_large_file_is_read_once_and_again_when_it_is_rewritten_with_its_old_time_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "REMEMBERED", 1000)
    monkeypatch.setattr(file_digests, "ANNOUNCED", 1000)
    read, reads = file_digests._read, []
    monkeypatch.setattr(file_digests, "_read", lambda file: reads.append(file.name) or read(file))
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 2000)
    first = files_digest([file])
    assert files_digest([file]) == first
    assert reads == ["weights", "weights"]  # just written: the next change could fall into the same tick
    monkeypatch.setattr(file_digests, "SETTLED_S", -1.0)
    assert {files_digest([file]) for _ in range(3)} == {first}
    assert len(reads) == 3
    assert capsys.readouterr().err.count("once, to know its content by a digest") == 3
    (place,) = (tmp_path / "cache" / "digests").glob("*.json")
    assert place.stat().st_mode == file.stat().st_mode  # others who share the cache can read it
    rewritten(file, b"a" * 1999 + b"b")
    assert files_digest([file]) != first
    assert len(reads) == 4
    for damage in ("", "[1]", '{"digest": "0"}', "[" * 30000):
        for place in (tmp_path / "cache" / "digests").glob("*.json"):
            place.write_text(damage)
        file_digests._known.clear()  # another process
        assert files_digest([file]) != first
    assert len(reads) == 8
    file_digests._known.clear()
    assert files_digest([file]) != first
    assert len(reads) == 8


def test_copies_on_disks_of_their_own_are_remembered_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes that share the cache have one path for what each copied to its own disk. Others may read the record."""
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "REMEMBERED", 1000)
    monkeypatch.setattr(file_digests, "SETTLED_S", -1.0)
    disk = tmp_path / "disk"
    for node in ("one", "two"):
        (tmp_path / node).mkdir()
        (tmp_path / node / "weights").write_bytes(b"a" * 2000)
    digests = set()
    for node in ("one", "two", "one", "two"):
        if len(digests) and node == "one":
            monkeypatch.setattr(file_digests, "_read", lambda _: pytest.fail("read again"))
        file_digests._known.clear()
        (tmp_path / node).rename(disk)  # keeps the file as it is
        digests.add(files_digest([disk / "weights"]))
        disk.rename(tmp_path / node)
    assert len(digests) == 1
    modes = {place.stat().st_mode & 0o777 for place in (tmp_path / "cache" / "digests").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_a_cache_that_cannot_be_written_costs_another_reading_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "REMEMBERED", 10)
    monkeypatch.setattr(file_digests, "SETTLED_S", -1.0)
    (tmp_path / "weights").write_bytes(b"a" * 2000)
    assert files_digest([tmp_path / "weights"]) == files_digest([tmp_path / "weights"])


def test_a_folder_is_a_commit_only_where_the_hub_s_cache_keeps_it(base: Path, tmp_path: Path) -> None:
    commit = "0123456789" * 4
    cached = tmp_path / "hub" / "models--owner--name" / "snapshots"
    for place, known in (
        (tmp_path / "snapshots" / "v1", None),
        (tmp_path / "snapshots" / commit, None),
        (cached / "v1", None),
        (cached / commit, commit),
    ):
        shutil.copytree(base, place)
        assert hub_commit(place) == known
        assert model_identity(place) == model_identity(base)
        assert old_kind(old_base_identity(place)) == ("commit" if known else "sample")
        content = (place / "model.safetensors").read_bytes()
        rewritten(place / "model.safetensors", damaged(content, len(content) // 2))
        assert model_identity(place) != model_identity(base)
    assert old_kind("v1") is None


def test_a_base_without_safetensors_is_refused_before_anything_is_prepared(world: Path, base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    recipe = recipe_on(world, base=base)
    words = r"has no model\.safetensors and no .* \(it has pytorch_model\.bin\).* `save_pretrained`"
    for refuse in (
        lambda: prepare(recipe, quiet=True),
        lambda: weight_files(base),
        lambda: model_identity(base),
    ):
        with pytest.raises(ConfigError, match=words):
            refuse()


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (
            {"a": "one.safetensors", "b": "two.safetensors"},
            r"lacks weight files \(1 of 2: two\.safetensors\)",
        ),
        ({}, "names no files of its folder"),
        ({"a": "../one.safetensors"}, "names no files of its folder"),
        ({"a": 7}, "names no files of its folder"),
        ([1], "names no files of its folder"),
    ],
)
def test_the_index_of_a_sharded_base_must_name_files_that_are_there(
    tmp_path: Path, named: object, words: str
) -> None:
    (tmp_path / "one.safetensors").write_bytes(b"1")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    with pytest.raises(ConfigError, match=words):
        weight_files(tmp_path)
    (tmp_path / "two.safetensors").write_bytes(b"2")
    if len(named) == 2:  # type: ignore[arg-type]
        assert [file.name for file in weight_files(tmp_path)] == ["one.safetensors", "two.safetensors"]


# the data --------------------------------------------------------------------------------------------------


def test_files_that_are_rewritten_with_their_old_time_are_other_data(world: Path, tmp_path: Path) -> None:
    folder, other = charts(tmp_path / "charts"), charts(tmp_path / "other", seed=50)
    recipe = recipe_on(world, folder)
    before = prepare(recipe, quiet=True)
    file = folder / "train-00000.parquet"
    rewritten(file, (other / file.name).read_bytes())
    assert read_index(recipe) is None
    after = prepare(recipe, quiet=True)
    assert after.fingerprint == prepare(recipe_on(world, other), quiet=True).fingerprint != before.fingerprint
    assert open_split(recipe, "train")[3] == open_split(recipe_on(world, other), "train")[3]
    differing = {
        part
        for part, digest in data_identity(before).parts.items()
        if data_identity(after).parts[part] != digest
    }
    assert differing == {"data.train.rows"}
    rewritten(folder / "val-00000.parquet", (other / "val-00000.parquet").read_bytes())
    validated = data_identity(prepare(recipe, quiet=True)).parts
    assert validated["data.validation.rows"] != data_identity(after).parts["data.validation.rows"]
    assert validated["data.train.rows"] == data_identity(after).parts["data.train.rows"]


def _reverse(index: Index) -> None:
    file = index.path / "train.parquet"
    table = pq.read_table(file)
    pq.write_table(table.take(list(range(len(table) - 1, -1, -1))), file)


def _flip(name: str, share: float) -> Callable[[Index], None]:
    def flip(index: Index) -> None:
        content = (index.path / name).read_bytes()
        (index.path / name).write_bytes(damaged(content, int(len(content) * share)))

    return flip


def _trust_reversed_rows(index: Index) -> None:
    """Whoever changes the rows changes the digest of their file too."""
    from hashlib import sha256

    _reverse(index)
    facts = json.loads((index.path / "index.json").read_text())
    facts["files"]["train.parquet"] = sha256((index.path / "train.parquet").read_bytes()).hexdigest()
    (index.path / "index.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "damage",
    [
        _reverse,
        _trust_reversed_rows,
        *(_flip("train.parquet", share) for share in (0.02, 0.3, 0.6, 0.999)),
        _flip("test.parquet", 0.4),
        _flip("index.json", 0.05),
        lambda index: (index.path / "validation.parquet").unlink(),
        lambda index: (index.path / "index.json").write_text("[" * 10000),
    ],
)
def test_a_damaged_index_is_never_believed_and_made_anew_with_a_word(
    world: Path, damage: Callable[[Index], None], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_on(world)
    whole = prepare(recipe, quiet=True)
    assert index_damage(recipe) is None
    damage(whole)
    assert read_index(recipe) is None
    with caplog.at_level(logging.WARNING):
        again = prepare(recipe, quiet=True)
    assert "; it is made anew" in caplog.text
    assert again.fingerprint == whole.fingerprint
    assert (again.splits["train"].tokens == whole.splits["train"].tokens).all()


def test_the_launcher_and_the_trainer_find_the_same_identity(world: Path) -> None:
    from trainer.identity import compute_identity

    recipe = recipe_on(world)
    index = prepare(recipe, quiet=True)
    found = find_identity(recipe, index)
    assert found == compute_identity(recipe, index)
    assert found.missing() == []


def test_nodes_that_see_other_models_are_refused_and_the_part_is_named(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that is not the first of its node looks at nothing."""
    from trainer import identity

    recipe = recipe_on(world)
    index = prepare(recipe, quiet=True)
    mine = identity.compute_identity(recipe, index)
    other = RunIdentity({**mine.parts, "model.processor": "b" * 32})
    monkeypatch.setattr(identity, "gather_objects", lambda found: [found, None, found, other])
    with pytest.raises(
        RunError, match=r"model\.processor: is another on the node of rank 3 \(bbbbbbbbbbbb, .*: 1\)"
    ):
        identity.agree_on_identity(recipe, index)
    monkeypatch.setattr(identity, "gather_objects", lambda found: [mine, found, mine])
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(identity, "compute_identity", lambda *_: pytest.fail("looked"))
    assert identity.agree_on_identity(recipe, index) == mine
