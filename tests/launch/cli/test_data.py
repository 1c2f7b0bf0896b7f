"""`samestep init` writes a recipe for what lies in a folder, and says what it cannot tell."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.hub_names import EMBEDDED
from launch.inputs.new_recipe import recipe_text, seen_data
from launch.recipe.loading import load_recipe
from tests.helpers.launcher import Launcher, samestep, stand_in


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launcher:
    return stand_in(monkeypatch, tmp_path)


def _table(folder: Path, name: str, first: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(first)
    return folder


def test_a_recipe_is_written_for_a_folder_with_a_csv(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _table(tmp_path / "pictures", "labels.csv", "picture,Question,answer\n" + "a.png,why?,so\n" * 2)
    file = tmp_path / "my.yaml"
    assert samestep("init", str(file), "--data", str(folder), "--model", "a/b", "--gpus", "64") == 0
    assert f"samestep run {file} --gpus-per-node 64" in capsys.readouterr().out
    recipe = load_recipe(file)
    assert recipe.data.columns == {"image": "picture", "query": "Question", "label": "answer"}
    assert (recipe.data.train, recipe.data.validation, recipe.data.test) == ("labels", "labels, 5 %", None)
    assert (recipe.name, recipe.batch.global_batch_size) == ("my", 64)
    assert recipe.data.dataset == str(folder)
    assert "# drawn out of the training rows, the same in every run" in file.read_text()
    assert samestep("init", str(file), "--data", str(folder)) == 2
    assert "is there already" in capsys.readouterr().err


def test_splits_chats_and_imagefolders_are_seen(tmp_path: Path) -> None:
    folder = _table(tmp_path / "a", "train.jsonl", json.dumps({"messages": [], "images": []}))
    pq.write_table(pa.table({"messages": [["x"]]}), folder / "val-00000-of-00002.parquet")
    seen = seen_data(str(folder), {})
    assert dict(seen.splits) == {"train": "train", "validation": "val", "test": None}
    assert seen.columns is None
    imagefolder = _table(
        tmp_path / "b" / "train", "metadata.csv", "file_name,query,label\na.png,?,1\n"
    ).parent
    assert seen_data(str(imagefolder), {}).columns == {
        "image": "file_name",
        "query": "query",
        "label": "label",
    }
    charts = seen_data(EMBEDDED, {})
    (tmp_path / "tiny.yaml").write_text(recipe_text("tiny", EMBEDDED, charts, 0))
    assert (
        "validation: val  # what the run is evaluated on as it trains" in (tmp_path / "tiny.yaml").read_text()
    )
    tiny = load_recipe(tmp_path / "tiny.yaml")
    assert (tiny.model.dtype, tiny.data.validation) == ("float32", "val")


def test_few_rows_and_odd_file_names_make_a_recipe_that_runs(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"{n}.png,why {n}?,so\n" for n in range(40))
    folder = _table(tmp_path / "pictures", "train.csv", f"image,query,label\n{rows}")
    file = tmp_path / "mein Rezept ä.yaml"
    assert samestep("init", str(file), "--data", str(folder), "--gpus", "1") == 0
    said = capsys.readouterr().out
    assert "40 rows" in said
    assert f"samestep run '{file}' --gpus-per-node 1" in said
    recipe = load_recipe(file)
    assert (recipe.name, recipe.batch.global_batch_size) == ("mein-Rezept", 8)
    (folder / "train.csv").rename(folder / "train-00000-of-00002.csv")
    assert seen_data(str(folder), {}).rows is None
    one = _table(tmp_path / "one", "train.csv", "image,query,label\na.png,why?,so\n")
    assert seen_data(str(one), {}).splits["validation"] is None


@pytest.mark.parametrize(
    ("column", "speaker", "text", "first", "second"),
    [
        ("messages", "role", "content", "user", "assistant"),
        ("conversations", "from", "value", "human", "gpt"),
    ],
)
def test_chats_of_several_answers_are_said_to_train_the_last_one_and_what_trains_all(
    launcher: Launcher,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    column: str,
    speaker: str,
    text: str,
    first: str,
    second: str,
) -> None:
    rows = [
        {column: [{speaker: who, text: "x"} for _ in range(turns) for who in (first, second)]}
        for turns in (1, 3)
    ]
    lines = [json.dumps(row) for row in rows]
    for name, kept, said_of in (
        ("one", 1, False),
        ("more", 2, True),
        ("torn", 2, True),
        ("parquet", 2, True),
    ):
        folder = tmp_path / name
        if name == "parquet":
            folder.mkdir()
            pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
        else:
            torn = "{\n" * (name == "torn")
            _table(folder, "train.jsonl", torn + "\n".join(lines[:kept]))
        assert samestep("init", str(tmp_path / f"{name}.yaml"), "--data", str(folder)) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert (
            "chats have up to 3 answers, of which data.loss: answer trains the last one" in said
        ) is said_of
        assert ("set data.loss: all_answers" in said) is said_of
        assert load_recipe(tmp_path / f"{name}.yaml").data.loss == "answer"


def test_what_cannot_be_told_is_asked_for(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _table(tmp_path / "odd", "train.csv", "bild,frage,antwort\na.png,?,1\n")
    for arguments, words in (
        ((), "--data: missing"),
        (("--data", str(tmp_path)), "holds no table"),
        (("--data", str(folder)), "--query and --label: "),
        (("--data", str(folder), "--query", "fragen"), "--query fragen: "),
        (("--data", str(folder), "--model", "nonsense"), "--model: 'nonsense' is not a folder"),
    ):
        assert samestep("init", str(tmp_path / "x.yaml"), *arguments) == 2
        said = capsys.readouterr().err
        assert words in said
        assert len(said.splitlines()) == 1
    assert samestep("init", str(tmp_path / "none" / "x.yaml"), "--data", EMBEDDED) == 2
    assert "its folder is not there" in capsys.readouterr().err
    named = ("--image", "bild", "--query", "frage", "--label", "antwort")
    assert samestep("init", str(tmp_path / "x.yaml"), "--data", str(folder), *named) == 0
    columns = load_recipe(tmp_path / "x.yaml").data.columns
    assert columns == {"image": "bild", "query": "frage", "label": "antwort"}


def test_what_init_writes_can_be_run_or_is_refused_with_the_file_that_is_to_be_renamed(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "image,query,label\na.png,?,1\n"
    for number, (name, words) in enumerate(
        (
            ("my labels.csv", "my labels.csv has no name that a split can have; rename it"),
            ("données.csv", "données.csv has no name that a split can have"),
            (
                "train.tsv",
                "holds no table (.jsonl, .csv or .parquet, or metadata.jsonl beside the images), but train.tsv",
            ),
            ("LABELS.CSV", "but LABELS.CSV; write one"),
        )
    ):
        folder = _table(tmp_path / str(number), name, rows)
        assert samestep("init", "x.yaml", "--data", str(folder)) == 2
        assert words in capsys.readouterr().err
    semicolons = _table(tmp_path / "semicolons", "train.csv", rows.replace(",", ";"))
    assert samestep("init", "x.yaml", "--data", str(semicolons)) == 2
    assert "not by commas; save it with commas" in capsys.readouterr().err
    twice = ("--query", "query", "--label", "query")
    assert samestep("init", "x.yaml", "--data", str(_table(tmp_path / "a", "train.csv", rows)), *twice) == 2
    assert "'query' is named for two of image, query and label" in capsys.readouterr().err
    assert samestep("init", "x.yaml", "--data", str(tmp_path / "a" / "train.csv")) == 2
    assert "a/train.csv is no folder; give the folder that it is in" in capsys.readouterr().err
    assert not Path("x.yaml").exists()
    _table(tmp_path / "no", "null.csv", rows.replace("image", "image_url"))
    _table(tmp_path / "no", "other.csv", rows)
    assert samestep("init", "x.yaml", "--data", "no") == 0
    said = capsys.readouterr().out
    assert "; not used: other; no column of images was seen, --image names one)" in said
    recipe = load_recipe("x.yaml")
    assert (recipe.data.dataset, recipe.data.train) == (str(tmp_path / "no"), "null")
    assert samestep("init", "x.yaml", "--data", "nowhere") == 2
    assert "x.yaml: is there already" in capsys.readouterr().err
