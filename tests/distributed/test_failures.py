"""What goes wrong on one rank stops all of them, with its reason, and costs no data."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.launching import accelerate_launch
from launch.recipe.loading import dump_recipe, recipe_from_dict
from tests.conftest import recipe_values
from tests.helpers.distributed.forked import forked_launch
from tests.helpers.distributed.recorded import assert_the_same_to_the_byte, metrics_of, run_of
from trainer.train import main as train


def test_what_one_rank_alone_sees_stops_all_with_its_reason(world: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    values = recipe_values(world)
    values["checkpoint"] = {"every_steps": 1}
    values["lora"] = {"lora_dropout": 0.05}
    recipe.write_text(dump_recipe(recipe_from_dict(values)))
    arguments = [
        "tests.helpers.distributed.fail_on_rank_1",
        str(recipe),
        "--runs-dir",
        str(tmp_path),
        "--name",
        "run",
    ]
    ended = forked_launch(2, arguments)
    for rank in (0, 1):
        said = f"unreadable: rank {rank} ended with: rank 1: charts.parquet: Input/output error; see that the disk"
        assert ended.stdout.count(said) == 1

    full = re.findall(r"full: rank (\d) ended with: (.*)", ended.stdout)
    assert {rank for rank, _ in full} == {"0", "1"}  # rank 0's thread failed to save, rank 1 knows why too
    no_room = re.compile(r"checkpoint-2\.partial: No space left on device \(disk at .* MB free\); make room")
    assert all(no_room.search(words) for _, words in full)
    left = {folder.name for folder in (tmp_path / "full").glob("checkpoint-*")}
    # The ranks hear of it in the next step, or in the one after when the thread took that long.
    assert {"checkpoint-1"} <= left <= {"checkpoint-1", "checkpoint-3"}
    assert not (tmp_path / "full" / "adapter").exists()

    broken = re.findall(r"broken: rank (\d) ended with: (.*)", ended.stdout)
    assert sorted(broken) == [("0", "rank 1: the trial fails"), ("1", "rank 1: the trial fails")]
    _check_memory(tmp_path, ended.stdout)
    assert ended.returncode != 0
    assert ended.stdout.count("error: step 2: the loss is nan") == 1
    assert "the weights are unchanged; the step's samples are [" in ended.stdout
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]
    assert (tmp_path / "run" / "checkpoint-1" / "manifest.json").exists()
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "DONE").exists()


def test_a_plain_launch_of_a_finished_run_says_so_and_changes_no_file(world: Path, tmp_path: Path) -> None:
    recipe, runs = tmp_path / "recipe.yaml", tmp_path / "runs"
    recipe.write_text(dump_recipe(recipe_from_dict(recipe_values(world))))
    arguments = [str(recipe), "--runs-dir", str(runs), "--name", "run"]
    assert train(arguments) == 0
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in runs.rglob("*")}
    ended = accelerate_launch(2, ["trainer.train", *arguments])
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count(f"{runs / 'run'}: done already, adapter in {runs / 'run' / 'adapter'}") == 1
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in runs.rglob("*")} == before


def _check_memory(runs: Path, printed: str) -> None:
    """Rank 1 ran out of memory in step 3, and in another run before its first step, with all of a rank in one pack."""
    words = dict(re.findall(r"later: rank (\d) ended with: (.*)", printed))
    assert words == dict.fromkeys("01", words["0"])  # and the attempt that went on ended without any
    assert words["0"].startswith("rank 1: GPU: out of memory (9.00 GiB more wanted)")
    assert [line["step"] for line in metrics_of(runs / "later")] == [1, 2, 3, 4, 5, 6]
    assert (runs / "later" / "DONE").exists()
    later, tried, fixed = (run_of(runs / name).plan for name in ("later", "tried", "fixed"))
    assert later.settings.out_of_memory == 1
    assert later.micro_batch_tokens < run_of(runs / "full").plan.micro_batch_tokens
    assert "after a GPU ran out of memory" in later.settings.reason
    # The other run came down before its first step, and is the run that is planned so from the beginning.
    assert (tried.settings.tried, tried.settings.out_of_memory) == (True, 0)
    assert tried.micro_batches == fixed.micro_batches > 1
    assert_the_same_to_the_byte(runs / "tried", runs / "fixed")
