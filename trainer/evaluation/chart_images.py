"""The charts of some rows of a split as small WebP files: what `samestep report` shows beside the answers.

    python -m trainer.evaluation.chart_images --run-dir RUN --split test --rows 0,5,17 --output FOLDER

Without torch, whose import alone would take longer than all images.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets.utils.logging import disable_progress_bar
from PIL import Image, ImageOps

from launch.console import echo
from launch.errors import ConfigError, SamestepError
from launch.inputs.dataset_index import SPLITS
from launch.option_values import add_option, place
from launch.recipe.loading import load_recipe
from launch.run.directory import RunDirectory
from trainer.data.splits import open_split

MAX_THUMBNAIL_BYTES = 2**16  # bytes of a file
THUMBNAIL_SIZES = (
    (640, 82),
    (480, 75),
    (360, 60),
    (240, 40),
)  # the longest side in pixels, and WebP's quality


def thumbnail(images: Sequence[bytes]) -> bytes:
    """Return the encoded images of a row side by side as WebP of `MAX_THUMBNAIL_BYTES` at most, upright, on white.

    For a reader's eyes: training decodes by `trainer.data.images`, which imports torch.

    Raises:
        Exception: whatever Pillow raises for a damaged image.
    """
    flat = _side_by_side([_on_white(image) for image in images])
    for size, quality in THUMBNAIL_SIZES:
        flat.thumbnail((size * min(len(images), 3), size), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        flat.save(buffer, "WEBP", quality=quality)
        if buffer.tell() <= MAX_THUMBNAIL_BYTES:
            break
    return buffer.getvalue()


def _on_white(image: bytes) -> Image.Image:
    layer = ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert("RGBA")
    layer.thumbnail((THUMBNAIL_SIZES[0][0], THUMBNAIL_SIZES[0][0]), Image.Resampling.LANCZOS)
    flat = Image.new("RGB", layer.size, "white")
    flat.paste(layer, mask=layer.getchannel("A"))
    return flat


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    if len(images) == 1:
        return images[0]
    flat = Image.new(
        "RGB", (sum(each.width for each in images), max(each.height for each in images)), "white"
    )
    left = 0
    for each in images:
        flat.paste(each, (left, 0))
        left += each.width
    return flat


def write_images(run: RunDirectory, split: str, rows: Sequence[int], output: Path) -> None:
    """Write `<row>.webp` for every row whose image can be decoded; the others are named in a warning.

    Raises:
        ConfigError: the split cannot be opened.
    """
    if split not in SPLITS:
        raise ConfigError(f"--split: {split!r} is no split; choose of {', '.join(SPLITS)}")
    source = open_split(load_recipe(run.recipe_file), split)
    of_split = set(source.numbers.tolist())
    for row in rows:
        if row not in of_split:
            echo(
                f"row {row}: the {split} split does not have it now; shown without its chart", to_stderr=True
            )
            continue
        try:
            images = source[row].images
            if not images:
                continue
            small = thumbnail(images)
        except Exception as error:  # Pillow raises a dozen types for damaged files
            echo(f"row {row}: its image cannot be decoded ({type(error).__name__})", to_stderr=True)
            continue
        (output / f"{row}.webp").write_bytes(small)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluation.chart_images", description=__doc__)
    for name in ("--run-dir", "--output"):
        add_option(parser, name, place, required=True)
    parser.add_argument("--split", required=True)
    parser.add_argument("--rows", required=True, help="row numbers, separated by commas")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    try:
        rows = [int(row) for row in options.rows.split(",") if row.isdecimal()]
        write_images(RunDirectory(options.run_dir.absolute()), options.split, rows, options.output)
    except SamestepError as error:
        echo(str(error), to_stderr=True)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
