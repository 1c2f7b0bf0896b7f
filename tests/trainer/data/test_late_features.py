"""A micro-batch that was packed before features came into the cache is the one that is packed afterwards."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.recipe.loading import recipe_from_dict
from tests.conftest import recipe_values
from trainer.data.encoder import Encoder, Sample
from trainer.data.late_features import with_late_features
from trainer.data.loader import Loader
from trainer.data.micro_batches import Batches
from trainer.data.packing import pack
from trainer.data.splits import open_split
from trainer.loop.dataloaders import add_late_features, use_late_features
from trainer.pretrained import load_processor
from trainer.vision_cache.file import Features, Kind
from trainer.vision_cache.store import FeatureCache
from trainer.vision_cache.writer import FeatureWriter

HIDDEN = 8


@pytest.fixture(scope="module")
def samples(world: Path) -> list[Sample]:
    recipe = recipe_from_dict(recipe_values(world))
    encoder = Encoder(load_processor(recipe), recipe.data.system_message, "answer")
    rows = open_split(recipe, "train")
    found = {sample.images[0].name: sample for sample in (encoder(rows[number]) for number in range(8))}
    return list(found.values())[:4]


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    kind = Kind(b"k" * 16, torch.float32, HIDDEN, 2)
    (tmp_path / kind.key.hex()).mkdir()
    return FeatureCache(tmp_path, kind, "disk", 10**9)


def _features(sample: Sample) -> torch.Tensor:
    grid = sample.images[0].grid
    visual = grid[0] * grid[1] * grid[2] // 4
    return torch.arange(visual * HIDDEN, dtype=torch.float32).view(visual, HIDDEN) + grid[1]


def _cached(sample: Sample) -> Sample:
    image = replace(sample.images[0], pixel_values=None, features=_features(sample))
    return replace(sample, images=(image,))


def _pack(samples: list[Sample], image_token_id: int) -> dict[str, Any]:
    ids = range(len(samples))
    return dict(pack(samples, sample_ids=ids, step=0, masked=False, image_token_id=image_token_id, merge=2))


@pytest.mark.parametrize("late", [[1], [0, 3], [0, 1, 2, 3]])
def test_a_micro_batch_takes_the_features_that_were_written_after_it_was_packed(
    samples: list[Sample], cache: FeatureCache, world: Path, late: list[int]
) -> None:
    token = load_processor(recipe_from_dict(recipe_values(world))).image_token_id
    early = [_cached(samples[2]), *samples]
    before = _pack(early, token)
    before |= {"fresh_grids": [list(grid) for grid in before["fresh_grids"]]}  # as it comes when it is pinned
    for number in late:
        sample = samples[number]
        cache.write(sample.images[0].name, Features(_features(sample), sample.images[0].grid))
    after = [_cached(sample) if number in late else sample for number, sample in enumerate(samples)]
    expected = _pack([early[0], *after], token)
    found = with_late_features(before, cache)  # type: ignore[arg-type]
    assert found.keys() == expected.keys()
    order = found["cached_positions"].argsort()
    for name, value in expected.items():
        mine = found[name]  # type: ignore[literal-required]
        if name in ("cached_positions", "cached_features"):
            assert torch.equal(mine[order], value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(mine, value) or mine.numel() == value.numel() == 0
        else:
            assert mine == value


class _Packed(Batches):
    def __init__(self, inputs: dict[str, Any]) -> None:
        self._inputs = inputs

    def batch(self, number: int) -> Any:
        return {"inputs": self._inputs, "images": 4}


def test_features_that_are_read_ahead_outlive_their_files_and_the_rest_is_read_or_computed_later(
    samples: list[Sample], cache: FeatureCache, world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of four images one is there, one is cut off, one comes after the reading ahead, and one never."""
    token = load_processor(recipe_from_dict(recipe_values(world))).image_token_id
    there, cut, later, never = samples
    path = {sample.images[0].name: cache.path_of(sample.images[0].name) for sample in samples}
    for sample in (there, cut):
        cache.write(sample.images[0].name, Features(_features(sample), sample.images[0].grid))
    with path[cut.images[0].name].open("r+b") as file:
        file.truncate(200)
    writer = FeatureWriter(cache, pytest.fail)
    loader = Loader(_Packed(_pack(samples, token)), range(1), total=1, workers=0, pin_memory=False).begin()
    loader.read_ahead(partial(add_late_features, cache=cache))
    assert "a file is ignored: it has 200 bytes" in caplog.text
    path[there.images[0].name].unlink()
    cache.write(later.images[0].name, Features(_features(later), later.images[0].grid))
    (batch,) = (use_late_features(batch, cache, writer) for batch in loader)
    expected = _pack([_cached(there), cut, _cached(later), never], token)
    for name in ("fresh_images", "cached_features", "cached_positions", "fresh_positions", "pixel_values"):
        value, wanted = batch["inputs"][name], expected[name]  # type: ignore[literal-required]
        assert torch.equal(value, wanted) if isinstance(wanted, torch.Tensor) else value == wanted, name
    assert (writer.needed, writer.computed) == (4, 2)


def test_nothing_changes_where_nothing_came(samples: list[Sample], cache: FeatureCache, world: Path) -> None:
    token = load_processor(recipe_from_dict(recipe_values(world))).image_token_id
    packed = _pack(samples, token)
    assert with_late_features(packed, cache) is packed  # type: ignore[arg-type, comparison-overlap]
