"""Whatever happens to it, a run on a cluster ends by itself with the bytes of the uninterrupted one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.slurm import attempts as ledger
from launch.slurm.output import expand_nodes
from tests.helpers.distributed.recorded import assert_the_same_to_the_byte, sha256_of
from tests.long.results import write_table
from tests.slurm.cluster import Cluster, start, train_here
from tests.slurm.events import ANNOUNCED, COUNTED, SUDDEN, Outcome, mounted, order, survive, unmounted

pytestmark = pytest.mark.slurm

RESULTS = Path(__file__).with_name("RESULTS.md")
SEED, SAVE_EVERY = 5, 4  # the second as in `cluster.EMBEDDED`


@pytest.fixture(scope="module")
def networked(embedded: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes with cables of their own, and runs on a small disk."""
    folder: Path = tmp_path_factory.mktemp("networked")
    mounted(folder / "runs", 200)
    try:
        found = start(folder / "slurm", folder / "runs", 4, "netns")
        yield found
        found.control("stop")
    finally:
        unmounted(folder / "runs")


def _check(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        # A save goes on beside the next steps, and the one under way is lost with them.
        assert outcome.lost == 0 if outcome.announced else 0 <= outcome.lost < 2 * SAVE_EVERY, outcome
        assert outcome.how is None or outcome.how in COUNTED[outcome.event], outcome


def test_a_run_survives_a_requeue_a_dead_rank_and_a_crashed_head(cluster: Cluster) -> None:
    here = train_here("here-short", cluster.runs, 2, 60)
    run = cluster.submit("short", "--nodes", "2", steps=60)
    events = ["kill -9 of one rank", "scontrol requeue", "crash of the head node"]
    _check(survive(cluster, run, events, SEED))
    assert cluster.until_gone(run) == "COMPLETED", cluster.words_of(run)
    assert_the_same_to_the_byte(run.path, here.path)
    ways = [attempt.how for attempt in ledger.read_ledger(run).attempts]
    assert ways == ["crashed", "preempted", "node_fail", "done"], cluster.words_of(run)


@pytest.mark.long
def test_a_job_that_is_preempted_by_cancelling_with_a_grace_time_goes_on(networked: Cluster) -> None:
    """Slurm then sends TERM to the tasks alone, and says nothing to the job's script."""
    run = networked.submit("scavenger", "--nodes", "2", "--partition", "scavenge", steps=60)
    (outcome,) = survive(networked, run, ["preemption by the partition `high`"], SEED)
    assert (outcome.lost, outcome.how) == (0, "preempted")
    assert networked.until_gone(run) == "COMPLETED", networked.words_of(run)


@pytest.mark.long
def test_a_storm_is_survived_while_the_run_gets_forward(networked: Cluster) -> None:
    """Six failures in a row, each after a save: four dead nodes, a pulled cable, a killed rank."""
    here = train_here("here-storm", networked.runs, 2, 120)
    run = networked.submit("storm", "--nodes", "2", steps=120)
    dead = "crash of another node"
    events = [dead, "crash of the head node", "kill -9 of one rank", "pulled cable", dead, dead]
    _check(survive(networked, run, events, SEED, steps=(2 * SAVE_EVERY, 2 * SAVE_EVERY + 3)))
    assert networked.until_gone(run) == "COMPLETED", networked.words_of(run)
    assert_the_same_to_the_byte(run.path, here.path)
    attempts = ledger.read_ledger(run).attempts
    assert sum(attempt.how in ("crashed", "node_fail") for attempt in attempts) >= len(events), (
        networked.words_of(run)
    )
    # A node that is known to have failed is left out of the next attempt: the two that it needs are there.
    names = [set(expand_nodes(attempt.nodes)) for attempt in attempts]
    for attempt, following in zip(attempts, names[1:], strict=False):
        assert not {*filter(None, attempt.failed_nodes.split(","))} & following, networked.words_of(run)
    assert any(attempt.failed_nodes for attempt in attempts), networked.words_of(run)


@pytest.mark.long
def test_twelve_events_change_nothing(networked: Cluster) -> None:
    steps = 240
    here = train_here("here-long", networked.runs, 2, steps)
    run = networked.submit("long", "--nodes", "2", steps=steps)
    outcomes = survive(networked, run, order([*ANNOUNCED], [*SUDDEN], SEED), SEED)
    assert networked.until_gone(run) == "COMPLETED", networked.words_of(run)
    assert_the_same_to_the_byte(run.path, here.path)
    assert sorted(outcome.event for outcome in outcomes) == sorted([*ANNOUNCED, *SUDDEN])
    _check(outcomes)
    counted = ledger.counted(ledger.read_ledger(run).restarts())
    rows = [
        (
            str(number),
            outcome.event,
            str(outcome.step),
            str(outcome.went_on_at),
            str(outcome.lost),
            outcome.how or "-",
        )
        for number, outcome in enumerate(outcomes, 1)
    ]
    write_table(
        RESULTS,
        f"""# What `make test-slurm-long` showed

A real Slurm 22.05 of four nodes, each in a network namespace of its own, on one machine; the embedded recipe, ddp over
gloo on 2 nodes, {steps} steps, a checkpoint every {SAVE_EVERY}. Seed {SEED}. "Lost": steps taken again.
The run ended DONE by itself (ledger: {counted}); adapter sha256 {sha256_of(run.path)[:16]}...
and every figure of every step and evaluation are those of the uninterrupted run on this machine, to the byte.
""",
        ("", "event", "after step", "went on at", "steps lost", "counted as"),
        rows,
    )
