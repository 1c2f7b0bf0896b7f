"""`python -m launch.slurm.job begin|end`: what a job decides on its first node, before and after its processes run.

Called by slurm/train.sbatch. Standard output belongs to that script; what a reader should know goes to standard error,
the job's log.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from launch.atomic_files import atomic_write
from launch.errors import CheckpointError, ConfigError, InUseError, NoSpaceError, RunError, SamestepError
from launch.hardware import compute_capability
from launch.recipe.loading import load_recipe
from launch.resources import resource
from launch.rules.checks import refuse_unfit_machine
from launch.run.directory import (
    RunDirectory,
    clear_markers,
    clear_requests,
    read_marker,
    requested_stop,
    write_marker,
)
from launch.run.lock import hold_lock, lock_holder, refuse_if_running
from launch.run.request_files import copy_checkpoint, write_request
from launch.slurm import attempts as ledger
from launch.slurm.attempts import MAX_CRASHES, End
from launch.slurm.failed_nodes import dead_nodes
from launch.slurm.job_end import end, write_end
from launch.slurm.job_log import log_file, say
from launch.slurm.job_plan import Allocation, JobPlan, plan_job, run_of
from launch.slurm.output import (
    JobFacts,
    Nodes,
    QueuedJob,
    expand_nodes,
    parse_job,
    parse_nodes,
    parse_queue,
)
from launch.slurm.turns import (
    TAKEN,
    StaleQueueError,
    refuse_after_a_stop,
    refuse_another_job,
    waiting_others,
)
from launch.untrusted_files import UNREADABLE, printable_lines

PATIENCE_S = 180  # for another job that decides, and for what runs on a node that Slurm lost sight of


def begin(options: argparse.Namespace) -> int:
    """Print what to start: run directory, accelerate's configuration, processes a node; nothing when all is done.

    Prints `requeue` instead when something is in the way that may be gone later; the attempt counts. `standby`, where
    another job has the run and this one is to wait. A fourth line: the jobs of the same submission that wait.
    `ask JOB.RESTART JOBS`, before anything was done: the script is to ask squeue for these jobs, and to begin again
    with that attempt as `--seen`.

    Raises:
        SamestepError: the request is refused, or the run gets nowhere. The ledger says why.
    """
    allocation = Allocation.of(os.environ, options.attempt, options.max_crashes)
    queue = parse_queue(options.queue)
    run = run_of(options)
    try:
        return _begin(options, allocation, queue, run)
    except StaleQueueError as stale:
        print("ask", stale.attempt, ",".join(stale.jobs))
        return 0
    except TAKEN as error:
        if options.stand_by:
            return stand_by(run, allocation, queue, options, error)
        if isinstance(error, InUseError):
            return try_later(run, allocation, queue, error)
        _write_unstarted(run, allocation, End("refused", str(error)))
        raise
    except (InUseError, NoSpaceError, OSError) as error:
        return try_later(run, allocation, queue, error)
    except SamestepError as error:
        _write_unstarted(run, allocation, End("refused", str(error)))
        if isinstance(error, ConfigError | CheckpointError) and not lock_holder(run.path):
            with suppress(OSError):
                write_marker(run, "REFUSED", str(error))
        raise


def _begin(
    options: argparse.Namespace, allocation: Allocation, queue: Sequence[QueuedJob], run: RunDirectory
) -> int:
    now = time.time()
    refuse_parts(allocation, parse_job(options.job, allocation.job))
    refuse_another_job(run, allocation, queue, options.seen, now)
    wait_for_the_lock(run)  # before anything is read or written: somebody may be training
    job = plan_job(options, allocation)
    if job.done:
        say(f"{run.path}: done already, adapter in {run.adapter}")
        return 0
    refuse_this_node(run, job)
    run.path.mkdir(parents=True, exist_ok=True)
    # Of two jobs that begin at once, the second one waits until the first one has written what it decided.
    with hold_lock(run.path, patience_s=PATIENCE_S):
        refuse_another_job(run, allocation, queue, options.seen, now)
        close_open_attempts(run, allocation, parse_nodes(options.nodes))
        refuse_after_a_stop(run, allocation)
        before = ledger.read_ledger(run).attempts_of(allocation.job, allocation.restart)
        if reason := ledger.reason_to_give_up(before, allocation.max_crashes):
            raise RunError(f"{run.path}: job {allocation.job}: {reason}")
        if requested_stop(run) == "user" or not _take(run, allocation, job):
            _answer_stop(run, allocation, job)
            return 1
    restarts = ledger.counted(ledger.read_ledger(run).restarts())
    which = f"attempt {allocation.restart + 1} of job {allocation.job} on {allocation.node_list}"
    say(f"{run.path}: {which} ({restarts})")
    config = resource("accelerate_configs", job.plan.parallelism.config_file)
    print(run.path, config, job.plan.gpus_per_node, sep="\n")
    if others := waiting_others(run, allocation, queue):
        say(f"jobs of the same submission stand by: {', '.join(others)}")
        print(*others)
    return 0


def refuse_parts(allocation: Allocation, job: JobFacts | None) -> None:
    """ConfigError for a heterogeneous job, of which this script would use the first part alone."""
    if job is not None and job.heterogeneous:
        raise ConfigError(
            f"job {allocation.job}: is heterogeneous, and a run needs nodes of one kind; submit without `:` and "
            "without `#SBATCH hetjob`"
        )


def refuse_this_node(run: RunDirectory, job: JobPlan) -> None:
    """ConfigError for packages and GPUs that do not fit the plan: where it was made, there may be others."""
    capability = compute_capability() if job.plan.device == "cuda" else None
    recipe = job.planned.recipe if job.planned else load_recipe(run.recipe_file)
    refuse_unfit_machine(recipe, job.plan.strategy, capability)


def _take(run: RunDirectory, allocation: Allocation, job: JobPlan) -> bool:
    """From here on the run is this attempt's: its trainer takes the lock a minute later, and no job comes between.

    False: somebody has asked for a stop meanwhile; a large checkpoint is not copied at once.
    """
    if job.planned is not None:
        write_request(run, job.planned.recipe, job.planned.plan)
        if job.planned.continuation.source is not None:
            copy_checkpoint(job.planned.continuation.source, run)
    # From now on no other attempt asks for a stop.
    atomic_write(ledger.attempt_file(run), f"{allocation.job}.{allocation.restart}\n")
    clear_markers(run)
    if clear_requests(run) == "user":
        return False
    ledger.write_event(run, "start", **_begun(run, allocation))
    return True


def _answer_stop(run: RunDirectory, allocation: Allocation, job: JobPlan) -> None:
    text = f"user: at step {ledger.newest_step(run)} of {job.plan.max_steps}"
    write_marker(run, "STOPPED", text)
    clear_requests(run)
    _write_unstarted(run, allocation, End("stopped", text))
    say(f"{run.path}: not started, a STOP file asks so; `sbatch` the same script again to go on")


def stand_by(
    run: RunDirectory,
    allocation: Allocation,
    queue: Sequence[QueuedJob],
    options: argparse.Namespace,
    error: Exception,
) -> int:
    """Print `standby` for a job that found the run taken by another: it waits in the queue, and has done nothing.

    RunError: it may not be queued again.
    """
    _write_unstarted(run, allocation, End("standby", str(error)))
    if any(job.job == allocation.job and not job.requeueable for job in queue):
        raise RunError(f"{error} (and job {allocation.job} may not be queued again: --no-requeue)")
    when = f"when that one ends, and in {options.stand_by} s at the latest"
    say(f"{error}; job {allocation.job} stands by: it looks again {when}")
    print("standby")
    return 0


def try_later(run: RunDirectory, allocation: Allocation, queue: Sequence[QueuedJob], error: Exception) -> int:
    """Print `requeue` for an attempt that could not begin, which counts as one that crashed.

    Raises:
        RunError: that happened too often, or the job may not be queued again.
    """
    reason = str(error)
    if isinstance(error, OSError):
        reason = f"{error.filename or run.path}: {error.strerror or error}"
    _write_unstarted(run, allocation, End("crashed", reason))
    attempts = ledger.read_ledger(run).attempts_of(allocation.job, allocation.restart + 1)
    if reason_to_give_up := ledger.reason_to_give_up(attempts, allocation.max_crashes):
        raise RunError(f"{reason}; job {allocation.job} is not queued again: {reason_to_give_up}")
    if any(job.job == allocation.job and not job.requeueable for job in queue):
        raise RunError(f"{reason}; job {allocation.job} may not be queued again (--no-requeue)")
    say(f"{reason}; job {allocation.job} is queued again")
    print("requeue")
    return 0


def close_open_attempts(run: RunDirectory, allocation: Allocation, nodes: Sequence[Nodes]) -> None:
    """Write down how attempts ended that could not do it themselves: their node died, or KILL came first.

    Of the same job that is a dead node: for nothing else that ends its script without a word does Slurm queue it again.
    """
    for attempt in ledger.read_ledger(run).attempts:
        if attempt.how is None:
            ended = ledger.how_it_ended(run)
            if not _has_marker(run):
                dead = dead_nodes(nodes, expand_nodes(attempt.nodes))
                how: ledger.How = "node_fail" if dead or attempt.job == allocation.job else "crashed"
                ended = End(how, "left no word: its node died, or KILL came", ",".join(dead))
            write_end(run, ended, attempt.job, attempt.restart)


def _has_marker(run: RunDirectory) -> bool:
    try:
        return read_marker(run) is not None
    except UNREADABLE:
        return True


def wait_for_the_lock(run: RunDirectory) -> None:
    """Processes of an earlier attempt of this run may still be dying, or hang on a node that lost its network.

    Raises:
        InUseError: they do not end.
    """
    deadline = time.monotonic() + PATIENCE_S
    while (holder := lock_holder(run.path)) and time.monotonic() < deadline:
        say(f"{run.path}: waiting for {holder}, which still holds it")
        time.sleep(5)
    refuse_if_running(run)


def _begun(run: RunDirectory, allocation: Allocation) -> dict[str, object]:
    """The facts of an attempt that begins now."""
    return {
        "job": allocation.job,
        "restart": allocation.restart,
        "began": time.time(),
        "first_step": ledger.newest_step(run),
        "log": log_file(),
        "nodes": allocation.node_list,
        "max_crashes": allocation.max_crashes,
    }


def _write_unstarted(run: RunDirectory, allocation: Allocation, ended: End) -> None:
    """One line for an attempt that never began; none where there is no run yet, or no room."""
    begun = _begun(run, allocation)
    facts = {**begun, **asdict(ended), "last_step": begun["first_step"], "ended": begun["began"]}
    with suppress(OSError):
        ledger.write_event(run, "unstarted", **facts)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, as the batch script gives it."""
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.job", description=__doc__)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("begin", help="before the processes run")
    first.add_argument("target", help="a recipe, or the folder of a run")
    first.add_argument("--device", choices=["", "cuda", "cpu"], default="", help="default: what is here")
    first.add_argument("--strategy", help="default: auto")
    first.add_argument("--processes", type=int, help="of a node (default: its GPUs, 2 on a CPU)")
    first.add_argument("--name", help="of the run (default: the recipe's)")
    first.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs lie (default: runs)")
    first.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    first.add_argument("--allow", action="append", default=[], metavar="KEY")
    first.add_argument(
        "--queue", default="", help="this user's jobs: squeue --Format=JobArrayID,State,Requeue"
    )
    first.add_argument(
        "--seen", metavar="JOB.RESTART", help="the attempt that was open when squeue was asked; empty: none"
    )
    first.add_argument(
        "--stand-by",
        default="",
        metavar="SECONDS",
        help="after which it looks again, where another job has the run",
    )
    first.set_defaults(act=begin)
    last = commands.add_parser("end", help="after the processes ended")
    last.add_argument("run", help="the folder of the run")
    last.add_argument("--asked", default="", help="what the script was asked to stop for: preempted or time")
    last.add_argument("--unfit", default="", help="NODES REASON of what the doctor found, * for all nodes")
    last.set_defaults(act=end)
    for command in (first, last):
        command.add_argument(
            "--attempt", required=True, metavar="JOB.RESTART", help="JOB: of an array JOB_TASK"
        )
        command.add_argument("--job", default="", help="what `scontrol show job -o` prints of this job")
        command.add_argument(
            "--nodes", default="", help="the partition's: sinfo --format='%%c,%%m,%%G,%%f|%%T|%%N'"
        )
        command.add_argument("--max-crashes", type=int, default=MAX_CRASHES, help="in a row, without a step")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(arguments)
    try:
        return int(options.act(options))
    except SamestepError as error:
        print(printable_lines(f"error: {error}"), file=sys.stderr, flush=True)
        return error.exit_status
    except OSError as error:
        words = f"error: {error.filename or 'a file'}: {error.strerror or error}"
        print(printable_lines(words), file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
