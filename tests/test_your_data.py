"""docs/your-data.md does what it says: from a folder of pictures and a CSV to a trained model in five commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from launch.run.directory import RunDirectory, read_marker
from tests.conftest import chart_png

PAGE = Path(__file__).parents[1] / "docs" / "your-data.md"


def test_the_five_commands_of_the_page_train_a_model(world: Path, tmp_path: Path) -> None:
    commands = re.findall(r"^samestep .*$", PAGE.read_text(), re.MULTILINE)
    assert len(commands) == 5
    (tmp_path / "pictures").mkdir()
    lines = ["picture,question,answer"]
    for number in range(40):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(chart_png(number))
        lines.append(f'{number}.png,"How high is bar {number}, please?",{number * 7 % 90}')
    (tmp_path / "pictures" / "labels.csv").write_text("\n".join(lines))
    said = []
    for command in commands:
        _, name, *words = shlex.split(command)
        words = [str(world / "base") if word.startswith("Qwen/") else word for word in words]
        # A CPU: fp32 instead of the bfloat16 that the recipe says.
        words += (
            ["--gpus", "0"]
            if name == "init"
            else ["--gpus-per-node", "1"]
            if name in ("run", "evaluate")
            else []
        )
        ended = subprocess.run(
            [sys.executable, "-m", "launch.cli.main", name, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(PAGE.parents[1])},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == 0, (command, ended.stdout, ended.stderr)
        said.append(ended.stdout + ended.stderr)
    assert "labels.csv, 40 rows, columns picture, question, answer" in said[0]
    assert "columns (data.columns is given): image from picture" in said[1]
    assert "»0<|im_end|>\\n«" in said[2]
    run = RunDirectory(tmp_path / "runs" / "my")
    marker = read_marker(run)
    assert marker is not None
    assert (marker.kind, marker.text) == ("DONE", "step 14")
    result = json.loads(run.eval_file("validation").read_text())
    assert list(result["metrics"]) == ["exact_match", "token_f1"]
    assert result["metrics"]["exact_match"]["adapter"]["count"] == result["questions"] == 2
    assert {each["row"] for each in result["predictions"]} < set(range(40))
