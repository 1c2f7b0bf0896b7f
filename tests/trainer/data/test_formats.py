"""Rows of other formats: chats and named columns, from JSONL, CSV, imagefolders and parquet."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.errors import ConfigError
from launch.inputs import text_tables
from launch.inputs.data_report import notes_of
from launch.inputs.dataset_index import read_index
from launch.inputs.identity import OWN_TEMPLATE, find_identity
from launch.recipe.fingerprint import altering_values
from launch.recipe.loading import dump_recipe, load_recipe, recipe_from_dict
from launch.recipe.schema import Recipe
from launch.run.changes import changes, content_changes
from tests.conftest import chart_png, chart_rows, recipe_values, write_charts
from trainer.data.encoder import Encoder
from trainer.data.formats.images import ImageFiles
from trainer.data.formats.messages import messages_row
from trainer.data.row_errors import RowError
from trainer.data.rows import IMAGE, Row, Turn, chat, question_row
from trainer.data.splits import open_split
from trainer.prepare import main, prepare
from trainer.pretrained import load_processor


def _recipe(world: Path, folder: Path, **data: Any) -> Recipe:
    values = recipe_values(world)
    values["data"] = {
        "dataset": str(folder),
        "validation": None,
        "test": None,
        "system_message": "Answer.",
        **data,
    }
    return recipe_from_dict(values)


def _images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(chart_png(number))
    return folder


def _lines(file: Path, rows: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def _spoken(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


# chats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "images", "expected"),
    [
        ("How high?", ["a.png"], (IMAGE, "How high?")),  # trl: no place is marked
        ("<image>How high?", ["a.png"], (IMAGE, "How high?")),  # ms-swift
        ("Is <image> above <image>?", ["a.png", "b.png"], ("Is ", IMAGE, " above ", IMAGE, "?")),
        ([{"type": "text", "text": "See"}, {"type": "image"}], ["a.png"], ("See", IMAGE)),
        ([{"type": "image", "image": "b.png"}, {"type": "text", "text": "?"}], None, (IMAGE, "?")),
        ("Why?", [], ("Why?",)),
    ],
)
def test_an_image_of_a_chat_stands_where_the_content_says(
    tmp_path: Path, content: Any, images: Any, expected: tuple[str | None, ...]
) -> None:
    files = ImageFiles(_images(tmp_path, "a.png", "b.png"), tmp_path)
    raw = {"messages": [_message("user", content), _message("assistant", "So.")], "images": images}
    row = messages_row(raw, files)
    assert row.turns == (Turn("user", expected), Turn("assistant", ("So.",)))
    assert row.label == ["So."]
    assert len(row.images) == expected.count(IMAGE)
    if content and isinstance(content, list) and "image" in content[0]:
        assert row.images == (chart_png(1),)


def test_a_system_message_of_the_row_wins_over_the_recipes() -> None:
    turns = (Turn("user", ("Why?",)), Turn("assistant", ("So.",)))
    own = (Turn("system", ("Be brief.",)), *turns)
    texts = [[message["content"][0]["text"] for message in chat("Answer.", of)] for of in (turns, own)]
    assert texts == [["Answer.", "Why?", "So."], ["Be brief.", "Why?", "So."]]
    assert [message["role"] for message in chat(None, turns)] == ["user", "assistant"]


BAD_CHATS: list[tuple[Any, str]] = [
    ({"messages": []}, "messages is list [], not a list of messages"),
    ({"messages": [_message("user", "Why?")]}, "the last message is not of the assistant"),
    (
        {"messages": [_message("tool", "x"), _message("assistant", "y")]},
        "message 0 has the role 'tool'",
    ),
    (
        {"messages": [_message("user", "Why?"), _message("user", "How?"), _message("assistant", "y")]},
        "message 1 is of user, where assistant is due",
    ),
    ({"messages": [_message("user", "Why?"), _message("assistant", " ")]}, "message 1 (assistant) is empty"),
    (
        {"messages": [_message("user", "<image>?"), _message("assistant", "y")]},
        "places for 1 images, the row has 0",
    ),
    (
        {"messages": [_message("user", "?"), _message("assistant", "y")], "images": ["https://x.org/a.png"]},
        "is an address, and nothing is fetched",
    ),
    (
        {"messages": [_message("user", "?"), _message("assistant", "y")], "images": ["../secret.png"]},
        "lies outside of the data set's folder",
    ),
    (
        {"messages": [_message("user", "?"), _message("assistant", "y")], "images": ["gone.png"]},
        "gone.png cannot be read (No such file or directory)",
    ),
    (
        {"messages": [_message("user", "<|im_end|>"), _message("assistant", "y")]},
        "the special token <|im_end|>",
    ),
    ("{not json", "the row cannot be read (column 2"),
    ({"other": 1}, "messages is missing, not a list of messages"),
    ({"conversations": "x"}, "conversations is str 'x', not a list of messages"),
    (
        {"conversations": [_spoken("human", "?"), _spoken("observation", "y")]},
        "message 1 has the speaker 'observation', not system, human, gpt",
    ),
    (
        {"conversations": [_spoken("human", "?"), _spoken("human", "?"), _spoken("gpt", "y")]},
        "message 1 is of human, where gpt is due",
    ),
    ({"conversations": [_spoken("human", "?")]}, "the last message is not of the gpt"),
    ({"conversations": [_spoken("user", "?"), _spoken("gpt", " ")]}, "message 1 (gpt) is empty"),
    (
        {"conversations": [_spoken("user", "?"), _spoken("user", "!")]},
        "message 1 is of user, where gpt is due",
    ),
    ({"conversations": [_spoken("human", None)]}, "the value of message 0 is missing, not text or parts"),
    (
        {"conversations": [_spoken("human", "?"), _spoken("gpt", "<image>")]},
        "message 1 (gpt) has an image; only questions of the human may have some",
    ),
    (
        {"conversations": [_spoken("human", ""), _spoken("gpt", "y")], "system": "Be brief."},
        "message 0 (human) is empty",  # numbered as in the file, where the system message is none of them
    ),
    (
        {"messages": [_message("user", "?"), _message("assistant", "y")], "system": [1]},
        "the column system has a part of type 1, not text or image",
    ),
    (
        {"messages": [_message("user", "?"), _message("assistant", "y")], "tools": '[{"name": "sum"}]'},
        "tools beside the chat is not trained here",
    ),
    (
        {"messages": [_message("user", "<video>?"), _message("assistant", "y")], "videos": ["a.mp4"]},
        "videos beside the chat is not trained here; take it out of the row",
    ),
    (
        {"messages": [_message("user", "?"), {**_message("assistant", "y"), "weight": 0}]},
        "message 1 has weight of type int, which is not heeded: data.loss says",
    ),
    (
        {"messages": [_message("user", [{"type": "text"}]), _message("assistant", "y")]},
        "a part of message 0 has a text that is missing",
    ),
    (
        {"messages": [_message("user", "?"), _message("assistant", "y")], "images": [None]},
        "an image is missing, not bytes or a path",
    ),
    (
        {"messages": [_message("user", "?"), _message("assistant", "y")], "images": ["a\0.png"]},
        "the path of an image is 'a\\x00.png', which names no file",
    ),
    (
        {"messages": [_message("user", "\ud800"), _message("assistant", "y")]},
        "holds half a character ('\\ud800' at 0)",
    ),
    (
        {"messages": [_message("user", "?" * 1_000_001), _message("assistant", "y")]},
        "message 0 (user) has 1,000,001 characters, more than any model reads",
    ),
    ('{"messages": [], "messages": []}', "the row cannot be read (the key 'messages' stands twice)"),
]


def test_every_bad_chat_is_listed_with_its_reason(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _images(tmp_path, "secret.png")
    good = {"messages": [_message("user", "Why?"), _message("assistant", "So.")]}
    _lines(tmp_path / "data" / "train.jsonl", [good, *(row for row, _ in BAD_CHATS)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(_recipe(world, tmp_path / "data")))
    assert main([str(recipe), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert f"{len(BAD_CHATS)} bad rows" in said
    assert "Traceback" not in said
    for number, (_, reason) in enumerate(BAD_CHATS, 1):
        place = f"train row {number} (train.jsonl line {number + 1}): "
        line = next(line for line in said.splitlines() if line.startswith(place))
        assert reason in line


def test_a_question_that_is_left_out_of_the_loss_is_refused_only_where_every_token_is_trained(
    world: Path, tmp_path: Path
) -> None:
    question = {**_message("user", "?"), "train": False}
    _lines(tmp_path / "train.jsonl", [{"messages": [question, _message("assistant", "y")]}])
    for loss in ("answer", "all_answers"):
        assert open_split(_recipe(world, tmp_path, loss=loss), "train")[0].query == "?"
    with pytest.raises(RowError, match="message 0 has train of type bool, which is not heeded"):
        open_split(_recipe(world, tmp_path, loss="sequence"), "train")[0]


def test_chats_of_sharegpt_and_llava_are_those_of_trl(world: Path, tmp_path: Path) -> None:
    _images(tmp_path, "a.png")
    chat_of = [
        ("system", "Be brief."),
        ("human", "<image>Why?"),
        ("gpt", "So."),
        ("human", "And?"),
        ("gpt", "No."),
    ]
    roles = {"human": "user", "gpt": "assistant"}
    trl = [_message(roles.get(speaker, speaker), words) for speaker, words in chat_of]
    spoken = [{"from": speaker, "value": words} for speaker, words in chat_of]
    _lines(tmp_path / "trl.jsonl", [{"messages": trl, "images": ["a.png"]}])
    _lines(tmp_path / "llava.jsonl", [{"id": 1, "image": "a.png", "conversations": spoken}])
    _lines(
        tmp_path / "factory.jsonl",
        [{"images": ["a.png"], "system": "Be brief.", "conversations": spoken[1:]}],
    )
    read = [
        open_split(_recipe(world, tmp_path, train=name), "train")[0] for name in ("trl", "llava", "factory")
    ]
    assert read[0] == read[1] == read[2]
    assert [turn.text for turn in read[0].turns] == ["Be brief.", "Why?", "So.", "And?", "No."]


@pytest.mark.parametrize("tools", ["[]", "", None, []])
def test_an_empty_list_of_tools_is_none_also_as_text(tools: Any) -> None:
    raw = {"messages": [_message("user", "?"), _message("assistant", "y")], "tools": tools}
    assert messages_row(raw, ImageFiles()).label == ["y"]


def test_a_text_file_is_parsed_once_for_all_who_open_it_and_again_when_it_has_changed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed, keys = [], text_tables._keys
    monkeypatch.setattr(text_tables, "_keys", lambda line: parsed.append(line) or keys(line))
    rows = [{"messages": [_message("user", f"{n}?"), _message("assistant", "y")]} for n in range(40)]
    _lines(tmp_path / "train.jsonl", rows)
    recipe = _recipe(world, tmp_path, validation="train, 5 %")
    assert len(open_split(recipe, "train")) + len(open_split(recipe, "validation")) == 40
    assert open_split(recipe, "train")[0].query == "0?"
    assert len(parsed) == 40
    rows[0]["messages"][0] = _message("user", "9?")  # as long as before
    _lines(tmp_path / "train.jsonl", rows)
    assert open_split(recipe, "train")[0].query == "9?"


# columns --------------------------------------------------------------------------------------------------------


def test_csv_jsonl_imagefolder_and_parquet_give_the_same_rows(world: Path, tmp_path: Path) -> None:
    folder = _images(tmp_path, "pictures/a.png", "pictures/b.png", "train/a.png", "train/b.png")
    rows = [("pictures/a.png", "How high?", "7"), ("pictures/b.png", 'Say "x", or\ny?', "1,000")]
    cells = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in rows]
    csv = "picture,question,answer\n" + "\n".join(",".join(row) for row in cells) + "\n"
    (folder / "of_csv.csv").write_text(csv, encoding="utf-8-sig")
    named = [dict(zip(("picture", "question", "answer"), row, strict=True)) for row in rows]
    _lines(folder / "of_jsonl.jsonl", [{**row, "answer": [row["answer"]]} for row in named])
    metadata = [
        {"file_name": Path(image).name, "query": query, "label": label} for image, query, label in rows
    ]
    _lines(folder / "train" / "metadata.jsonl", metadata)
    stored = [
        {**row, "picture": {"bytes": chart_png(place), "path": None}} for place, row in enumerate(named)
    ]
    pq.write_table(pa.Table.from_pylist(stored), folder / "of_parquet.parquet")
    columns = {"image": "picture", "query": "question", "label": "answer"}
    expected = [
        question_row([chart_png(place)], query, [label]) for place, (_, query, label) in enumerate(rows)
    ]
    for split in ("of_csv", "of_jsonl", "of_parquet"):
        assert list(open_split(_recipe(world, folder, train=split, columns=columns), "train")) == expected
    imagefolder = open_split(_recipe(world, folder), "train")
    (tmp_path / "train" / "a.png").write_bytes(chart_png(0))
    (tmp_path / "train" / "b.png").write_bytes(chart_png(1))
    assert list(imagefolder) == expected
    assert imagefolder.kind.description == (
        "columns (seen from its columns query and label): image from file_name, query from query, label from label"
    )


def test_rows_of_one_image_and_question_have_the_fingerprint_of_chartqa(world: Path, tmp_path: Path) -> None:
    rows = chart_rows(6, 0)
    for row in rows:
        row["human_or_machine"] = 0
    charts = write_charts(tmp_path / "charts", {"train": rows})
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.png").write_bytes(row["image"]["bytes"])
    _lines(
        tmp_path / "train.jsonl",
        [{"image": f"{n}.png", "query": row["query"], "label": row["label"]} for n, row in enumerate(rows)],
    )
    one, other = (prepare(_recipe(world, folder), quiet=True) for folder in (charts, tmp_path))
    assert one.fingerprint == other.fingerprint
    assert one.splits["train"].human_or_machine.tolist() == [0] * 6
    assert other.splits["train"].human_or_machine.tolist() == [-1] * 6


BAD_COLUMNS: list[tuple[str, str]] = [
    ("gone.png,?,1", "gone.png cannot be read"),
    ("a.png,,1", "question is missing, not text"),
    ("a.png,?,", "answer is missing, not text or a list of text"),
    ("a.png,?,1,2", "the row has 4 cells, the header 3"),
    ("broken.png,?,1", "the image is in no format that Pillow knows"),
    ("/etc/passwd,?,1", "lies outside of the data set's folder"),
    ("data:image/png;base64,?,1", "the row has 5 cells"),
]


def test_every_bad_row_of_a_csv_is_listed(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _images(tmp_path, "a.png")
    (tmp_path / "broken.png").write_text("no image")
    rows = "\n".join(
        ["picture,question,answer", "a.png,?,1", ",no image?,1", *(row for row, _ in BAD_COLUMNS)]
    )
    (tmp_path / "train.csv").write_text(rows.replace("base64,?,1", "base64,x,y,?,1"))
    columns = {"image": "picture", "query": "question", "label": "answer"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(_recipe(world, tmp_path, columns=columns)))
    assert main([str(recipe), "--quiet"]) == 2
    said = capsys.readouterr().err
    for number, (_, reason) in enumerate(BAD_COLUMNS, 2):
        place = f"train row {number} (train.csv line {number + 2}): "
        line = next(line for line in said.splitlines() if line.startswith(place))
        assert reason in line
    assert f"{len(BAD_COLUMNS)} bad rows" in said


def test_every_bad_row_of_named_columns_is_listed(world: Path, tmp_path: Path) -> None:
    """NaN is what pandas writes of a missing value; names in other letters are what a Mac or Windows makes of them."""
    _images(tmp_path, "a.png", unicodedata.normalize("NFD", "é.png"))
    good = {"image": "a.png", "query": "?", "label": "7"}
    changes_and_reasons: list[tuple[dict[str, Any], str]] = [
        ({"label": float("nan")}, "label is float nan, not text"),
        ({"label": -float("inf")}, "label is float -inf, not text"),
        ({"query": 5}, "query is of type int, not text"),
        ({"label": ["7", "\ud800"]}, "answer 2 of label holds half a character ('\\ud800' at 0)"),
        ({"image": "A.PNG"}, "(No such file or directory); there is 'a.png'; give the bytes"),
        ({"image": "é.png"}, "(No such file or directory); there is 'e\\u0301.png'; give the bytes"),
        ({"image": "."}, "cannot be read (is no plain file (a folder)); give the bytes"),
    ]
    _lines(
        tmp_path / "train.jsonl",
        [good | change for change, _ in changes_and_reasons] + [good | {"image": ""}],
    )
    with pytest.raises(ConfigError) as raised:
        prepare(_recipe(world, tmp_path), quiet=True)
    lines = str(raised.value).splitlines()
    assert len(lines) == len(changes_and_reasons) + 2
    for line, (_, reason) in zip(lines[1:-1], changes_and_reasons, strict=True):
        assert reason in line


def test_images_are_found_in_whatever_row_and_column_the_formats_allow(world: Path, tmp_path: Path) -> None:
    """Else the rows would be trained without them, and without a word."""
    _images(tmp_path, "a.png", "folder/a.png", "list/a.png", "table/a.png")
    plain = {"query": "?", "label": "7"}
    _lines(tmp_path / "late.jsonl", [plain] * 150 + [plain | {"image": "a.png"}])
    _lines(tmp_path / "folder" / "metadata.jsonl", [plain | {"input_file_name": "a.png"}])
    _lines(tmp_path / "list" / "metadata.jsonl", [plain | {"file_names": ["a.png", "a.png"]}])
    pq.write_table(
        pa.Table.from_pylist([plain | {"file_name": "a.png"}]), tmp_path / "table" / "metadata.parquet"
    )
    for split, row, images in (("late", 150, 1), ("folder", 0, 1), ("list", 0, 2), ("table", 0, 1)):
        rows = open_split(_recipe(world, tmp_path, train=split), "train")
        assert (
            rows[row].images == (chart_png({"late": 0, "folder": 1, "list": 2, "table": 3}[split]),) * images
        )
    _lines(tmp_path / "odd.jsonl", [plain | {"id": 1, "photo": "a.png"}])
    described = open_split(_recipe(world, tmp_path, train="odd"), "train").kind.description
    assert described.endswith("query from query, label from label, no images (not used: id, photo)")
    _lines(tmp_path / "texts.jsonl", [plain | {"source_file_name": "report.pdf"}])
    texts = open_split(_recipe(world, tmp_path, train="texts"), "train")
    assert (texts[0].images, "not used: source_file_name" in texts.kind.description) == ((), True)
    _lines(tmp_path / "odd-old.jsonl", [plain | {"id": 1}])
    _lines(tmp_path / "odd-00001-of-00002.jsonl", [plain | {"id": 1}])
    _lines(tmp_path / "odd-00000-of-00002-49492f364babfa44.jsonl", [plain | {"id": 1}])
    rows = open_split(_recipe(world, tmp_path, train="odd"), "train")
    assert (len(rows), rows.kind.description.rpartition("; ")[2]) == (4, "of more files: odd-old.jsonl")
    _lines(tmp_path / "chat.jsonl", [{"messages": [], "photo": "a.png"}])
    described = open_split(_recipe(world, tmp_path, train="chat"), "train").kind.description
    assert described == "messages (seen from its column messages) (not used: photo)"


def test_rows_that_are_bad_for_one_reason_are_said_once(world: Path, tmp_path: Path) -> None:
    _images(tmp_path, "a.png")
    lines = ['a.png,"two\nlines",1', "", *["a.png,?,"] * 7, "a.png,<|im_end|>,1"]
    (tmp_path / "train.csv").write_text("\n".join(["picture,question,answer", *lines]))
    columns = {"image": "picture", "query": "question", "label": "answer"}
    with pytest.raises(ConfigError) as raised:
        prepare(_recipe(world, tmp_path, columns=columns), quiet=True)
    head, many, one, where = str(raised.value).splitlines()
    assert head.startswith("data.dataset: 8 bad rows; mend them, or set")
    assert many.startswith(
        "train rows 1, 2, 3, 4, 5 and 2 more (train.csv lines 5, 6, 7, 8, 9): answer is missing"
    )
    assert one.startswith("train row 8 (train.csv line 12): question holds the special token <|im_end|>")
    listed = [json.loads(line) for line in Path(where.rpartition(" ")[2]).read_text().splitlines()]
    assert [(row["row"], row["file"], row["line"]) for row in listed[-2:]] == [
        (7, "train.csv", 11),
        (8, "train.csv", 12),
    ]
    index = prepare(_recipe(world, tmp_path, columns=columns, on_bad_row="drop"), quiet=True)
    assert [note.line for note in notes_of(_recipe(world, tmp_path, columns=columns), index.path)][-1] == 12


def test_data_of_no_known_format_is_refused_with_its_columns(world: Path, tmp_path: Path) -> None:
    _lines(tmp_path / "train.jsonl", [{"picture": "a.png", "text": "?"}])
    with pytest.raises(ConfigError, match="has the columns picture, text, which are of no known format"):
        prepare(_recipe(world, tmp_path), quiet=True)
    with pytest.raises(ConfigError, match=r"data\.columns\.query: .* has no column question"):
        prepare(_recipe(world, tmp_path, columns={"query": "question", "label": "text"}), quiet=True)
    with pytest.raises(ConfigError, match="has no column messages"):
        prepare(_recipe(world, tmp_path, format="messages"), quiet=True)
    for content, words in (
        (
            '[{"query": "?"}]',
            r"no row that can be read \(line 1: the row is a list, not a mapping .*; write one JSON",
        ),
        ('\n{\n"query": "?"}', r"no row that can be read \(line 2: column 2: Expecting property name"),
        ("", "has no rows; write some, or name another split"),
    ):
        (tmp_path / "none.jsonl").write_text(content)
        with pytest.raises(ConfigError, match=words):
            prepare(_recipe(world, tmp_path, train="none"), quiet=True)
    pq.write_table(pa.table({"query": pa.array([], pa.string())}), tmp_path / "void.parquet")
    with pytest.raises(ConfigError, match=r"void\.parquet: has no rows; write some"):
        prepare(_recipe(world, tmp_path, train="void"), quiet=True)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(
        ConfigError, match=r"no list\.parquet .* \(it has list\.json, none\.jsonl, train\.jsonl, "
    ):
        prepare(_recipe(world, tmp_path, train="list"), quiet=True)
    with pytest.raises(
        ConfigError, match=r"train\.jsonl' is no folder; give the folder .* and data\.train: train"
    ):
        prepare(_recipe(world, tmp_path / "train.jsonl"), quiet=True)
    (tmp_path / "bad.csv").write_text("a,a\n1,2\n")
    with pytest.raises(ConfigError, match="has no header of distinct column names"):
        prepare(_recipe(world, tmp_path, train="bad"), quiet=True)


def test_an_image_that_changed_is_prepared_anew_when_prepare_is_asked(world: Path, tmp_path: Path) -> None:
    _images(tmp_path, "a.png", "b.png")
    _lines(tmp_path / "train.jsonl", [{"image": f"{n}.png", "query": "?", "label": "1"} for n in "ab"])
    recipe = _recipe(world, tmp_path)
    before = prepare(recipe, quiet=True).fingerprint
    (tmp_path / "a.png").write_bytes(chart_png(50))
    index = read_index(recipe)
    assert index is not None  # nothing looks at the images before each start
    assert index.fingerprint == before
    assert prepare(recipe, quiet=True).fingerprint != before


# splits ---------------------------------------------------------------------------------------------------------


def _queries(world: Path, folder: Path, split: Any, **data: Any) -> list[int]:
    return [int(row.query) for row in open_split(_recipe(world, folder, **data), split)]


def test_slices_and_drawn_rows_part_a_split(world: Path, tmp_path: Path) -> None:
    _lines(tmp_path / "train.jsonl", [{"query": f"{n}", "label": "1"} for n in range(101)])
    every = list(range(101))
    assert _queries(world, tmp_path, "train", train="train[:90%]") == every[:91]
    assert _queries(world, tmp_path, "train", train="train[90%:]") == every[91:]
    assert _queries(world, tmp_path, "train", train="train[3:5]") == [3, 4]
    assert _queries(world, tmp_path, "train", train="train[:500]") == every
    drawn = {"validation": "train, 5 %"}
    held_out = _queries(world, tmp_path, "validation", **drawn)
    assert len(held_out) == 5
    assert held_out == sorted(held_out) != every[:5]
    assert _queries(world, tmp_path, "train", **drawn) == [n for n in every if n not in held_out]
    assert _queries(world, tmp_path, "validation") == []


def test_rows_that_are_trained_and_validated_are_said(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _lines(tmp_path / "train.jsonl", [{"query": f"{n}", "label": "1"} for n in range(20)])
    recipe = _recipe(world, tmp_path, validation="train[90%:]")
    caplog.set_level("INFO", "trainer")
    index = prepare(recipe, quiet=True)
    assert "data.validation: 2 of its 2 rows are trained on too" in caplog.text
    assert index.splits["validation"].rows.tolist() == [18, 19]
    assert index.splits["test"].rows.tolist() == []


def test_a_row_that_stands_twice_and_is_trained_and_validated_is_said(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _lines(tmp_path / "train.jsonl", [{"query": f"{n // 2}", "label": "1"} for n in range(20)])
    caplog.set_level("INFO", "trainer")
    prepare(_recipe(world, tmp_path, train="train[:95%]", validation="train[95%:]"), quiet=True)
    assert "data.validation: 1 of its 1 rows are trained on too; rows with the same images" in caplog.text


def test_a_row_that_cannot_be_read_any_more_is_a_row_error(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="an image is of type int"):
        ImageFiles(tmp_path, tmp_path).read(3)
    assert Row((), (), []).images_digest == Row((), (), ["x"]).images_digest


# chat templates -------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_of_the_users_own_writes_the_chat_and_is_part_of_the_identity(
    world: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    _lines(tmp_path / "train.jsonl", [{"query": "Why?", "label": "So."}])
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(_recipe(world, tmp_path, system_message=None, chat_template="own.jinja")))
    recipe, plain = load_recipe(file), _recipe(world, tmp_path, system_message=None)
    index = prepare(recipe, quiet=True)
    row = open_split(recipe, "train")[0]
    text = Encoder(load_processor(recipe), None, "answer").conversation(row).text
    assert text == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    assert (
        "You are a helpful assistant" in Encoder(load_processor(plain), None, "answer").conversation(row).text
    )
    before = find_identity(recipe, index)
    assert OWN_TEMPLATE not in find_identity(plain, index).parts
    assert before.missing() == find_identity(plain, index).missing() == []
    assert {change.key for change in changes(altering_values(plain), altering_values(recipe))} == {
        "data.chat_template"
    }
    (tmp_path / "own.jinja").write_text(TEMPLATE.replace("assistant\n", "assistant\n\n"))
    assert [change.key for change in content_changes(before, find_identity(recipe, index))] == [OWN_TEMPLATE]
    assert read_index(recipe) is None
    for text, words in (
        ("{% for %}", "cannot be used"),
        ("{{ 'x' * 10 ** 9 }}", "cannot be used"),
        ("{% include '/etc/passwd' %}", "cannot be used"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("", r"it writes <\|image_pad\|> 0 times for one image"),
        (
            TEMPLATE.replace("<|image_pad|>", "<|image_pad|>" * 2),
            r"it writes <\|image_pad\|> 2 times for one image",
        ),
        (TEMPLATE.replace("part.text", "part.words"), "it leaves out the question or the answer"),
        (TEMPLATE.replace("in messages", "in messages | reverse"), "does not begin with the prompt"),
        (
            TEMPLATE + "{{ strftime_now('%s') }}",
            "it uses strftime_now, which makes other text of the same row",
        ),
        (TEMPLATE + "{{ [1, 2] | random }}", r"it uses \| random, which makes other text"),
    ):
        (tmp_path / "own.jinja").write_text(text)
        with pytest.raises(ConfigError, match=rf"data\.chat_template: .*own.jinja.*{words}"):
            load_processor(recipe)
    (tmp_path / "own.jinja").unlink()
    for read in (lambda: load_processor(recipe), lambda: read_index(recipe)):
        with pytest.raises(
            ConfigError, match=r"data\.chat_template: .*own\.jinja cannot be read \(No such file"
        ):
            read()
