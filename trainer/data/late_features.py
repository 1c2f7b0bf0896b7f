"""Features that came into the cache after a micro-batch was packed: data workers prepare it several steps ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from trainer.data.packing import ModelInputs, cumulative
from trainer.vision_cache.file import Features
from trainer.vision_cache.store import FeatureCache


def with_late_features(inputs: ModelInputs, cache: FeatureCache) -> ModelInputs:
    """Return the packed micro-batch with the cached features of images that were fresh when it was packed.

    What changes is pinned where it was. A micro-batch that shows an image twice stays as it is, and an image whose file
    is missing or flawed stays fresh.
    """
    names = inputs["fresh_images"]
    grids = [tuple(grid) for grid in inputs["fresh_grids"]]  # PyTorch pins a tuple as a list
    if len(names) != len(grids) or len(inputs["fresh_rows"]):
        return inputs
    read = [cache.read(name) for name in names]
    late = [each if each and each.grid == grid else None for each, grid in zip(read, grids, strict=True)]
    return _replaced(inputs, late, cache.kind.merge) if any(late) else inputs


def _replaced(inputs: ModelInputs, late: Sequence[Features | None], merge: int) -> ModelInputs:
    grids = [tuple(grid) for grid in inputs["fresh_grids"]]
    patches = [time * height * width for time, height, width in grids]
    visual = [count // merge**2 for count in patches]
    stay = [number for number, each in enumerate(late) if each is None]
    pixels, positions, places = (
        inputs[name].split(sizes)  # type: ignore[literal-required]
        for name, sizes in (
            ("pixel_values", patches),
            ("vision_positions", patches),
            ("fresh_positions", visual),
        )
    )
    kept = tuple(grids[number] for number in stay)
    lengths = tuple(height * width for time, height, width in kept for _ in range(time))
    features = [each.values for each in late if each is not None]
    was = [inputs["cached_features"]] if len(inputs["cached_positions"]) else []
    came = [place for place, each in zip(places, late, strict=True) if each is not None]
    pinned = inputs["input_ids"].is_pinned()
    changes: dict[str, Tensor] = {
        "pixel_values": _joined(pixels, stay),
        "vision_positions": _joined(positions, stay),
        "fresh_positions": _joined(places, stay),
        "image_grid_thw": inputs["image_grid_thw"][stay],
        "vision_cu_seqlens": cumulative(lengths),
        "cached_features": _features([*was, *features], pinned),
        "cached_positions": torch.cat([inputs["cached_positions"], *came]),
    }
    if pinned:
        changes = {name: value.pin_memory() for name, value in changes.items()}
    names = tuple(inputs["fresh_images"][number] for number in stay)
    replaced = {**inputs, **changes, "fresh_images": names, "fresh_grids": kept, "vision_lengths": lengths}
    return cast(ModelInputs, replaced)


def _features(parts: list[Tensor], pinned: bool) -> Tensor:
    """The features end to end, copied once: a step has some 150 MB of them."""
    shape = sum(len(part) for part in parts), parts[0].shape[1]
    return torch.cat(parts, out=torch.empty(shape, dtype=parts[0].dtype, pin_memory=pinned))


def _joined(parts: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    """Some of the parts end to end; of none an empty tensor of their kind."""
    return torch.cat([parts[number] for number in numbers]) if numbers else parts[0][:0]
