"""`python -m launch.allocation begin|end`: what a job decides on its first node, before and after its processes run.

Called by slurm/train.sbatch. Standard output belongs to that script; what a reader should know goes to standard error,
the job's log.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch import ledger, start
from launch.errors import ConfigError, RunError, SamestepError
from launch.hardware import CPU_PROCESSES, compute_capability, gpu_memory, gpus_present
from launch.plan import Plan
from launch.recipe import find_recipe, load_recipe
from launch.resources import resource
from launch.rules import refuse_unfit_machine
from launch.run_directory import (
    RunDirectory,
    clear_markers,
    clear_requests,
    hold_lock,
    lock_holder,
    open_run,
    read_marker,
    refuse_if_running,
    requested_stop,
    write_marker,
)
from launch.runs import adopt, write_request
from launch.slurm import parse_job

PATIENCE_S = 180  # for what an earlier attempt left running on a node that Slurm lost sight of


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave this job."""

    job: str
    restart: int
    nodes: int
    gpus_on_node: int
    node_list: str

    @staticmethod
    def of(environment: Mapping[str, str]) -> Allocation:
        """From the variables of the batch script. ConfigError outside a job."""
        if "SLURM_JOB_ID" not in environment:
            raise ConfigError("SLURM_JOB_ID: is not set, so this is no Slurm job; start it with sbatch")
        gpus = environment.get("SLURM_GPUS_ON_NODE", "0")
        return Allocation(
            environment["SLURM_JOB_ID"],
            int(environment.get("SLURM_RESTART_COUNT", "0")),
            int(environment.get("SLURM_JOB_NUM_NODES", "1")),
            int(gpus) if gpus.isdigit() else 0,
            environment.get("SLURM_JOB_NODELIST", ""),
        )


# before ---------------------------------------------------------------------------------------


def begin(options: argparse.Namespace) -> int:
    """Print what to start: run directory, accelerate's configuration, processes a node; nothing when all is done.

    Raises:
        SamestepError: the request is refused, or the run gets nowhere.
    """
    allocation = Allocation.of(os.environ)
    run, plan = find_or_plan(options, allocation)
    if plan is None:
        _say(f"{run.path}: done already, adapter in {run.adapter}")
        return 0
    refuse_this_node(run, plan)
    wait_for_the_lock(run)  # before anything is written: another job of this run may be training
    close_open_attempt(run)
    reason = ledger.reason_to_give_up(ledger.read_ledger(run).attempts)
    if reason and allocation.restart:
        raise RunError(f"{run.path}: {reason}")
    if requested_stop(run) == "user":
        write_marker(run, "STOPPED", f"user: at step {ledger.newest_step(run)} of {plan.max_steps}")
        clear_requests(run)
        _say(f"{run.path}: not started, a STOP file asks so; `sbatch` the same script again to go on")
        return 1
    with hold_lock(run.path):
        clear_markers(run)
        clear_requests(run)
    ledger.write_event(
        run,
        "start",
        job=allocation.job,
        restart=allocation.restart,
        began=time.time(),
        first_step=ledger.newest_step(run),
        log=_log_file(),
        nodes=allocation.node_list,
    )
    restarts = ledger.counted(ledger.read_ledger(run).restarts())
    _say(
        f"{run.path}: attempt {allocation.restart + 1} of job {allocation.job} on {allocation.node_list} ({restarts})"
    )
    print(run.path, resource("accelerate_configs", f"{plan.strategy}.yaml"), plan.gpus_per_node, sep="\n")
    return 0


def find_or_plan(options: argparse.Namespace, allocation: Allocation) -> tuple[RunDirectory, Plan | None]:
    """The run and its plan for this allocation; no plan when the run is done.

    A run that `samestep submit` wrote has its plan, which holds unless the job got another number of nodes
    (`sbatch --nodes=N runs/NAME/submit.sbatch`); a recipe is planned here.
    """
    target = RunDirectory(Path(options.target).absolute())
    if target.plan_file.is_file() and target.recipe_file.is_file():
        plan = Plan.from_json(target.plan_file.read_text(encoding="utf-8"))
        if plan.nodes == allocation.nodes:
            refuse_other_gpus(target, plan, allocation)
            return target, None if _is_done(target, plan) else plan
        request = _request_of_run(target, plan, allocation)
    else:
        request = _request_of_recipe(options, allocation)
    wait_for_the_lock(_run_of(request))
    planned = start.plan_run(request)
    if start.is_done(planned):
        return planned.run, None
    run = planned.run
    run.path.mkdir(parents=True, exist_ok=True)
    with hold_lock(run.path):
        write_request(run, planned.recipe, planned.plan)
        if planned.continuation.source is not None:
            adopt(planned.continuation.source, run)
    return run, planned.plan


def refuse_other_gpus(run: RunDirectory, plan: Plan, allocation: Allocation) -> None:
    """ConfigError when each node has another number of GPUs than the plan starts processes."""
    found = allocation.gpus_on_node
    if plan.device == "cuda" and found and found != plan.gpus_per_node:
        raise ConfigError(
            f"--gpus-per-node: the plan of {run.path} has {plan.gpus_per_node} processes a node, the allocation "
            f"{found} GPUs; submit with the same number, or `samestep submit` again to plan anew"
        )


def refuse_this_node(run: RunDirectory, plan: Plan) -> None:
    """ConfigError for packages and GPUs that do not fit the plan: where it was made, there may be others."""
    capability = compute_capability() if plan.device == "cuda" else None
    refuse_unfit_machine(load_recipe(run.recipe_file), plan.strategy, capability)


def _request_of_run(run: RunDirectory, plan: Plan, allocation: Allocation) -> start.RunRequest:
    strategy = plan.strategy
    if strategy == "single" and allocation.nodes > 1:
        strategy = start.choose_topology(None, allocation.nodes, plan.gpus_per_node).strategy
    topology = start.Topology(
        strategy, allocation.nodes, plan.gpus_per_node, plan.device, plan.gpu_memory or None
    )
    place = run.path.parent
    return start.RunRequest(
        str(run.recipe_file), (), None, None, run.name, place, False, tuple(plan.allowed), topology=topology
    )


def _request_of_recipe(options: argparse.Namespace, allocation: Allocation) -> start.RunRequest:
    device = options.device or ("cuda" if gpus_present() else "cpu")
    present = allocation.gpus_on_node or gpus_present()
    processes = options.processes or (present if device == "cuda" else CPU_PROCESSES)
    chosen = start.choose_topology(options.strategy, allocation.nodes, processes)
    topology = start.Topology(
        chosen.strategy, allocation.nodes, processes, device, gpu_memory() if device == "cuda" else None
    )
    return start.RunRequest(
        options.target,
        tuple(options.set),
        None,
        None,
        options.name,
        options.runs_dir,
        False,
        tuple(options.allow),
        topology=topology,
    )


def _run_of(request: start.RunRequest) -> RunDirectory:
    name = request.name or load_recipe(find_recipe(request.recipe), request.overrides).name
    return open_run(request.runs_dir, name)


def _is_done(run: RunDirectory, plan: Plan) -> bool:
    marker = read_marker(run)
    done = marker is not None and marker.kind == "DONE" and marker.text == f"step {plan.max_steps}"
    return done and (run.adapter / "adapter_config.json").is_file()


def close_open_attempt(run: RunDirectory) -> None:
    """Write down how an attempt ended that could not do it itself: its node died, or KILL came first."""
    if ledger.read_ledger(run).open is None:
        return
    end = ledger.how_it_ended(run)
    reason = (
        end.reason
        if read_marker(run) or end.how != "crashed"
        else "left no word: its node died, or KILL came"
    )
    attempt = ledger.read_ledger(run).open
    assert attempt is not None
    _write_end(run, ledger.End(end.how, reason), attempt.job, attempt.restart)


def wait_for_the_lock(run: RunDirectory) -> None:
    """Processes of an earlier attempt of this run may still be dying, or hang on a node that lost its network.

    Raises:
        ConfigError: they do not end.
    """
    deadline = time.monotonic() + PATIENCE_S
    while (holder := lock_holder(run.path)) and time.monotonic() < deadline:
        _say(f"{run.path}: waiting for {holder}, which still holds it")
        time.sleep(5)
    refuse_if_running(run)


# after ------------------------------------------------------------------------------------------


def end(options: argparse.Namespace) -> int:
    """Write down how the attempt ended; print `requeue` when the script is to queue the job again.

    Returns the job's exit status: 0 for a run that is done, or is in the queue again.
    """
    allocation = Allocation.of(os.environ)
    run = RunDirectory(Path(options.run))
    job = parse_job(options.job)
    ended, queued = ledger.with_job(ledger.how_it_ended(run), job, allocation.restart)
    _write_end(run, ended, allocation.job, allocation.restart)
    step = ledger.newest_step(run)
    _say(f"{run.path}: {ended.how} at step {step} ({ended.reason})")
    if ended.how not in ledger.RESTARTED:
        return {"done": 0, "refused": 2}.get(ended.how, 1)
    if reason := ledger.reason_to_give_up(ledger.read_ledger(run).attempts):
        raise RunError(f"{run.path}: not queued again: {reason}")
    if queued:
        _say("Slurm has queued the job again")
        return 0
    if job is not None and not job.requeueable:
        raise RunError(
            f"{run.path}: job {allocation.job} may not be queued again (--no-requeue); submit its script anew, "
            "it goes on from the newest checkpoint"
        )
    print("requeue")
    return 0


def _write_end(run: RunDirectory, ended: ledger.End, job: str, restart: int) -> None:
    """A disk that is full must not keep the job from being queued again: the next attempt closes this one."""
    which = {"job": job, "restart": restart}
    facts = {**asdict(ended), **which, "last_step": ledger.newest_step(run), "ended": time.time()}
    try:
        ledger.write_event(run, "end", **facts)
    except OSError as error:
        _say(f"{ledger.ledger_file(run)}: cannot be written ({error.strerror}); make room")


def _log_file() -> str:
    """Where this job's words go, when that is a file: as Slurm opened it for the script."""
    try:
        path = Path("/proc/self/fd/2").resolve()
        return str(path) if path.is_file() else ""
    except OSError:
        return ""


def _say(text: str) -> None:
    print(f"{time.strftime('%F %T')} {text}", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, as the batch script gives it."""
    parser = argparse.ArgumentParser(prog="python -m launch.allocation", description=__doc__)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("begin", help="before the processes run")
    first.add_argument("target", help="a recipe, or the folder of a run")
    first.add_argument("--device", choices=["", "cuda", "cpu"], default="", help="default: what is here")
    first.add_argument("--strategy", help="default: single for one process, else ddp")
    first.add_argument("--processes", type=int, help="of a node (default: its GPUs, 2 on a CPU)")
    first.add_argument("--name", help="of the run (default: the recipe's)")
    first.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs lie (default: runs)")
    first.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    first.add_argument("--allow", action="append", default=[], metavar="KEY")
    first.set_defaults(act=begin)
    last = commands.add_parser("end", help="after the processes ended")
    last.add_argument("run", help="the folder of the run")
    last.add_argument("--job", default="", help="what `scontrol show job -o` prints of this job")
    last.set_defaults(act=end)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(arguments)
    try:
        return int(options.act(options))
    except SamestepError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
