"""The charts that a report shows: small, the right ones, and none that stops the others."""

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from launch.recipe.loading import dump_recipe, recipe_from_dict
from tests.conftest import chart_rows, recipe_values, write_charts
from trainer.data.splits import open_split
from trainer.evaluation.chart_images import MAX_THUMBNAIL_BYTES, main, thumbnail


def test_each_row_gets_its_own_chart_and_a_damaged_one_is_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = chart_rows(4, 7)
    rows[2]["image"]["bytes"] = b"no image"
    folder = write_charts(tmp_path / "charts", dict.fromkeys(("train", "val", "test"), rows))
    values = recipe_values(world)
    values["data"]["dataset"] = str(folder)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_from_dict(values)))
    output = tmp_path / "out"
    output.mkdir()
    arguments = ["--run-dir", str(tmp_path), "--split", "test", "--output", str(output)]
    assert main([*arguments, "--rows", "3,2,0,99"]) == 0
    assert {file.name for file in output.iterdir()} == {"0.webp", "3.webp"}
    said = capsys.readouterr().err
    assert "row 2" in said
    assert "row 99: the test split does not have it now" in said
    stored = pq.read_table(folder / "test-00000.parquet").to_pylist()[3]["image"]["bytes"]
    assert (output / "3.webp").read_bytes() == thumbnail([stored])
    values["data"] |= {
        "train": "test",
        "validation": "test, 50 %",
        "test": None,
    }  # drawn: numbers are the source's
    recipe = recipe_from_dict(values)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    drawn = open_split(recipe, "validation").numbers.tolist()
    last = next(row for row in reversed(drawn) if row != 2)
    for file in output.iterdir():
        file.unlink()
    arguments[3] = "validation"
    assert main([*arguments, "--rows", f"{last}"]) == 0
    assert [file.name for file in output.iterdir()] == [f"{last}.webp"]
    assert last >= len(drawn)  # a number that no split of so few rows would have by position
    (folder / "test-00000.parquet").unlink()
    assert main([*arguments, "--rows", "0"]) == 2


def test_a_chart_is_small_upright_and_on_white() -> None:
    def encoded(image: Image.Image, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **options)
        return buffer.getvalue()

    noise = Image.effect_noise((3000, 2000), 200)
    assert len(thumbnail([encoded(noise)])) <= MAX_THUMBNAIL_BYTES
    clear = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    assert Image.open(io.BytesIO(thumbnail([encoded(clear)]))).convert("RGB").getpixel((5, 5)) == (
        255,
        255,
        255,
    )
    tags = Image.Exif()
    tags[0x0112] = 6  # to be turned by a quarter
    turned = thumbnail([encoded(Image.new("RGB", (40, 20)), exif=tags)])
    assert Image.open(io.BytesIO(turned)).size == (20, 40)
    beside = thumbnail([encoded(Image.new("RGB", (40, 20))), encoded(Image.new("RGB", (30, 50)))])
    assert Image.open(io.BytesIO(beside)).size == (70, 50)
