"""`samestep checkpoints`: every checkpoint of a run with its size and age, and why one cannot be used."""

import os
import sys
import time
from pathlib import Path

import pytest

from launch.checkpoints.manifest import MANIFEST
from launch.checkpoints.publish import partial_folder, publish
from launch.checkpoints.rotation import clear_unpublished
from launch.checkpoints.scan import Checkpoint
from launch.cli import main
from launch.monitor.checkpoint_table import table_rows
from launch.run.continuation import Continuation
from launch.run.directory import RunDirectory
from launch.run.request_files import write_request
from launch.units import age, megabytes
from tests.helpers.attempts import planned, recipe_of
from tests.helpers.checkpoints import ADAPTER, change_one_bit, halve, published, write_aside


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run without checkpoints; the working folder holds `runs/`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("")
    (folder / "plan.json").write_text("")
    return folder


def publish_with(run: Path, step: int, **facts: object) -> Path:
    final = run / f"checkpoint-{step}"
    publish(write_aside(run, step), final, {"step": step, **facts})
    return final


def samestep(*arguments: str) -> int:
    """Run `samestep checkpoints` in this process; returns its exit status."""
    before, sys.argv = sys.argv, ["samestep", "checkpoints", *arguments]
    try:
        main.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0


def shown(
    capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0
) -> tuple[dict[str, list[str]], list[str]]:
    """The table's rows (step and state -> cells) and the lines below it; the command ends with `status`."""
    assert samestep(*arguments) == status
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    below = [line for line in lines if line and line[0] not in "┏┃┡│└" and "checkpoints of" not in line]
    return {f"{row[0]} {row[-1]}": row for row in cells}, below


def test_a_row_says_step_form_layout_size_age_and_that_it_is_valid(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = publish_with(run, 20, world_size=4, strategy="fsdp", form="sharded")
    new = publish_with(run, 100, world_size=2, strategy="ddp")
    (partial_folder(run, 120)).mkdir()
    (partial_folder(run, 120) / "part").write_bytes(b"0" * (5 * 2**20))
    now = time.time()
    os.utime(old / MANIFEST, (now, now - 3 * 3600 - 60))
    os.utime(new / MANIFEST, (now, now - 190))
    os.utime(partial_folder(run, 120), (now, now - 61))
    found, below = shown(capsys, "mine")
    size = f"{(1013 + (new / MANIFEST).stat().st_size) / 2**20:.3f}"
    assert list(found) == ["20 valid", "100 valid", "120 unpublished"]
    assert found["20 valid"][1:4] == ["sharded", "4", "fsdp"]
    assert found["20 valid"][5] == "3 h"
    assert found["100 valid"] == ["100", "portable", "2", "ddp", size, "3 min", "valid"]
    assert found["120 unpublished"] == ["120", "?", "?", "?", "5.0", "1 min", "unpublished"]
    assert below[0] == "resuming would go on from step 100"
    assert below[1].startswith(f"{partial_folder(run, 120)}: was never published (")


def test_every_reason_is_one_whole_line_below_the_table(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (20, 40, 60, 80):
        publish_with(run, step, world_size=1, strategy="single")
    halve(run / "checkpoint-40" / ADAPTER)
    change_one_bit(run / "checkpoint-60" / ADAPTER)
    (run / "checkpoint-60" / "note [bold]\nx").write_text("")
    (run / "checkpoint-80" / MANIFEST).unlink()
    found, below = shown(capsys, str(run))
    assert list(found) == ["20 valid", "40 damaged", "60 damaged", "80 damaged"]
    assert found["60 damaged"][3] == "single"
    assert found["80 damaged"][1:4] == ["?", "?", "?"]
    assert [line.split(" (")[0].removeprefix(f"{run}/checkpoint-") for line in below] == [
        "resuming would go on from step 20",
        f"40/{ADAPTER}: has another size",
        f"60/{ADAPTER}: has another content",
        r"60/note [bold]\nx: was not published",
        "80/manifest.json: is missing; the checkpoint was never completed, use an older checkpoint",
    ]


def test_it_says_what_resuming_would_do_without_a_valid_one(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_aside(run, 20)
    assert shown(capsys, "mine")[1][0] == "resuming would begin anew: none was published yet"
    (published(run, 40) / ADAPTER).unlink()
    _, below = shown(capsys, "mine", status=1)
    assert below[0].startswith(
        "resuming would be refused: every published checkpoint is damaged; bring one back"
    )
    assert any(line.endswith("bytes were published); bring back a copy") for line in below)
    assert samestep("mine", "--json") == 1


def test_it_holds_the_newest_against_the_plan(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(8)
    plan = planned(recipe, Continuation())
    write_request(RunDirectory(run), recipe, plan)
    publish_with(run, 5, samples_consumed=40)
    assert shown(capsys, "mine")[1][0] == "resuming would go on from step 5"
    publish_with(run, 6, samples_consumed=96)
    assert shown(capsys, "mine")[1][0].startswith(
        "resuming would be refused: step 6 has seen 96 samples where"
    )
    publish_with(run, 7, samples_consumed="many")
    assert shown(capsys, "mine")[1][0].startswith("resuming would be refused: step 7 does not say how many")
    publish_with(run, 1000, samples_consumed=8000)
    assert "step 1000 lies beyond the end of its plan" in shown(capsys, "mine")[1][0]


def test_checkpoints_are_shown_without_recipe_and_plan_too(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_with(run, 5)
    for file in ("recipe.yaml", "plan.json"):
        (run / file).unlink()
    assert list(shown(capsys, "mine")[0]) == ["5 valid"]


def test_a_result_without_checkpoints_is_not_said_to_begin_anew(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "adapter").mkdir()
    assert "to go on would be refused" in shown(capsys, "mine")[1][0]


def test_a_run_without_checkpoints_says_what_to_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_aside(run, 20)
    clear_unpublished(run)
    found, (line,) = shown(capsys, "mine", "--runs-dir", str(run.parent))
    assert found == {}
    assert line.startswith(f"{run}: no checkpoint yet (see checkpoint.every_steps); ")
    assert "`samestep run`" in line


def test_odd_facts_and_names_do_not_break_the_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_with(run, 20, form="[red]\ud800", world_size=[1, 2], strategy=None)
    run = run.rename(run.with_name("[red] run"))
    found, _ = shown(capsys, str(run))
    assert found["20 valid"][1:4] == [r"[red]\ud800", "[1, 2]", "None"]


def test_an_unknown_run_is_refused_with_status_two(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert samestep("nothing") == 2
    assert "nothing: no such run" in capsys.readouterr().err


def test_the_help_shows_an_example(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert samestep("--help") == 0
    printed = capsys.readouterr().out
    assert "samestep checkpoints embedded" in printed[printed.index("Example:") :]


def test_the_age_of_what_has_vanished_is_not_known(tmp_path: Path) -> None:
    gone = Checkpoint(tmp_path / "checkpoint-20", 20, True, {"step": 20}, 0, ("gone",))
    assert table_rows([gone], now=0.0) == [("20", "portable", "?", "?", "0.000", "?", "damaged")]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "0 s"),
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (3600, "1 h"),
        (48 * 3600 - 1, "47 h"),
        (48 * 3600, "2 days"),
        (400 * 86400, "400 days"),
    ],
)
def test_an_age_is_said_in_whole_units_that_have_passed(seconds: float, words: str) -> None:
    assert age(seconds) == words


def test_small_sizes_keep_digits_behind_the_point() -> None:
    assert [megabytes(size) for size in (1012, 2**20, 1234 * 2**20 + 2**19)] == ["0.001", "1.0", "1,234.5"]
