"""The mini ChartQA: ChartQA's schema, real and distinct charts, splits that share nothing."""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Image, List, Value, load_dataset
from PIL import Image as Picture

from trainer.embedded import charts as charting
from trainer.embedded import questions, tables

KINDS = {
    "count",
    "colour of extreme",
    "name of extreme",
    "difference",
    "comparison by colour",
    "comparison by name",
    "value by colour",
    "value by name",
    "colour of name",
    "name of colour",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A twelfth of the mini ChartQA."""
    path = tmp_path_factory.mktemp("embedded") / "data"
    questions.build_charts(path, charts=48)
    return path


def test_the_files_have_exactly_chartqas_schema(folder: Path, tmp_path: Path) -> None:
    files = {split: str(folder / f"{split}-*.parquet") for split in tables.SPLITS}
    splits = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    expected = Features(
        {
            "image": Image(),
            "query": Value("string"),
            "label": List(Value("string")),
            "human_or_machine": ClassLabel(names=["human", "machine"]),
        }
    )
    for split in splits.values():
        assert split.features == expected
    row = splits["test"][0]
    assert row["image"].size == (charting.WIDTH, charting.HEIGHT)
    assert row["query"].endswith("?")
    assert len(row["label"]) == 1
    assert row["label"][0]
    for split in tables.SPLITS:
        metadata = pq.read_schema(next(folder.glob(f"{split}-*.parquet"))).metadata
        assert Features.from_dict(json.loads(metadata[b"huggingface"])["info"]["features"]) == expected


def test_no_image_is_in_two_splits(folder: Path) -> None:
    seen: Counter[str] = Counter()
    for path in (*folder.glob("*.parquet"), folder / "facts" / "facts.parquet"):
        column = pq.read_table(path)["image"].to_pylist()
        images = {entry if isinstance(entry, bytes) else entry["bytes"] for entry in column}
        seen.update(hashlib.sha256(image).hexdigest() for image in images)
    assert max(seen.values()) == 1


def test_the_default_has_300_distinct_charts_of_four_kinds_and_200_test_questions() -> None:
    dealt = tables.deal_sheets()
    charts = {
        chart
        for place, (split, size) in enumerate(questions.SIZES.items())
        for chart in charting.unique_charts(dealt[split], size.charts, seed=100 + place)
    }
    assert len(charts) >= 300
    assert {chart.kind for chart in charts} == {"bar", "stacked", "line", "pie"}
    assert questions.SIZES["test"].questions >= 200


def test_no_sheet_of_a_table_is_dealt_twice() -> None:
    dealt = [sheet for pool in tables.deal_sheets().values() for sheet in pool]
    assert len(dealt) == len(tables.sheets())
    cells = Counter(
        (s.source, s.measure, s.title, row, c) for s in dealt for row in s.values for c in s.columns
    )
    assert max(cells.values()) == 1


def test_every_kind_of_question_is_asked_by_humans_and_machines(folder: Path) -> None:
    for split in ("train", "test"):
        kinds = questions.question_kinds(folder, split)
        table = pq.read_table(next(folder.glob(f"{split}-*.parquet")))
        assert len(kinds) == len(table)
        assert set(table["human_or_machine"].to_pylist()) == {0, 1}
    assert set(questions.question_kinds(folder, "train")) == KINDS


def test_the_answer_cannot_be_had_from_the_kind_of_question() -> None:
    charts = charting.unique_charts(tables.deal_sheets()["train"], 120, seed=1)
    asked = questions.choose_questions(charts, 400, 5, seed=1)
    for kind, floor in (("colour of extreme", 6), ("comparison by colour", 2), ("count", 5)):
        answers = Counter(question.answer for _, question in asked if question.kind == kind)
        assert len(answers) >= floor
        assert max(answers.values()) <= 1.5 * sum(answers.values()) / len(answers)


def test_three_in_five_questions_need_no_reading() -> None:
    charts = charting.unique_charts(tables.deal_sheets()["test"], 96, seed=1)
    asked = Counter(question.kind for _, question in questions.choose_questions(charts, 256, 5, seed=1))
    seen = sum(asked[kind] for kind in ("count", "colour of extreme", "colour of name"))
    assert 0.55 <= seen / asked.total() <= 0.66
    assert min(asked[kind] for kind in KINDS) >= 12


def test_answers_agree_with_the_table() -> None:
    series = (charting.Series("Chad", "Red", (4,)), charting.Series("Mali", "Blue", (9,)))
    chart = charting.Chart("bar", "Population", "population in millions", "country", ("1952",), series)
    answers = {question.query: question.answer for question in questions.questions(chart)}
    assert answers["How many bars are there in the chart?"] == "2"
    assert answers["What is the colour of the largest bar?"] == "Blue"
    assert answers["Which country has the smallest population in millions?"] == "Chad"
    assert answers["What is the difference between the largest and the smallest bar?"] == "5"
    assert answers["Is the red bar larger than the blue bar?"] == "No"
    assert answers["What was the population in millions of Mali?"] == "9"
    assert answers["Which country does the red bar show?"] == "Chad"


def test_a_chart_drawn_twice_gives_the_same_bytes_in_its_colours() -> None:
    charts = charting.unique_charts(tables.deal_sheets()["train"], 12, seed=2)
    first, second = charting.Painter(), charting.Painter()
    for chart in charts:
        image = first.png(chart)
        assert image == second.png(chart)
        drawn = Picture.open(io.BytesIO(image)).convert("RGB").getcolors(1 << 16)
        shades = {colour for count, colour in drawn or [] if count > 20}
        assert {charting.COLOURS[series.colour] for series in chart.series} <= shades


def test_building_twice_gives_the_same_files_and_leaves_nothing_aside(folder: Path, tmp_path: Path) -> None:
    questions.build_charts(tmp_path / "data", charts=48)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(names) == 5
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "data" / name).read_bytes(), name
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
