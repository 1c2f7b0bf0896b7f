"""What a job's first node makes of the nodes' words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.doctor.in_job import main


@pytest.mark.parametrize("writable", [True, False])
def test_a_node_that_is_not_fit_is_named_also_when_there_is_no_writing_down_why(
    writable: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = {"node": "n1", "check": "scratch", "state": "ok", "text": "50 GiB free"}
    full = {
        "node": "n2",
        "check": "scratch",
        "state": "failed",
        "text": "0.0 GiB free",
        "remedy": "make room",
    }
    lines = enumerate(([fit, {"end": True}], [full, {"end": True}]))
    words = [f"{task}: {json.dumps(line)}" for task, said in lines for line in said]
    (tmp_path / "doctor.txt").write_text("\n".join(words))
    if not writable:
        (tmp_path / "doctor.json").mkdir()
    assert main([str(tmp_path), "--node-list", "n[1-2]"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("n2 ")
    assert "0.0 GiB free" in told.out
    assert (f"{tmp_path}/doctor.json: cannot be written" in told.err) != writable
