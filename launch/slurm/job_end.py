"""What a job decides on its first node after its processes have ended: how the attempt ended, and whether to go on."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from launch.errors import RunError, SamestepError
from launch.run.directory import RunDirectory, write_marker
from launch.slurm import attempts as ledger
from launch.slurm.attempts import End
from launch.slurm.failed_nodes import dead_nodes, nodes_to_exclude
from launch.slurm.job_log import say
from launch.slurm.job_plan import Allocation
from launch.slurm.output import JobFacts, Nodes, expand_nodes, parse_job, parse_nodes

QUEUED_AGAIN = -1


def end(options: argparse.Namespace) -> int:
    """Write down how the attempt ended; print what the script is to do.

    `requeue`, and `exclude=NODES` once it is; `wake=JOBS` or `cancel=JOBS`: those of the same submission that wait.
    Returns the job's exit status: 0 for a run that is done, or is in the queue again.
    """
    allocation = Allocation.of(os.environ, options.attempt, options.max_crashes)
    run = RunDirectory(Path(options.run))
    if (now := ledger.attempt_of_now(run)) not in (None, options.attempt):
        raise RunError(
            f"{run.path}: attempt {options.attempt} was given up (its node was out of reach), and attempt {now} has "
            "the run; nothing is decided here"
        )
    others = ",".join(ledger.read_ledger(run).others_of(allocation.job))
    try:
        status, orders = _end(options, allocation, run)
    except SamestepError:
        if others:
            print(f"cancel={others}")
        raise
    if others:
        # (2: the request was refused. By the doctor, that was for these nodes.)
        free = status == QUEUED_AGAIN or (status == 2 and options.unfit)
        orders.append(f"{'wake' if free else 'cancel'}={others}")
    if orders:
        print(*orders)
    return 0 if status == QUEUED_AGAIN else status


def _end(options: argparse.Namespace, allocation: Allocation, run: RunDirectory) -> tuple[int, list[str]]:
    """(exit status, what the script is to do for this job). RunError: it is not queued again."""
    job, nodes = parse_job(options.job, allocation.job), parse_nodes(options.nodes)
    used = expand_nodes(allocation.node_list)
    dead = dead_nodes(nodes, used)
    if options.unfit:
        end = end_of_unfit(run, allocation, options.unfit, job, nodes, dead)
    else:
        end = replace(ledger.how_it_ended(run, options.asked, dead), failed_nodes=",".join(dead))
    ended, queued = ledger.with_job(end, job, allocation.restart)
    write_end(run, ended, allocation.job, allocation.restart)
    step = ledger.newest_step(run)
    say(f"{run.path}: {ended.how} at step {step} ({ended.reason})")
    if ended.how not in ledger.RESTARTED:
        return {"done": 0, "refused": 2}.get(ended.how, 1), []
    attempts = ledger.read_ledger(run).attempts_of(allocation.job, allocation.restart + 1)
    if reason := ledger.reason_to_give_up(attempts, allocation.max_crashes):
        raise RunError(f"{run.path}: job {allocation.job} is not queued again: {reason}")
    exclude = []
    if job is not None and (left_out := nodes_to_exclude(attempts, job, nodes, used)) != sorted(job.excluded):
        exclude = [f"exclude={','.join(left_out)}"]
        say(f"nodes left out from now on: {', '.join(left_out) or 'none'}")
    if queued:
        say("Slurm has queued the job again")
        return QUEUED_AGAIN, exclude
    if job is not None and not job.requeueable:
        raise RunError(
            f"{run.path}: job {allocation.job} may not be queued again (--no-requeue); submit its script anew, "
            "it goes on from the newest checkpoint"
        )
    return QUEUED_AGAIN, ["requeue", *exclude]


def end_of_unfit(
    run: RunDirectory,
    allocation: Allocation,
    unfit: str,
    job: JobFacts | None,
    nodes: Sequence[Nodes],
    dead: Sequence[str],
) -> End:
    """How an attempt ends that the doctor has kept from training.

    `unfit`: `NODES REASON`, with `*` for what no other nodes would mend. Nodes that the next attempt can do without
    failed as dead ones do; else the run is refused, and its marker says so.
    """
    names, _, reason = unfit.partition(" ")
    failed = sorted({*dead, *(name for name in names.split(",") if name and name != "*")})
    end = End("node_fail", f"{ledger.DOCTOR}{reason}", ",".join(failed))
    if names != "*" and job is not None:
        before = ledger.read_ledger(run).attempts_of(allocation.job, allocation.restart + 1)
        now = replace(before[-1], how=end.how, failed_nodes=end.failed_nodes, ended=time.time())
        used = expand_nodes(allocation.node_list)
        if {*failed} <= {*nodes_to_exclude([*before[:-1], now], job, nodes, used)}:
            return end
        reason += "; there are not enough other nodes of this kind"
    text = f"{ledger.DOCTOR}{reason}; `samestep doctor --nodes` shows more, submit again once it is mended"
    with suppress(OSError):
        write_marker(run, "REFUSED", text)
    return End("refused", text)


def write_end(run: RunDirectory, ended: End, job: str, restart: int) -> None:
    """Write down how an attempt ended.

    A disk that is full must not keep the job from being queued again: the next attempt closes this one.
    """
    which = {"job": job, "restart": restart}
    facts = {**asdict(ended), **which, "last_step": ledger.newest_step(run), "ended": time.time()}
    try:
        ledger.write_event(run, "end", **facts)
    except OSError as error:
        say(f"{ledger.ledger_file(run)}: cannot be written ({error.strerror}); make room")
