"""The record of steps: who waited for whom, and for what."""

from __future__ import annotations

import json
import time
from pathlib import Path

from trainer.loop.step_record import PHASES, Row, StepRecord, summary


def row(step: int, **seconds: float) -> Row:
    return {"step": step, **dict.fromkeys(PHASES, 0.0), **seconds}


def test_the_rank_that_waits_least_is_named_with_the_phase_in_which_it_took_longer() -> None:
    punctual = [row(step, data=0.01, launching=0.1, GPU=0.09, reduction=0.2) for step in (1, 2, 3, 4)]
    late = [row(step, data=0.2, launching=0.11, GPU=0.08, reduction=0.01) for step in (1, 2, 3)]
    late.append(row(4, data=0.01, launching=0.29, GPU=0.09, reduction=0.01))
    first, second = summary([punctual, late, punctual])
    assert first.startswith("steps 1 to 4: 0.400 s each, data 0.0")
    assert "ranks waited 0.127 s of a step for the last one (31.7%)" in second
    assert second.endswith("last: rank 1 in 4 steps (data 3, launching 1)")


def test_a_rank_alone_is_told_where_its_time_goes_and_of_no_waiting() -> None:
    (line,) = summary([[row(7, launching=0.2, GPU=0.05)]])
    assert (
        line
        == "steps 7 to 7: 0.250 s each, data 0.000, features 0.000, launching 0.200, GPU 0.050, reduction 0.000, "
        "rest 0.000"
    )


def test_a_phase_inside_another_is_counted_once_and_what_is_in_none_is_the_rest(tmp_path: Path) -> None:
    record = StepRecord(tmp_path / "logs" / "steps-of-rank-0.jsonl")
    record.begin()
    with record.phase("launching"):
        time.sleep(0.02)
        with record.phase("reduction"):
            time.sleep(0.05)
    time.sleep(0.03)
    record.end_step(5)
    (line,) = (tmp_path / "logs" / "steps-of-rank-0.jsonl").read_text().splitlines()
    seconds = json.loads(line)
    assert seconds["step"] == 5
    assert seconds["reduction"] >= 0.05
    assert 0.02 <= seconds["launching"] < 0.05
    assert seconds["rest"] >= 0.03


def test_without_a_file_nothing_is_written_or_summed_up(tmp_path: Path) -> None:
    record = StepRecord()
    with record.phase("launching"):
        pass
    record.end_step(1)
    record.summarize()
    assert not list(tmp_path.iterdir())
