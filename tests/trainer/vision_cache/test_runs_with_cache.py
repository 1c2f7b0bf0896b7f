"""A run with kept vision features is the run without them; what is kept is neither decoded nor computed again."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import get_worker_info

from launch.planning.step_plan import MicroBatch
from launch.recipe.loading import dump_recipe, recipe_from_dict
from tests.conftest import SPLIT_SIZES, recipe_values
from tests.helpers.distributed.recorded import apart, evaluations_of, metrics_of
from trainer import train
from trainer.data.encoder import Encoder
from trainer.data.loader import Loader
from trainer.data.micro_batches import assemble
from trainer.data.splits import open_split
from trainer.loop import dataloaders
from trainer.prepare import main as prepare_main
from trainer.prepare import prepare
from trainer.pretrained import load_processor
from trainer.vision_cache.file import Features, Kind
from trainer.vision_cache.store import FeatureCache, image_name, open_cache

STEPS = 9  # of 8 samples: a little more than an epoch of 60
DISTINCT = SPLIT_SIZES["train"] + SPLIT_SIZES["val"]
NEEDED = STEPS * 8 + 3 * SPLIT_SIZES["val"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where features are kept."""
    monkeypatch.setenv("SAMESTEP_VISION_CACHE", str(tmp_path / "features"))
    return tmp_path / "features"


def _write(world: Path, file: Path, vision_cache: str, workers: int | None = None) -> Path:
    values = recipe_values(world)
    values["training"] |= {"max_steps": STEPS, "learning_rate": 2e-4}
    values["data"] |= {"vision_cache": vision_cache}
    values["training"] |= {"dataloader_num_workers": workers} if workers else {}
    file.write_text(dump_recipe(recipe_from_dict(values)))
    return file


def _train(world: Path, folder: Path, name: str, vision_cache: str) -> Path:
    recipe = _write(world, folder / f"{name}.yaml", vision_cache)
    assert train.main([str(recipe), "--runs-dir", str(folder), "--name", name]) == 0
    return folder / name


def _files(place: Path) -> list[Path]:
    return [file for file in place.glob("*/*/??/*") if len(file.name) == 64]


def _forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data workers are forked: what is forbidden here is forbidden there."""
    for name in ("trainer.data.encoder.decode_image", "trainer.model.vision.image_features"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("an image was decoded or computed"))


def _of_images(caplog: pytest.LogCaptureFixture) -> tuple[int, int, int]:
    """(there, needed, added) of the last run, by its own words."""
    found = re.findall(r"(\d+) of (\d+) images of rank 0 were there; (\d+) added", caplog.text)
    caplog.clear()
    there, needed, added = map(int, found[-1])
    return there, needed, added


@pytest.fixture(scope="module")
def off(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.loop.build.open_cache", lambda *_: pytest.fail("a cache was opened"))
        return _train(world, tmp_path_factory.mktemp("off"), "off", "off")


def _assert_same(run: Path, off: Path) -> None:
    loss, weights = apart(run, off)
    print(f"{run.name}: losses within {loss:.1e} relative, adapters within {weights:.1e}")
    assert max(loss, weights) <= 1e-6
    for line, expected in zip(evaluations_of(run), evaluations_of(off), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_a_run_that_fills_features_in_memory_is_the_run_without_and_leaves_none(
    world: Path, off: Path, place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trainer")
    _assert_same(_train(world, tmp_path, "memory", "memory"), off)
    there, needed, added = _of_images(caplog)
    assert (needed, added) == (NEEDED, DISTINCT)
    assert there >= 2 * SPLIT_SIZES["val"]  # the second and third evaluation's
    assert not list(place.rglob("*"))


def test_a_sample_with_kept_features_is_the_sample_but_for_its_pixels(world: Path, tmp_path: Path) -> None:
    """Whole packed micro-batches of hits, misses and both; the token counts of the index hold for all."""
    recipe = recipe_from_dict(recipe_values(world))
    index = prepare(recipe, quiet=True)
    split, rows = index.splits["train"], open_split(recipe, "train")
    kind = Kind(b"k" * 16, torch.float32, 8, 2)
    plain = Encoder(load_processor(recipe), recipe.data.system_message, "answer")
    keeping = replace(plain, features=open_cache("disk", kind, {}))
    assert keeping.features is not None
    kept = {}
    for number in range(0, len(split), 2):
        sample = plain(rows[number])
        visual = int(split.visual_tokens[number])
        kept[number] = torch.randn(visual, 8)
        keeping.features.write(
            image_name(rows[number].images[0]), Features(kept[number], sample.images[0].grid)
        )
    for chosen in ((0, 2, 4), (1, 3), (7, 8, 10, 9, 11, 0), (2,)):
        batch = MicroBatch(chosen, filler=False)
        one, other = (dict(assemble(rows, split, of, batch, 3, 9)["inputs"]) for of in (keeping, plain))
        vision = ("pixel_values", "fresh", "cached", "vision", "image_grid")
        for key, value in other.items():
            if not key.startswith(vision):
                same = torch.equal(one[key], value) if isinstance(value, torch.Tensor) else one[key] == value
                assert same, key
        places = torch.cat([one["fresh_positions"], one["cached_positions"]])
        assert torch.equal(places.sort().values, other["fresh_positions"])
        hits = [number for number in chosen if number in kept]
        assert torch.equal(
            one["cached_features"], torch.cat([kept[n] for n in hits]) if hits else torch.empty(0)
        )
        owners = one["sample_ids"][one["cached_positions"]].unique_consecutive()
        assert owners.tolist() == hits
        assert len(one["fresh_images"]) == len(one["fresh_grids"]) == len(chosen) - len(hits)


def test_features_of_another_size_than_the_index_knows_stop_the_run(world: Path) -> None:
    from launch.errors import RunError

    recipe = recipe_from_dict(recipe_values(world))
    index = prepare(recipe, quiet=True)
    split, rows = index.splits["train"], open_split(recipe, "train")
    cache = open_cache("disk", Kind(b"k" * 16, torch.float32, 8, 2), {})
    encoder = Encoder(load_processor(recipe), recipe.data.system_message, "answer", cache)
    cache.write(image_name(rows[0].images[0]), Features(torch.zeros(35, 8), (1, 10, 14)))
    with pytest.raises(RunError, match="the index says"):
        assemble(rows, split, encoder, MicroBatch((0,), filler=False), 0, 1)


def _prepared(recipe: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert prepare_main([str(recipe), "--vision", "--quiet"]) == 0
    return capsys.readouterr().out


def test_prepare_fills_the_cache_for_runs_and_goes_on_where_it_was(
    world: Path,
    off: Path,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Then a run that finds every image, and one that finds half of them."""
    recipe = _write(world, tmp_path / "disk.yaml", "disk")
    said = _prepared(recipe, capsys)
    assert f"{DISTINCT} images, {DISTINCT} of them to compute on cpu: 0.2 MB" in said
    assert f"images are in {place}/disk/" in said
    files = sorted(_files(place))
    assert len(files) == DISTINCT
    for file in files[:5]:
        file.unlink()
    stamps = {file: file.stat().st_mtime_ns for file in files[5:]}
    assert "5 of them to compute on cpu" in _prepared(recipe, capsys)
    assert {file: file.stat().st_mtime_ns for file in files[5:]} == stamps
    assert sorted(_files(place)) == files

    caplog.set_level(logging.INFO, "trainer")
    with monkeypatch.context() as forbidding:
        _forbid(forbidding)
        _assert_same(_train(world, tmp_path, "hits", "disk"), off)
    assert _of_images(caplog) == (NEEDED, NEEDED, 0)

    for file in files[::2]:
        file.unlink()
    _assert_same(_train(world, tmp_path, "mixed", "disk"), off)
    there, needed, added = _of_images(caplog)
    assert DISTINCT / 2 <= there < needed
    assert added == DISTINCT // 2
    assert sorted(_files(place)) == files


def test_a_step_begins_with_features_that_were_read_ahead_and_is_the_step_that_reads_them_itself(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data workers find no features here, so that all of them come late, to two micro-batches a step."""
    read, use = FeatureCache.read, dataloaders.use_late_features
    monkeypatch.setattr(FeatureCache, "read", lambda *of: None if get_worker_info() else read(*of))
    recipe = _write(world, tmp_path / "disk.yaml", "disk", workers=1)
    assert prepare_main([str(recipe), "--vision", "--quiet"]) == 0
    lacking: list[int] = []

    def count(batch: Any, *of: Any) -> Any:
        lacking.append(len(batch["inputs"]["fresh_images"]))
        return use(batch, *of)

    monkeypatch.setattr(dataloaders, "use_late_features", count)

    def run(name: str) -> list[object]:
        lacking.clear()
        assert train.main([str(recipe), "--runs-dir", str(tmp_path), "--name", name]) == 0
        figures = ("loss", "grad_norm", "samples_digest")
        lines = [[line[figure] for figure in figures] for line in metrics_of(tmp_path / name)]
        files = sorted((tmp_path / name).glob("checkpoint-*/*.safetensors"))
        return [lines, *(file.read_bytes() for file in files)]

    ahead = run("ahead")
    assert lacking == [4, 4, *[0, 4] * (STEPS - 1)]
    monkeypatch.setattr(Loader, "read_ahead", lambda *_: None)
    itself = run("itself")
    assert lacking == [4, 4] * STEPS
    assert len(ahead) > 1
    assert ahead == itself


def test_prepare_states_what_it_needs_and_refuses_what_does_not_fit(
    world: Path,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = _write(world, tmp_path / "off.yaml", "off")
    assert "; a run uses them with --set data.vision_cache=disk" in _prepared(recipe, capsys)
    needed = sum(file.stat().st_size for file in _files(place))
    shutil.rmtree(place)
    monkeypatch.setenv("SAMESTEP_VISION_CACHE_GB", str((needed - 1) / 1e9))
    assert prepare_main([str(recipe), "--vision", "--quiet"]) == 2
    assert "SAMESTEP_VISION_CACHE_GB: 0.2 MB more are needed" in capsys.readouterr().err
    assert _files(place) == []
    monkeypatch.setenv("SAMESTEP_VISION_CACHE_GB", str(needed / 1e9))
    _prepared(recipe, capsys)
    assert len(_files(place)) == DISTINCT


def test_prepare_refuses_to_fill_what_ends_with_the_run(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare_main([str(_write(world, tmp_path / "m.yaml", "memory")), "--vision", "--quiet"]) == 2
    assert "give --set data.vision_cache=disk" in capsys.readouterr().err
