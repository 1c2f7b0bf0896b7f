"""The plan of a job for the nodes that it got: as it was submitted, or made here. Writes nothing but caches."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.errors import ConfigError
from launch.hardware import CPU_PROCESSES, gpu_memory, gpus_present
from launch.local import planned_run
from launch.local.topology import choose_topology
from launch.planning.plan import Plan
from launch.planning.topology import Topology
from launch.recipe.loading import find_recipe, load_recipe
from launch.run.directory import RunDirectory, is_done_at, open_run
from launch.run.evaluations import early_end
from launch.slurm.attempts import MAX_CRASHES
from launch.strategies import AUTO, default_strategy


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave this job. `job`: its id, JOB_TASK of an array's task; `max_crashes`: as of `samestep submit`."""

    job: str
    restart: int
    nodes: int
    gpus_on_node: int
    node_list: str
    max_crashes: int = MAX_CRASHES

    @staticmethod
    def of(environment: Mapping[str, str], attempt: str, max_crashes: int = MAX_CRASHES) -> Allocation:
        """Of `attempt`, JOB.RESTART, and the variables of the batch script. ConfigError outside a job."""
        if "SLURM_JOB_ID" not in environment:
            raise ConfigError("SLURM_JOB_ID: is not set, so this is no Slurm job; start it with sbatch")
        job, _, restart = attempt.rpartition(".")
        if not job or not restart.isdigit():
            raise ConfigError(f"--attempt: {attempt!r} is not JOB.RESTART; see slurm/train.sbatch")
        gpus = environment.get("SLURM_GPUS_ON_NODE", "0")
        return Allocation(
            job,
            int(restart),
            int(environment.get("SLURM_JOB_NUM_NODES", "1")),
            int(gpus) if gpus.isdigit() else 0,
            environment.get("SLURM_JOB_NODELIST", ""),
            max_crashes,
        )

    def is_sibling(self, job: str) -> bool:
        """Another task of this job's array."""
        array, _, task = self.job.partition("_")
        return task != "" and job != self.job and job.partition("_")[0] == array


@dataclass(frozen=True)
class JobPlan:
    """What the job is to do. `planned`: a request that was planned here, and is not in the run directory yet."""

    plan: Plan
    done: bool
    planned: planned_run.PlannedRun | None = None


def run_of(options: argparse.Namespace) -> RunDirectory:
    """The run that a recipe or a folder means. ConfigError for a recipe that cannot be read."""
    target = RunDirectory(Path(options.target).absolute())
    if _is_run(target):
        return target
    name = options.name
    if name is None:
        name = load_recipe(find_recipe(options.target), options.set).name
    return open_run(options.runs_dir, name)


def _is_run(target: RunDirectory) -> bool:
    return target.plan_file.is_file() and target.recipe_file.is_file()


def plan_job(options: argparse.Namespace, allocation: Allocation) -> JobPlan:
    """The plan of the job's run for this allocation.

    A run that `samestep submit` wrote has its plan, which holds unless the job got another number of nodes
    (`sbatch --nodes=N runs/NAME/submit.sbatch`), or `--strategy auto` had to do without the memory of its GPUs; a
    recipe is planned here.

    Raises:
        SamestepError: the request is refused.
    """
    target = RunDirectory(Path(options.target).absolute())
    if _is_run(target):
        plan = Plan.read(target.plan_file)
        if plan.nodes == allocation.nodes:
            refuse_other_gpus(target, plan, allocation)
        if plan.nodes == allocation.nodes and not _is_undecided(plan):
            end = early_end(target, load_recipe(target.recipe_file))
            return JobPlan(plan, is_done_at(target, plan.max_steps, end))
        request = _request_of_run(target, plan, allocation)
    else:
        request = _request_of_recipe(options, allocation)
    planned = planned_run.plan_run(request)
    return JobPlan(planned.plan, planned_run.is_done(planned), planned)


def _is_undecided(plan: Plan) -> bool:
    """`auto` chose the strategy before the memory of the GPUs was known, which is known here."""
    unknown = plan.strategy_reason and plan.world_size > 1 and plan.device == "cuda" and not plan.gpu_memory
    return bool(unknown) and gpu_memory() is not None


def refuse_other_gpus(run: RunDirectory, plan: Plan, allocation: Allocation) -> None:
    """ConfigError when each node has another number of GPUs than the plan starts processes."""
    gpus = allocation.gpus_on_node
    if plan.device == "cuda" and gpus and gpus != plan.gpus_per_node:
        raise ConfigError(
            f"--gpus-per-node: the plan of {run.path} has {plan.gpus_per_node} processes a node, the allocation "
            f"{gpus} GPUs; submit with the same number, or `samestep submit` again to plan anew"
        )


def _request_of_run(run: RunDirectory, plan: Plan, allocation: Allocation) -> planned_run.RunRequest:
    # A named strategy stays, unless one of both is a single process: that has a strategy of its own.
    before = default_strategy(plan.world_size).name
    now = default_strategy(allocation.nodes * plan.gpus_per_node).name
    usual = bool(plan.strategy_reason) or plan.strategy == before != now
    memory = plan.gpu_memory or (gpu_memory() if plan.device == "cuda" else None)
    strategy = AUTO if usual else plan.strategy
    topology = Topology(strategy, allocation.nodes, plan.gpus_per_node, plan.device, memory)
    return planned_run.RunRequest(
        recipe=str(run.recipe_file),
        name=run.name,
        runs_dir=run.path.parent,
        allow=tuple(plan.allowed),
        topology=topology,
    )


def _request_of_recipe(options: argparse.Namespace, allocation: Allocation) -> planned_run.RunRequest:
    device = options.device or ("cuda" if gpus_present() else "cpu")
    present = allocation.gpus_on_node or gpus_present()
    processes = options.processes or (present if device == "cuda" else CPU_PROCESSES)
    default = choose_topology(options.strategy, allocation.nodes, processes)
    topology = Topology(
        default.strategy, allocation.nodes, processes, device, gpu_memory() if device == "cuda" else None
    )
    return planned_run.RunRequest(
        recipe=options.target,
        overrides=tuple(options.set),
        name=options.name,
        runs_dir=options.runs_dir,
        allow=tuple(options.allow),
        topology=topology,
    )
