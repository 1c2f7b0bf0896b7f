"""prepare: what it measures, what it refuses, and that it can be started twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.errors import ConfigError
from launch.inputs.caches import base_is_there
from launch.inputs.dataset_index import read_index
from launch.inputs.identity import model_identity
from launch.recipe.loading import dump_recipe, recipe_from_dict
from launch.recipe.schema import Recipe
from tests.conftest import SPLIT_SIZES, chart_png, chart_rows, recipe_values, write_charts
from trainer.data.encoder import Encoder
from trainer.data.splits import open_split
from trainer.prepare import main, prepare
from trainer.pretrained import base_path, fetch_base, load_processor


def _recipe(world: Path, **data: Any) -> Recipe:
    values = recipe_values(world)
    values["data"] |= data
    return recipe_from_dict(values)


def _with_rows(
    world: Path, folder: Path, damage: Callable[[list[dict[str, Any]]], None], **data: Any
) -> Recipe:
    rows = {split: chart_rows(12, seed) for seed, split in enumerate(SPLIT_SIZES)}
    damage(rows["train"])
    return _recipe(world, dataset=str(write_charts(folder / "charts", rows)), **data)


def test_the_index_holds_what_the_processor_makes_of_every_row(world: Path) -> None:
    recipe = _recipe(world)
    index = prepare(recipe, quiet=True)
    encoder = Encoder(load_processor(recipe), recipe.data.system_message, "answer")
    rows = open_split(recipe, "train")
    split = index.splits["train"]
    assert len(split) == SPLIT_SIZES["train"]
    for number in range(len(split)):
        sample = encoder(rows[number])
        assert split.tokens[number] == len(sample.input_ids)
        assert split.target_tokens[number] == sample.target_tokens
        assert split.visual_tokens[number] == sample.images[0].visual_tokens(2)
    assert split.human_or_machine.tolist() == [number % 2 for number in range(len(split))]
    assert len(np.unique(split.visual_tokens)) > 3


def test_sequence_loss_counts_every_token_but_the_first(world: Path) -> None:
    split = prepare(_recipe(world, loss="sequence"), quiet=True).splits["train"]
    assert (split.target_tokens == split.tokens - 1).all()


def test_the_fingerprint_follows_the_content_and_nothing_else(world: Path, tmp_path: Path) -> None:
    def prepared(folder: str, damage: Callable[[list[dict[str, Any]]], None]) -> str:
        return prepare(_with_rows(world, tmp_path / folder, damage), quiet=True).fingerprint

    plain = prepared("a", lambda rows: None)
    assert prepared("b", lambda rows: None) == plain
    assert prepared("c", lambda rows: rows[3].update(label=["other"])) != plain
    assert prepared("d", lambda rows: rows[3].update(query="another question")) != plain
    assert prepared("e", lambda rows: rows[3].update(image={"bytes": chart_png(99), "path": None})) != plain
    assert prepared("f", lambda rows: rows.reverse()) != plain


def test_changed_files_make_the_index_stale(world: Path, tmp_path: Path) -> None:
    recipe = _with_rows(world, tmp_path, lambda rows: None)
    prepare(recipe, quiet=True)
    assert read_index(recipe) is not None
    write_charts(tmp_path / "charts", {"train": chart_rows(13, 5)})
    assert read_index(recipe) is None
    assert len(prepare(recipe, quiet=True).splits["train"]) == 13


PNG = chart_png(1)
BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "missing image": ({"image": None}, "the image is missing"),
    "corrupt image": ({"image": {"bytes": PNG[: len(PNG) // 2], "path": None}}, "the image is corrupt"),
    "not an image": ({"image": {"bytes": b"hello", "path": None}}, "the image is in no format"),
    "empty image": ({"image": {"bytes": b"", "path": None}}, "the image is empty (0 bytes)"),
    "empty query": ({"query": "  "}, "query is empty"),
    "missing query": ({"query": None}, "query is missing"),
    "no label": ({"label": []}, "label is empty"),
    "empty label": ({"label": [""]}, "label is empty"),
    "second image": ({"query": "what is <|image_pad|> here"}, "the special token <|image_pad|>"),
    "neither human nor machine": ({"human_or_machine": 7}, "human_or_machine is 7"),
}


def test_every_bad_row_is_listed_with_its_reason_and_nothing_is_written(world: Path, tmp_path: Path) -> None:
    def damage(rows: list[dict[str, Any]]) -> None:
        for number, (change, _) in enumerate(BAD_ROWS.values()):
            rows[number].update(change)

    recipe = _with_rows(world, tmp_path, damage)
    with pytest.raises(ConfigError) as raised:
        prepare(recipe, quiet=True)
    message = str(raised.value)
    assert f"{len(BAD_ROWS)} bad rows" in message
    for number, (_, reason) in enumerate(BAD_ROWS.values()):
        rows = "6, 7" if reason == "label is empty" else str(number)
        line = next(line for line in message.splitlines() if f" {rows}: " in line)
        assert reason in line
    assert read_index(recipe) is None


def test_a_needle_of_an_image_is_refused(world: Path, tmp_path: Path) -> None:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (2100, 10)).save(file, "PNG")
    needle = {"bytes": file.getvalue(), "path": None}
    with pytest.raises(ConfigError, match=r"train row 4: the aspect ratio is above 200 \(2100 x 10 pixels\)"):
        prepare(_with_rows(world, tmp_path, lambda rows: rows[4].update(image=needle)), quiet=True)


def test_bad_rows_can_be_dropped_and_are_written_down(world: Path, tmp_path: Path) -> None:
    def damage(rows: list[dict[str, Any]]) -> None:
        rows[0].update(query="")
        rows[5].update(image=None)

    index = prepare(_with_rows(world, tmp_path, damage, on_bad_row="drop"), quiet=True)
    assert index.splits["train"].rows.tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    dropped = [json.loads(line) for line in (index.path / "dropped_rows.jsonl").read_text().splitlines()]
    assert [(line["split"], line["row"]) for line in dropped] == [("train", 0), ("train", 5)]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"dataset": "/nowhere/at/all"},
            "'/nowhere/at/all' is not a folder here (/nowhere/at/all) and not a hub id",
        ),
        ({"dataset": "./all"}, "is not a folder here (HERE/all, relative to the current folder) and not"),
        (
            {"dataset": "nobody/charts"},
            "on the hub (it is not a folder here: HERE/nobody/charts, relative to the current folder)",
        ),
        ({"train": "training"}, "no training.parquet or training-*.parquet"),
        ({"dataset": "nobody/chart-questions"}, "check this machine's network and HTTPS_PROXY"),
    ],
)
def test_data_that_is_not_there_is_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: dict[str, str], words: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(_recipe(world, **data)))
    assert main([str(file), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert words.replace("HERE", str(Path.cwd())) in said
    assert "Traceback" not in said


def test_wrong_columns_and_types_are_named(world: Path, tmp_path: Path) -> None:
    rows = {split: chart_rows(12, seed) for seed, split in enumerate(SPLIT_SIZES)}
    texts = {
        split: [{**row, "label": {"text": row["label"][0]}} for row in of_split]
        for split, of_split in rows.items()
    }
    words = "train rows 0, 1, 2, 3, 4 and 7 more: label is of type dict, not text"
    with pytest.raises(ConfigError, match=words):
        prepare(_recipe(world, dataset=str(write_charts(tmp_path / "texts", texts))), quiet=True)
    fewer = {
        split: [{key: row[key] for key in ("image", "query", "label")} for row in of_split]
        for split, of_split in rows.items()
    }
    folder = write_charts(tmp_path / "fewer", fewer)
    with pytest.raises(ConfigError, match="lacks the columns human_or_machine"):
        prepare(_recipe(world, dataset=str(folder), format="chartqa"), quiet=True)
    numbers = {split: [{**row, "image": 3} for row in of_split] for split, of_split in rows.items()}
    with pytest.raises(ConfigError, match="the column image holds int64"):
        prepare(_recipe(world, dataset=str(write_charts(tmp_path / "numbers", numbers))), quiet=True)


def test_a_missing_base_is_named(world: Path, tmp_path: Path) -> None:
    values = recipe_values(world)
    for name, words in (
        (str(tmp_path), "no config.json"),
        ("nobody/qwen2-vl", "is not in the cache and the hub cannot be reached"),
    ):
        values["model"]["name_or_path"] = name
        with pytest.raises(ConfigError, match=words):
            base_path(recipe_from_dict(values))


def test_a_folder_without_a_base_is_not_looked_for_on_the_hub(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.pretrained.hub_snapshot", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "folder").mkdir(parents=True)
    values = recipe_values(world)
    for name in ("some/folder", "./some", "/"):  # one slash each, as a hub id has
        values["model"]["name_or_path"] = name
        with pytest.raises(ConfigError, match=r"no config\.json"):
            fetch_base(recipe_from_dict(values))


def test_two_processes_may_start_it_at_once(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(_with_rows(world, tmp_path, lambda rows: None)))
    environment = {**os.environ, "SAMESTEP_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "trainer.prepare", str(file), "--quiet"]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0] != ""
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"SAMESTEP_CACHE: .* cannot be written"):
        prepare(_recipe(world), quiet=True)


def test_a_damaged_index_is_made_anew(world: Path, tmp_path: Path) -> None:
    recipe = _with_rows(world, tmp_path, lambda rows: None)
    whole = prepare(recipe, quiet=True)
    for damage in ("", "{}"):
        (whole.path / "index.json").write_text(damage)
        assert read_index(recipe) is None
        assert prepare(recipe, quiet=True).fingerprint == whole.fingerprint
    (whole.path / "train.parquet").write_bytes(b"PAR1")
    assert read_index(recipe) is None
    assert prepare(recipe, quiet=True).fingerprint == whole.fingerprint


def test_two_bases_of_one_shape_are_two(tmp_path: Path) -> None:
    from trainer.embedded.tiny_model import random_tiny

    for name, seed in (("0", 0), ("1", 1), ("again", 0)):
        random_tiny(tmp_path / name, seed=seed)
    assert (
        model_identity(tmp_path / "0") == model_identity(tmp_path / "again") != model_identity(tmp_path / "1")
    )


def test_a_missing_base_is_seen_without_the_libraries_that_load_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe_values(world)
    assert base_is_there(recipe_from_dict(values))
    values["model"]["name_or_path"] = "somebody/qwen2-vl"
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert not base_is_there(recipe_from_dict(values))
    snapshot = tmp_path / "hub" / "models--somebody--qwen2-vl" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"")
    assert base_is_there(recipe_from_dict(values))


def test_a_snapshot_with_the_processor_alone_is_not_a_base(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `AutoProcessor.from_pretrained` leaves in the hub's cache."""
    values = recipe_values(world)
    values["model"]["name_or_path"] = "somebody/qwen2-vl"
    cache = tmp_path / "models--somebody--qwen2-vl"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    monkeypatch.setattr("trainer.pretrained.snapshot_download", lambda *_, **__: str(snapshot))
    with pytest.raises(
        ConfigError, match=r"lacks model\.safetensors, preprocessor_config\.json, .* \(3 files\)"
    ):
        base_path(recipe_from_dict(values))
    for name in ("model.safetensors", "preprocessor_config.json", "tokenizer_config.json"):
        (snapshot / name).write_bytes(b"")
    assert base_path(recipe_from_dict(values)) == str(snapshot)


@pytest.mark.parametrize(
    ("missing", "words"),
    [("processor_config.json", "no processor"), ("tokenizer.json", "are missing or another model's")],
)
def test_a_base_without_its_processor_is_named(world: Path, tmp_path: Path, missing: str, words: str) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    (tmp_path / "base" / missing).unlink()
    values = recipe_values(world)
    values["model"]["name_or_path"] = str(tmp_path / "base")
    with pytest.raises(ConfigError, match=words):
        prepare(recipe_from_dict(values), quiet=True)
