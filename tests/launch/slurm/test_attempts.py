"""The ledger: what is counted, how ends are told apart, and when trying stops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.run.directory import MarkerKind, RunDirectory, request_stop, write_marker
from launch.slurm.attempts import (
    Attempt,
    End,
    How,
    how_it_ended,
    ledger_file,
    newest_step,
    read_ledger,
    reason_to_give_up,
    with_job,
    write_event,
)
from launch.slurm.output import JobFacts
from tests.helpers.attempts import attempt, recipe_of


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def _attempts(*ends: tuple[How, int], job: str = "7") -> list[Attempt]:
    """Ends and the step that each got to, one after another."""
    steps = [0, *(step for _, step in ends)]
    return [
        Attempt(job, number, 0.0, steps[number], how=how, last_step=step)
        for number, (how, step) in enumerate(ends)
    ]


def test_attempts_are_counted_apart_and_one_without_an_end_is_open(run: RunDirectory) -> None:
    assert read_ledger(run).job is None
    write_event(run, "submit", job="7")
    assert read_ledger(run).job == "7"
    for restart, how in enumerate(["preempted", "time", "crashed", "preempted"]):
        write_event(run, "start", job="7", restart=restart, began=1.0, first_step=restart)
        write_event(run, "end", how=how, reason="x", last_step=restart + 1, ended=2.0)
    write_event(run, "start", job="7", restart=4, began=3.0, first_step=4, log="l", nodes="n1")
    book = read_ledger(run)
    assert book.restarts() == {"preempted": 2, "time": 1, "crashed": 1, "node_fail": 0}
    assert book.open is not None
    assert (book.open.restart, book.open.log) == (4, "l")
    write_event(run, "submit", job="9")
    assert read_ledger(run).job == "9"


def test_a_line_cut_short_or_of_nobody_is_passed_over(run: RunDirectory) -> None:
    write_event(run, "submit", job="7")
    with ledger_file(run).open("a") as file:
        file.write(
            '[1]\n{"event": "start"}\n{"event": "other", "job": "1"}\n{"event": "end", "how": "odd"}\n{"event": "sta'
        )
    write_event(run, "start", job="7", restart=0, began=1.0, first_step=0)
    book = read_ledger(run)
    assert (book.submitted, [one.job for one in book.attempts]) == (("7",), ["7"])


@pytest.mark.parametrize(
    ("marker", "text", "asked", "down", "how"),
    [
        ("DONE", "step 8", "", [], "done"),
        ("REFUSED", "lora.r: bad", "", [], "refused"),
        ("STOPPED", "user: at step 3 of 8", "preempted", [], "stopped"),
        ("STOPPED", "preempted: at step 3 of 8", "preempted", ["n2"], "preempted"),
        ("STOPPED", "time: at step 3 of 8", "time", [], "time"),
        ("STOPPED", "orphaned: at step 3 of 8", "", [], "crashed"),
        (None, "", "", [], "crashed"),
        (None, "", "preempted", [], "preempted"),  # KILL came before the save
        (None, "", "time", [], "time"),
        (None, "", "preempted", ["n2"], "node_fail"),  # Slurm takes the job away because a node died
    ],
)
def test_the_marker_says_how_it_ended(
    marker: MarkerKind | None, text: str, asked: str, down: list[str], how: How, run: RunDirectory
) -> None:
    if marker:
        write_marker(run, marker, text)
    # Nodes write it as well when a rank has died: it tells nothing.
    request_stop(run, "preempted")
    end = how_it_ended(run, asked, down)
    assert end.how == how
    assert (end.reason == "node failure: n2") == (how == "node_fail")


def _facts(state: str, reason: str = "None", restarts: int = 1) -> JobFacts:
    return JobFacts(state, reason, restarts, True, "", "")


@pytest.mark.parametrize(
    ("facts", "how", "queued"),
    [  # as Slurm 22.05 shows them inside the TERM trap of an attempt that is restart 1
        (None, "preempted", False),
        (_facts("RUNNING"), "preempted", False),  # scancel --signal, or the warning
        (_facts("COMPLETING", restarts=2), "preempted", True),  # scontrol requeue, or another partition's job
        (_facts("COMPLETING", "TimeLimit"), "time", False),
        (_facts("COMPLETING"), "stopped", False),  # scancel
        (_facts("CANCELLED"), "stopped", False),
    ],
)
def test_the_jobs_state_tells_what_a_term_meant(facts: JobFacts | None, how: How, queued: bool) -> None:
    end, again = with_job(End("preempted", "x"), facts, restart=1)
    assert (end.how, again) == (how, queued)
    assert with_job(End("done"), facts, restart=1) == (End("done"), False)


def test_a_dead_node_of_a_job_that_is_not_to_be_queued_again_is_no_scancel() -> None:
    facts = JobFacts("COMPLETING", "None", 1, False, "", "")
    dead = End("node_fail", "node failure: n2")
    assert with_job(dead, facts, 1) == (dead, False)
    assert with_job(End("preempted", "x"), facts, 1)[0].how == "stopped"


def test_the_attempt_under_way_is_not_the_one_that_was_turned_away(run: RunDirectory) -> None:
    write_event(run, "start", job="7", restart=0, began=1.0, first_step=0)
    write_event(
        run,
        "unstarted",
        job="8",
        restart=0,
        began=2.0,
        first_step=0,
        how="refused",
        reason="job 7",
        ended=2.0,
    )
    book = read_ledger(run)
    assert (book.job, book.open and book.open.job, book.attempts[-1].how) == ("7", "7", "refused")
    write_event(run, "end", job="7", restart=0, how="done", ended=9.0)
    book = read_ledger(run)
    assert (book.job, book.last and book.last.how, book.open) == ("7", "done", None)


def test_attempts_that_nobody_wrote_down_count_as_ones_that_saved_nothing(run: RunDirectory) -> None:
    write_event(run, "start", job="7", restart=1, began=1.0, first_step=0)
    write_event(run, "end", how="preempted", last_step=5)
    attempts = read_ledger(run).attempts_of("7", 4)
    assert [(one.restart, one.how, one.saved) for one in attempts] == [
        (0, "crashed", False),
        (1, "preempted", True),
        (2, "crashed", False),
        (3, "crashed", False),
    ]
    assert reason_to_give_up(attempts, 3) is None
    assert reason_to_give_up(read_ledger(run).attempts_of("7", 5), 3) is not None
    assert read_ledger(run).attempts_of("9", 0) == []


def _given_up(*ends: tuple[How, int], max_crashes: int = 3, every: float = 60.0) -> str | None:
    """For attempts that end one after another, `every` so many seconds."""
    attempts = [replace(one, ended=every * number) for number, one in enumerate(_attempts(*ends), 1)]
    return reason_to_give_up(attempts, max_crashes)


def test_a_run_that_gets_forward_goes_on_whatever_happens_to_it() -> None:
    assert reason_to_give_up([], 3) is None
    assert _given_up(*[("preempted", number) for number in range(1, 99)]) is None
    storm: list[How] = ["node_fail", "crashed", "node_fail", "node_fail", "crashed", "node_fail", "crashed"]
    assert _given_up(*((how, 10 * number) for number, how in enumerate(storm, 1))) is None
    assert _given_up(("crashed", 5), ("crashed", 5), ("crashed", 9), ("crashed", 9), ("crashed", 9)) is None


def test_three_attempts_in_a_row_that_save_no_step_are_enough() -> None:
    ends: list[tuple[How, int]] = [("preempted", 5), ("preempted", 5), ("crashed", 5)]
    assert _given_up(*ends) is None
    assert _given_up(*ends, ("time", 5)) == (
        "no step was saved in 3 attempts in a row (preempted, crashed, time; at step 5); "
        "see the log, then submit again"
    )
    assert _given_up(*ends, ("time", 5), max_crashes=4) is None
    assert _given_up(("crashed", 0), max_crashes=1) is not None


def test_dead_nodes_are_counted_apart() -> None:
    bad: list[tuple[How, int]] = [("node_fail", 0)] * 5
    assert _given_up(*bad, ("crashed", 0), ("crashed", 0)) is None
    assert "no step was saved in 6 attempts in a row" in (_given_up(*bad, ("node_fail", 0)) or "")
    assert "(node_fail, " in (_given_up(*bad, *[("crashed", 0)] * 3) or "")  # type: ignore[list-item]


def test_a_run_that_crashes_all_day_is_given_up_although_it_gets_forward() -> None:
    ends: list[tuple[How, int]] = [("crashed", number) for number in range(1, 25)]
    assert _given_up(*ends[:-1]) is None
    assert (
        _given_up(*ends) == "crashed 24 times within a day (now at step 24); see the log, then submit again"
    )
    assert _given_up(*ends, ("preempted", 25)) is None
    assert _given_up(*ends, every=3800.0) is None
    assert _given_up(*ends, max_crashes=4) is None


def test_a_new_submission_counts_anew() -> None:
    crashes: list[tuple[How, int]] = [("crashed", 0)] * 3
    assert reason_to_give_up([*_attempts(*crashes), *_attempts(("crashed", 0), job="8")], 3) is None


def test_an_end_belongs_to_its_own_job_where_two_overlap(run: RunDirectory) -> None:
    for job in ("7", "8"):
        write_event(run, "start", job=job, restart=0, began=1.0, first_step=0)
    write_event(run, "end", how="done", job="7", restart=0, last_step=9)
    assert [(found.job, found.how) for found in read_ledger(run).attempts] == [
        ("7", "done"),
        ("8", None),
    ]
    write_event(run, "end", how="crashed", job="9", restart=0)
    assert read_ledger(run).attempts[1].how is None


@pytest.mark.parametrize(
    "odd",
    [{"event": []}, {"event": "end", "how": "crashed", "last_step": "4"}, {"event": "end", "how": ["done"]}],
    ids=str,
)
def test_a_line_with_values_of_another_kind_is_passed_over(run: RunDirectory, odd: dict[str, object]) -> None:
    write_event(run, "start", job="7", restart=0, began=1.0, first_step=0)
    with ledger_file(run).open("a") as file:
        file.write(json.dumps(odd) + "\n")
    assert [found.how for found in read_ledger(run).attempts] == [None]


def test_the_newest_step_is_a_published_one(run: RunDirectory) -> None:
    assert newest_step(run) == 0
    attempt(run, recipe_of(), save=2)
    attempt(run, recipe_of(), save=11)
    (run.path / "checkpoint-12").mkdir()
    assert newest_step(run) == 11
