"""`samestep prepare --vision`: the features of every image of a recipe, computed once before any run wants them.

What is there already is left as it is, so a fill that was interrupted goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from launch.errors import ConfigError, RunError, SamestepError
from launch.inputs.dataset_index import Index, SplitName
from launch.planning.make_plan import compute_dtype_of
from launch.planning.run_steps import validation_samples
from launch.recipe.schema import Recipe
from launch.units import decimal_size
from trainer.data.images import decode_image
from trainer.data.loader import data_workers
from trainer.data.row_errors import naming_row
from trainer.data.splits import Rows, open_split
from trainer.model.base import RECIPE_DTYPES, load_base, prepare_tower
from trainer.model.families.registry import feature_width
from trainer.model.vision import features_of_images
from trainer.pretrained import load_processor
from trainer.progress_bars import ReportProgress
from trainer.vision_cache.cache_key import feature_facts, feature_kind
from trainer.vision_cache.file import Features
from trainer.vision_cache.store import (
    SPARED,
    FeatureCache,
    FullError,
    describe_cache,
    image_name,
    open_cache,
)

PASS_TOKENS = 4096
"""Visual tokens that the tower takes together, but for a larger single image."""


@dataclass(frozen=True)
class MissingImage:
    """One distinct image: a row that has it and its place among the row's, and its visual tokens."""

    split: SplitName
    row: int
    place: int
    name: str
    visual_tokens: int


_Processed = tuple[Tensor, tuple[int, int, int]]
"""An image's pixels [P, patch features] and its patches in time, height and width."""
_Encoded = tuple[MissingImage, Tensor, tuple[int, int, int]]


@dataclass(frozen=True)
class Filling:
    """What is to be done: the images without features, and what computes and keeps them."""

    recipe: Recipe
    model: PreTrainedModel
    cache: FeatureCache
    rows: dict[SplitName, Rows]
    processor: Any
    images: int
    missing: list[MissingImage]
    notes: list[str]


def find_missing(recipe: Recipe, index: Index, report: ReportProgress) -> Filling:
    """Which images training and its evaluations will want that have no features yet; `report` is told the samples.

    Raises:
        ConfigError: they would not fit.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(recipe).image_processor
    model = load_base(recipe, device, layers=False)
    facts = feature_facts(recipe, model.model.visual, processor)
    cache = open_cache("disk", feature_kind(model.model.visual, feature_width(model), facts), facts)
    try:
        cache.recount()
    except OSError as error:
        raise ConfigError(
            f"SAMESTEP_VISION_CACHE: {cache.folder} cannot be written ({error.strerror or error}); give permission, "
            "or name another folder"
        ) from error
    rows: dict[SplitName, Rows] = {
        "train": open_split(recipe, "train"),
        "validation": open_split(recipe, "validation"),
    }
    images = list(_images_of(recipe, index, rows, report))
    missing = [image for image in images if not cache.holds(image.name)]
    needed = sum(cache.kind.bytes_of(image.visual_tokens) for image in missing)
    _refuse_want_of_room(cache, needed)
    notes = [
        *describe_cache(cache, facts),
        f"vision features: {len(images)} images, {len(missing)} of them to compute on {device.type}: "
        f"{decimal_size(needed)}",
    ]
    return Filling(recipe, model, cache, rows, processor, len(images), missing, notes)


def fill(filling: Filling, report: ReportProgress) -> None:
    """Compute and keep what is missing; `report` is told the images whose files are there.

    Raises:
        RunError: an image cannot be read any more, or the disk does not take them.
    """
    prepare_tower(filling.model, RECIPE_DTYPES[compute_dtype_of(filling.recipe)])
    pixels = _Pixels(filling.rows, filling.missing, filling.processor)
    loader = DataLoader(pixels, batch_size=None, num_workers=data_workers(1))
    together: list[_Encoded] = []
    count = len(filling.missing)
    for number, (image, processed) in enumerate(zip(filling.missing, loader, strict=True), 1):
        if isinstance(processed, SamestepError):
            raise processed
        together.append((image, *processed))
        if number == count or sum(image.visual_tokens for image, _, _ in together) >= PASS_TOKENS:
            _keep(filling.model, filling.cache, together)
            report(number, count)
            together = []


def _images_of(
    recipe: Recipe, index: Index, rows: dict[SplitName, Rows], report: ReportProgress
) -> Iterator[MissingImage]:
    """Every distinct image of the training split and of the samples that evaluations see."""
    samples_by_split: dict[SplitName, Sequence[int]] = {
        "train": range(len(index.splits["train"])),
        "validation": validation_samples(recipe, index).tolist(),
    }
    seen: set[str] = set()
    total, done = sum(map(len, samples_by_split.values())), 0
    for split, samples in samples_by_split.items():
        facts = index.splits[split]
        for sample in samples:
            row = int(facts.rows[sample])
            with naming_row(f"data: {split} row {row}"):
                images = rows[split][row].images
            for place, (image, tokens) in enumerate(zip(images, facts.tokens_of_images(sample), strict=True)):
                if (name := image_name(image)) not in seen:
                    seen.add(name)
                    yield MissingImage(split, row, place, name, tokens)
            done += 1
            if done % 256 == 0 or done == total:
                report(done, total)


def _refuse_want_of_room(cache: FeatureCache, needed: int) -> None:
    used, disk = cache.used_bytes(), shutil.disk_usage(cache.folder)
    free = int(disk.free - SPARED * disk.total)
    problems = []
    if used + needed > cache.bound:
        problems.append(
            f"SAMESTEP_VISION_CACHE_GB: {decimal_size(needed)} more are needed, {decimal_size(used)} of "
            f"{decimal_size(cache.bound)} are used ({decimal_size(cache.others_bytes())} by other towers or settings "
            f"in {cache.root}); raise it, delete what you need no more, or lower data.max_pixels"
        )
    if needed > free:
        problems.append(
            f"SAMESTEP_VISION_CACHE: {decimal_size(needed)} more are needed, {decimal_size(max(0, free))} can be used "
            f"on the disk of {cache.root}; make room, or name a folder on another disk"
        )
    if needed and problems:
        raise ConfigError(problems)


class _Pixels(Dataset["_Processed | SamestepError"]):
    """The processed pixels [P, patch features] and grid of each missing image; an error is a value, as in `Batches`."""

    def __init__(self, rows: dict[SplitName, Rows], missing: Sequence[MissingImage], processor: Any) -> None:
        self._rows, self._missing, self._processor = rows, missing, processor

    def __len__(self) -> int:
        return len(self._missing)

    def __getitem__(self, number: int) -> _Processed | SamestepError:
        missing = self._missing[number]
        try:
            with naming_row(f"data: {missing.split} row {missing.row}"):
                image = decode_image(self._rows[missing.split][missing.row].images[missing.place])
                encoded = self._processor(images=[image], return_tensors="pt")
        except SamestepError as error:
            return error
        time, height, width = encoded["image_grid_thw"][0].tolist()
        return encoded["pixel_values"], (time, height, width)


def _keep(
    model: PreTrainedModel,
    cache: FeatureCache,
    together: Sequence[_Encoded],
) -> None:
    """The tower over some images at once, and a file for each."""
    grids = [grid for _, _, grid in together]
    features = features_of_images(model.model, [values for _, values, _ in together], grids)
    for (image, _, grid), part in zip(together, features, strict=True):
        try:
            cache.write(image.name, Features(part.cpu(), grid))
        except (FullError, OSError) as error:
            raise RunError(
                f"{cache.folder}: cannot be filled further ({error}); make room and give the same command again"
            ) from error
