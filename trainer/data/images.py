"""Encoded image -> RGB pixels: the one way for `prepare`, training, evaluation and the cache of vision features."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_transforms import convert_to_rgb

from trainer.data.row_errors import RowError, describe_error

MAX_ASPECT_RATIO = 200
"""Qwen2-VL's processor refuses images that are longer than this times their width."""
TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262
WHITE_IS_ZERO = 0
NO_RANGE = {"I": "32-bit grey", "F": "floating point grey"}
"""Modes of Pillow whose values have no agreed black and white; `convert` would cut them at 255."""


def decode_image(image: bytes) -> Image.Image:
    """Return the image in RGB, turned upright by its EXIF tag.

    Transparency is laid on white and palettes are looked up as transformers' own processors do it
    (`convert_to_rgb`); 16-bit grey becomes 8-bit by its range, where Pillow 12 would cut it at 255.

    Raises:
        RowError: whatever Pillow raises, or the values have no agreed range.
    """
    if not image:
        raise RowError("the image is empty (0 bytes)")
    try:
        opened = Image.open(io.BytesIO(image))
        tags = dict(getattr(opened, "tag_v2", {}))  # of a TIFF; lost when it is turned
        upright = ImageOps.exif_transpose(opened)
        if upright.mode.startswith("I;16"):
            return _grey_of_16_bits(upright, tags)
        if upright.mode in NO_RANGE:
            raise RowError(
                f"the image is {NO_RANGE[upright.mode]} (mode {upright.mode}), which has no agreed range; store it "
                "with 8 or 16 bits a pixel"
            )
        if upright.mode == "RGB" and "transparency" not in upright.info:
            return upright
        return Image.fromarray(convert_to_rgb(upright, return_numpy=True))
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError(f"the image has too many pixels ({describe_error(error)}); scale it down") from error
    except UnidentifiedImageError:
        raise RowError(
            f"the image is in no format that Pillow knows ({len(image):,} bytes, the first {image[:8].hex(' ')})"
        ) from None
    except Exception as error:  # Pillow raises a dozen types for damaged files: any of them means a bad image
        raise RowError(f"the image is corrupt ({describe_error(error)})") from error


def refuse_stripe(height: int, width: int) -> None:
    """RowError for an image, of so many pixels, that is longer than the processor takes."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise RowError(f"the aspect ratio is above {MAX_ASPECT_RATIO} ({width} x {height} pixels)")


def _grey_of_16_bits(image: Image.Image, tags: dict[int, Any]) -> Image.Image:
    """The upper 8 of a pixel's bits, as Pillow itself takes them of 16-bit colour.

    A TIFF may hold 12 bits, or white as 0, which Pillow 12 inverts for 8 bits and not for 16.
    """
    values = np.asarray(image).astype(np.uint16)
    spare = 4 if tags.get(TIFF_BITS) == (12,) else 8
    grey = (values >> spare).astype(np.uint8)
    if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")
