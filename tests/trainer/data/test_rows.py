"""Rows that others wrote: `prepare` sees what training will see, and everything that is left out is said and kept."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from launch.errors import ConfigError, RunError
from launch.inputs.dataset_index import index_path
from launch.local.planned_run import load_index
from launch.planning.make_plan import make_plan
from launch.planning.step_plan import MicroBatch
from launch.planning.topology import Topology
from launch.recipe.loading import dump_recipe, recipe_from_dict
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from launch.run.request_files import write_request
from tests.conftest import SPLIT_SIZES, chart_png, chart_rows, recipe_values, write_charts
from trainer.data.encoder import Encoder
from trainer.data.images import decode_image
from trainer.data.lengths import needed_tokens
from trainer.data.micro_batches import assemble
from trainer.data.row_errors import RowError
from trainer.data.rows import Row, question_row
from trainer.data.splits import open_split
from trainer.generation.replica import Replica
from trainer.prepare import main, prepare
from trainer.pretrained import load_processor
from trainer.progress_bars import progress_reports
from trainer.train import main as train


def _recipe(
    world: Path, folder: Path, damage: Callable[[list[dict[str, Any]]], None], count: int = 12, **data: Any
) -> Recipe:
    rows = {split: chart_rows(count, seed) for seed, split in enumerate(SPLIT_SIZES)}
    damage(rows["train"])
    values = recipe_values(world)
    values["data"] |= {"dataset": str(write_charts(folder / "charts", rows)), **data}
    return recipe_from_dict(values)


def _encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of (tag, type, count, value), little-endian."""
    directory, long_values, offset = struct.pack("<H", len(entries)), b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        directory += struct.pack("<HHI", tag, kind, count)
        if len(value) <= 4:
            directory += value.ljust(4, b"\0")
        else:
            directory += struct.pack("<I", offset + len(long_values))
            long_values += value
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + long_values


ORIENTATION, RESOLUTION = 0x112, 0x11A
JPEG = Image.new("RGB", (112, 56), "orange")
UPRIGHT_BY_SIX = (ORIENTATION, 3, 1, struct.pack("<H", 6))
UNWRITABLE = _encoded(
    JPEG, "JPEG", exif=_exif(UPRIGHT_BY_SIX, (RESOLUTION, 10, 1, struct.pack("<ii", -5, 0)))
)
"""A JPEG whose EXIF Pillow 12 reads and cannot write again when it turns the image: `struct.error`."""
_HEADER = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
BOMB = _encoded(JPEG, "PNG")
BOMB = BOMB[:12] + _HEADER + struct.pack(">I", zlib.crc32(_HEADER)) + BOMB[33:]


# images -------------------------------------------------------------------------------------------------------


def _ramp(count: int = 256) -> NDArray[np.uint16]:
    return np.linspace(0, 65535, count).round().astype(np.uint16).reshape(16, -1)


def test_grey_of_16_bits_keeps_its_shades() -> None:
    values = _ramp()
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    expected = (values // 256).astype(np.uint8)
    assert len(np.unique(expected)) == 256
    big_endian = Image.fromarray(values.astype(">u2"))
    assert big_endian.mode == "I;16B"
    for content in (_encoded(image), _encoded(image, "TIFF"), _encoded(big_endian, "TIFF")):
        decoded = np.asarray(decode_image(content))
        assert decoded.shape == (16, 16, 3)
        assert all((decoded[..., channel] == expected).all() for channel in range(3))
    white_is_zero = decode_image(_encoded(image, "TIFF", tiffinfo={262: 0}))
    assert (np.asarray(white_is_zero)[..., 0] == 255 - expected).all()
    clear = np.asarray(decode_image(_encoded(image, transparency=int(values[0, 1]))))
    assert (clear[0, 1] == 255).all()
    assert (clear[0, 2] == expected[0, 2]).all()


def test_a_tiff_of_12_bits_spans_from_black_to_white() -> None:
    def entry(tag: int, value: int) -> bytes:
        return struct.pack("<HHII", tag, 3, 1, value)

    pixels = bytes(
        [0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00]
    )  # 0xFFF, 0x000, 0x800, 0x000: four pixels in six bytes
    tags = {
        256: 4,
        257: 1,
        258: 12,
        259: 1,
        262: 1,
        273: 8 + 2 + 9 * 12 + 4,
        277: 1,
        278: 1,
        279: len(pixels),
    }
    directory = struct.pack("<H", len(tags)) + b"".join(entry(*item) for item in tags.items()) + bytes(4)
    tiff = b"II*\0" + struct.pack("<I", 8) + directory + pixels
    assert Image.open(io.BytesIO(tiff)).mode == "I;16"
    assert np.asarray(decode_image(tiff))[0, :, 0].tolist() == [255, 0, 128, 0]


def test_every_other_mode_is_what_the_stock_processor_makes_of_it() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    colour = Image.fromarray(noise)
    palette = colour.convert("RGB").quantize(16)
    images = {
        "RGBA": _encoded(colour),
        "RGB": _encoded(colour.convert("RGB")),
        "RGB with a clear colour": _encoded(
            colour.convert("RGB"), transparency=tuple(noise[0, 0, :3].tolist())
        ),
        "LA": _encoded(colour.convert("LA")),
        "L": _encoded(colour.convert("L")),
        "1": _encoded(colour.convert("1")),
        "P": _encoded(palette),
        "P with a clear colour": _encoded(palette, transparency=3),
        "CMYK": _encoded(colour.convert("CMYK"), "TIFF"),
        "CMYK in a JPEG": _encoded(colour.convert("CMYK"), "JPEG"),
        "LAB": _encoded(Image.merge("LAB", colour.convert("RGB").split()), "TIFF"),
    }
    for name, content in images.items():
        stock = convert_to_rgb(Image.open(io.BytesIO(content)), return_numpy=True)
        decoded = decode_image(content)
        assert decoded.mode == "RGB"
        assert (np.asarray(decoded) == stock).all(), name
    assert (np.asarray(decode_image(images["RGB with a clear colour"]))[0, 0] == 255).all()


def test_an_image_is_turned_as_pillow_turns_it() -> None:
    turned = _encoded(JPEG, "JPEG", exif=_exif(UPRIGHT_BY_SIX))
    as_text = _encoded(JPEG, "JPEG", exif=_exif((ORIENTATION, 2, 2, b"6\0")))
    assert decode_image(turned).size == (56, 112)
    for content in (turned, as_text):  # as text it turns nothing
        stock = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        assert (np.asarray(decode_image(content)) == np.asarray(stock)).all()
    with pytest.raises(RowError, match=r"the image is corrupt \(struct.error: argument out of range\)"):
        decode_image(UNWRITABLE)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_an_agreed_range_are_refused(mode: str) -> None:
    with pytest.raises(RowError, match=rf"\(mode {mode}\), which has no agreed range"):
        decode_image(_encoded(Image.new(mode, (30, 30)), "TIFF"))


# rows ---------------------------------------------------------------------------------------------------------

BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "unwritable EXIF": (
        {"image": {"bytes": UNWRITABLE, "path": None}},
        "the image is corrupt (struct.error: argument",
    ),
    "floating point": (
        {"image": {"bytes": _encoded(Image.new("F", (30, 30)), "TIFF"), "path": None}},
        "the image is floating point grey (mode F)",
    ),
    "no image file": (
        {"image": {"bytes": None, "path": "charts/nowhere.png"}},
        f"the image file {Path('charts/nowhere.png').absolute()} cannot be read (No such file or directory)",
    ),
    "no image format": (
        {"image": {"bytes": b"hello", "path": None}},
        "the image is in no format that Pillow knows (5 bytes, the first 68 65 6c 6c 6f)",
    ),
    "a bomb": (
        {"image": {"bytes": BOMB, "path": None}},
        "the image has too many pixels (DecompressionBombError: Image size (900000000 pixels)",
    ),
    "image token": ({"query": "what is <|image_pad|> here"}, "query holds the special token <|image_pad|>"),
    "video token": ({"query": "<|video_pad|>"}, "query holds the special token <|video_pad|>"),
    "video token in the label": ({"label": ["<|video_pad|>"]}, "label holds the special token <|video_pad|>"),
    "end of turn": ({"label": ["7<|im_end|>"]}, "label holds the special token <|im_end|>"),
}


def _damage(rows: list[dict[str, Any]]) -> None:
    for number, (change, _) in enumerate(BAD_ROWS.values()):
        rows[number].update(change)


def test_whatever_training_would_stumble_over_is_a_bad_row(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        prepare(_recipe(world, tmp_path, _damage), quiet=True)
    message = str(raised.value)
    assert f"{len(BAD_ROWS)} bad rows" in message
    for number, (_, reason) in enumerate(BAD_ROWS.values()):
        assert f"train row {number}: {reason}" in message
    assert "0x" not in message
    dropped = prepare(_recipe(world, tmp_path, _damage, on_bad_row="drop"), quiet=True)
    assert dropped.splits["train"].rows.tolist() == list(range(len(BAD_ROWS), 12))


def test_a_row_that_only_the_encoder_refuses_is_a_bad_row_too(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that `prepare` encodes to prove its counts: a failure there names the row, and it can be dropped."""
    honest = Encoder._processed

    def moody(self: Encoder, text: str, images: list[Image.Image], *, whole: bool) -> Any:
        if "bar 4 of" in text:
            raise RowError("the processor refuses it (ValueError: no)")
        return honest(self, text, images, whole=whole)

    monkeypatch.setattr(Encoder, "_processed", moody)
    with pytest.raises(ConfigError, match="train row 4: the processor refuses it") as raised:
        prepare(_recipe(world, tmp_path, lambda rows: None), quiet=True)
    assert "3 bad rows" in str(raised.value)  # row 4 of every split
    index = prepare(_recipe(world, tmp_path, lambda rows: None, on_bad_row="drop"), quiet=True)
    assert 4 not in index.splits["train"].rows.tolist()


def test_training_and_evaluation_name_the_row_that_fails(world: Path, tmp_path: Path) -> None:
    recipe = _recipe(world, tmp_path, lambda rows: rows[0].update(query=""), on_bad_row="drop")
    split = prepare(recipe, quiet=True).splits["train"]
    processor, rows = load_processor(recipe), open_split(recipe, "train")

    class Failing(Encoder):
        def __call__(self, row: Row) -> Any:
            raise struct.error("argument out of range")

    encoder = Failing(processor, recipe.data.system_message, "answer")
    with pytest.raises(
        RunError, match=r"data: sample 3 \(row 4\): cannot be read \(struct.error: argument out"
    ):
        assemble(rows, split, encoder, MicroBatch((3,), filler=False), 0, 1)

    class Damaged:
        def __getitem__(self, number: int) -> Row:
            return question_row([UNWRITABLE], "how high?", ["7"], 0)

    model: Any = SimpleNamespace(device="cpu")
    replica = Replica(model, processor, Damaged(), 4, torch.float32)  # type: ignore[arg-type]
    with pytest.raises(
        RunError, match=r"data: row 5 of the split: the image is corrupt \(struct.error: argument"
    ):
        replica.features.of([5])


def test_a_special_token_in_the_system_message_is_refused_before_anything_is_read(
    world: Path, tmp_path: Path
) -> None:
    for token in ("<|video_pad|>", "<|image_pad|>", "<|im_start|>"):
        recipe = _recipe(world, tmp_path, _damage, system_message=f"Answer {token} briefly.")
        with pytest.raises(ConfigError) as raised:
            prepare(recipe, quiet=True)
        assert f"data.system_message: holds the special token {token}" in str(raised.value)


def test_every_bad_row_is_in_a_file_that_the_refusal_names(world: Path, tmp_path: Path) -> None:
    def damage(rows: list[dict[str, Any]]) -> None:
        for number, row in enumerate(rows[:53]):
            row.update(human_or_machine=2 + min(number, 51))

    recipe = _recipe(world, tmp_path, damage, count=60)
    with pytest.raises(ConfigError) as raised:
        prepare(recipe, quiet=True)
    *_, more, last = str(raised.value).splitlines()
    assert more == "... and 3 more, of 2 other reasons"
    listed = Path(last.removeprefix("all of them are listed in "))
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(53))
    reason = "human_or_machine is 53, not 0 or 1"
    assert rows[52] == {"split": "train", "row": 52, "reason": reason, "file": "", "line": 0}
    write_charts(tmp_path / "charts", {"train": chart_rows(60, 0)})
    assert prepare(recipe, quiet=True)
    assert listed.parent == index_path(recipe).parent


# what is left out ---------------------------------------------------------------------------------------------


def test_what_is_dropped_ignored_or_unanswerable_is_said_and_kept_in_the_run(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def damage(rows: list[dict[str, Any]]) -> None:
        rows[0].update(query="")
        rows[2].update(label=["7", "seven"])
        rows[3].update(label=["a long answer " * 20])
        rows[5].update(label=["nan"])  # by the public rule no number is near it
        rows[6].update(label=["Yes "])
        rows[7].update(label=["Cafe\u0301\n"])

    recipe = _recipe(world, tmp_path, damage, on_bad_row="drop")
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert main([str(file)]) == 0
    said = capsys.readouterr()
    assert "1 row dropped (data.on_bad_row) (train row 0)" in said.out
    assert (
        "1 row with further answers, which are ignored: the first label is trained and scored (train row 2)"
        in (said.out)
    )
    assert "2 rows with a label that no model can answer: too long for evaluation.max_new_tokens" in said.out
    assert "(train row 3, train row 5)" in said.out
    index = load_index(file, recipe, [])
    told = capsys.readouterr().err  # with what was prepared before, too
    assert f"{recipe.data.dataset}: 1 row dropped (data.on_bad_row) (train row 0)" in told
    plan = make_plan(recipe, index, Topology("single", 1, 1, "cpu"), name="small")
    run = RunDirectory(tmp_path / "run")
    write_request(run, recipe, plan)
    for report in (index.path / "data_report.jsonl", run.path / "data_report.jsonl"):
        notes = [json.loads(line) for line in report.read_text().splitlines()]
        assert [(note["split"], note["row"], note["kind"]) for note in notes] == [
            ("train", 0, "dropped"),
            ("train", 2, "answers ignored"),
            ("train", 3, "unanswerable"),
            ("train", 5, "unanswerable"),
        ]
    assert f"each of these rows is named in {index.path / 'data_report.jsonl'}" in said.out
    longer = recipe.model_copy(
        update={"evaluation": recipe.evaluation.model_copy(update={"max_new_tokens": 500})}
    )
    write_request(run, longer, plan)
    kept = [json.loads(line)["row"] for line in (run.path / "data_report.jsonl").read_text().splitlines()]
    assert kept == [0, 2, 5]
    by_text = recipe.evaluation.model_copy(update={"metrics": ["exact_match"]})
    write_request(run, recipe.model_copy(update={"evaluation": by_text}), plan)
    kept = [json.loads(line)["row"] for line in (run.path / "data_report.jsonl").read_text().splitlines()]
    assert kept == [0, 2, 3]  # "nan" is its own answer, and still nobody can say 20 times the same


def test_a_plain_launch_says_and_keeps_it_too(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def damage(rows: list[dict[str, Any]]) -> None:
        rows[0].update(query="")
        rows[1].update(label=["seven and no more than seven " * 9])  # most of the tokens are targets
        rows[2].update(image={"bytes": _encoded(Image.fromarray(_ramp())), "path": None})

    recipe = _recipe(world, tmp_path, damage, on_bad_row="drop")
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    caplog.set_level("INFO", "trainer")
    overrides = ["--set", "training.max_steps=1", "--set", "evaluation.every_steps=100"]
    assert train([str(file), "--runs-dir", str(tmp_path), "--name", "run", *overrides]) == 0
    said = caplog.text
    assert f"{recipe.data.dataset}: 1 row dropped (data.on_bad_row) (train row 0)" in said
    assert "tokens are targets" in said
    notes = [json.loads(line) for line in (tmp_path / "run" / "data_report.jsonl").read_text().splitlines()]
    assert [(note["row"], note["kind"]) for note in notes] == [(0, "dropped"), (1, "unanswerable")]


def test_the_fewest_tokens_that_answer_a_label_are_counted(world: Path) -> None:
    tokenizer = load_processor(recipe_from_dict(recipe_values(world))).tokenizer
    for label in ("Yes", "Light blue", "Yes \n", "Cafe\u0301", "1,000"):
        assert needed_tokens(label, tokenizer) > 0
        assert needed_tokens(label, tokenizer) <= len(tokenizer(label)["input_ids"])
    assert needed_tokens("Light blue", tokenizer) == len(tokenizer("Light blue")["input_ids"])
    digits = len(tokenizer("100.001")["input_ids"])
    assert digits == 7
    assert needed_tokens("100.001", tokenizer) == 3
    assert needed_tokens("nan", tokenizer) == needed_tokens("Infinity", tokenizer) == 0


# bounds and progress ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        (
            {"min_pixels": 50_000},
            r"data\.min_pixels: above the processor's own maximum \(50,000 > 25,088 pixels\)",
        ),
        (
            {"max_pixels": 2_000},
            r"data\.max_pixels: below the processor's own minimum \(2,000 < 3,136 pixels\)",
        ),
    ],
)
def test_a_bound_beyond_the_processors_other_is_refused(
    world: Path, bounds: dict[str, int], words: str
) -> None:
    values = recipe_values(world)
    values["data"] |= bounds
    with pytest.raises(ConfigError, match=words):
        load_processor(recipe_from_dict(values))


def test_both_bounds_together_may_leave_the_processors_own(world: Path) -> None:
    values = recipe_values(world)
    values["data"] |= {"min_pixels": 50_000, "max_pixels": 90_000}
    size = load_processor(recipe_from_dict(values)).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (50_000, 90_000)


def test_without_a_terminal_progress_is_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("trainer.progress_bars.time.monotonic", lambda: now[0])
    with progress_reports() as begin:
        report = begin("training the tiny base model")
        for done in range(1, 241):
            now[0] += 0.125
            report(done, 240)
    assert capsys.readouterr().err.splitlines() == [
        "training the tiny base model: begins",
        "training the tiny base model: 80 of 240 (10 s)",
        "training the tiny base model: 160 of 240 (20 s)",
        "training the tiny base model: 240 of 240 (30 s)",
    ]
    with progress_reports(quiet=True) as begin:
        begin("checking train")(3, 3)
    assert capsys.readouterr().err == ""


def test_an_image_is_read_from_the_path_that_a_row_gives(world: Path, tmp_path: Path) -> None:
    """A column of paths as text is as good as bytes."""
    (tmp_path / "one.png").write_bytes(chart_png(3))

    def damage(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["image"] = str(tmp_path / "one.png")

    index = prepare(_recipe(world, tmp_path, damage), quiet=True)
    assert len(index.splits["train"]) == 12
