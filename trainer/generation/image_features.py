"""The vision tower's features of the images of rows: each image once, those to come decoded ahead in threads."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from trainer.data.images import decode_image
from trainer.data.row_errors import naming_row
from trainer.model.attention import packed_tower
from trainer.model.families.modelling import Grid
from trainer.model.vision import features_of_images

if TYPE_CHECKING:
    from trainer.data.splits import Rows  # its library takes half a second, and who asks reads no rows

CACHE_BYTES = 2 << 30  # of features on the device
AHEAD = 64  # rows whose images are decoded before they are asked for; 13 MB for a chart
THREADS = 8
PATCHES = 24_576  # that go through the tower together: eight charts

_Processed = tuple[Tensor, Grid]
"""The patches [P, values] of an image and their grid (time, height, width)."""


@dataclass(frozen=True)
class ImageMaps:
    """The features of one image: `values` [V, maps * hidden] on the device, as the embeddings take them; its grid."""

    values: Tensor
    grid: Grid

    def visual_tokens(self, merge: int) -> int:
        """Count the tokens that stand for it in a prompt; `merge`: patches of one on each side."""
        time, height, width = self.grid
        return time * height * width // merge**2


@dataclass
class ImageFeatures:
    """The features of the images of `rows`, in the tower's own dtype, as in training.

    `packed`: several images go through the tower together, through the kernels of training; else each alone, as
    transformers computes it.
    """

    base: PreTrainedModel
    processor: ProcessorMixin
    rows: Rows
    packed: bool
    _known: OrderedDict[int, list[ImageMaps]] = field(default_factory=OrderedDict)
    _to_come: deque[int] = field(default_factory=deque)
    _ahead: dict[int, Future[list[_Processed]]] = field(default_factory=dict)
    _pool: ThreadPoolExecutor | None = None
    _reading: Lock = field(default_factory=Lock)

    def forget(self) -> None:
        """Drop what is known: the tower has changed."""
        self._known.clear()

    def look_ahead(self, rows: Iterable[int]) -> None:
        """Begin to decode the images of rows in the order in which they will be asked for."""
        self.stop()
        self._to_come = deque(dict.fromkeys(rows))
        self._pool = ThreadPoolExecutor(THREADS, "images", torch.set_num_threads, (1,))
        self._fill()

    def stop(self) -> None:
        """Decode no more ahead."""
        self._to_come.clear()
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _fill(self) -> None:
        while self._pool is not None and self._to_come and len(self._ahead) < AHEAD:
            row = self._to_come.popleft()
            if row not in self._known:
                self._ahead[row] = self._pool.submit(self._process, row)

    @torch.no_grad()
    def of(self, rows: Sequence[int]) -> list[list[ImageMaps]]:
        """Return the features of the images of each row.

        Raises:
            RunError: an image cannot be read; it names the row.
        """
        features_by_row: dict[int, list[ImageMaps]] = {}
        unknown: dict[int, list[_Processed]] = {}
        for row in dict.fromkeys(rows):
            if row in self._known:
                self._known.move_to_end(row)
                features_by_row[row] = self._known[row]
            else:
                coming = self._ahead.pop(row, None)
                self._fill()
                unknown[row] = coming.result() if coming is not None else self._process(row)
        encoded = iter(self._encode([image for images in unknown.values() for image in images]))
        for row, images in unknown.items():
            features_by_row[row] = self._known[row] = [next(encoded) for _ in images]
        size = sum(image.values.nbytes for images in self._known.values() for image in images)
        while size > CACHE_BYTES and self._known:
            _, oldest = self._known.popitem(last=False)
            size -= sum(image.values.nbytes for image in oldest)
        return [features_by_row[row] for row in rows]

    def _process(self, row: int) -> list[_Processed]:
        processed = []
        with naming_row(f"data: row {row} of the split"):
            with self._reading:  # a table has one place in its file
                images = self.rows[row].images
            for image in images:
                encoded = self.processor.image_processor(images=[decode_image(image)], return_tensors="pt")
                time, height, width = encoded["image_grid_thw"][0].tolist()
                processed.append((encoded["pixel_values"], (time, height, width)))
        return processed

    def _encode(self, images: Sequence[_Processed]) -> list[ImageMaps]:
        if not self.packed:
            return [ImageMaps(self._alone(pixels, grid), grid) for pixels, grid in images]
        encoded: list[ImageMaps] = []
        for begin, end in chunks([len(pixels) for pixels, _ in images], PATCHES):
            grids = [grid for _, grid in images[begin:end]]
            with packed_tower(self.base):
                values = features_of_images(
                    self.base.model, [pixels for pixels, _ in images[begin:end]], grids
                )
            # Copies, as a part would keep the memory of all that were computed with it.
            encoded += [ImageMaps(part.clone(), grid) for part, grid in zip(values, grids, strict=True)]
        return encoded

    def _alone(self, pixels: Tensor, grid: Grid) -> Tensor:
        device = self.base.device
        with torch.autocast(device.type, enabled=False):
            grids = torch.tensor([grid], device=device)
            output: Any = self.base.get_image_features(pixels.to(device), grids, return_dict=True)
        maps = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
        return torch.cat([of_images[0] for of_images in maps], dim=1)


def chunks(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Return the bounds of consecutive items of no more than `most` together, or one."""
    bounds, begin, together = [], 0, 0
    for number, size in enumerate(sizes):
        if number > begin and together + size > most:
            bounds.append((begin, number))
            begin, together = number, 0
        together += size
    return [*bounds, (begin, len(sizes))] if sizes else []
