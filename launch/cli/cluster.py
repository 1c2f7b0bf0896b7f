"""The commands of `samestep` for a Slurm cluster: submit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.cli.options import (
    DEFAULT_RUNS_DIR,
    Allow,
    EarlyStop,
    Fresh,
    Overrides,
    RecipeArgument,
    RunName,
    RunsDir,
    Source,
    example,
    memory_size,
    option,
    site_value,
    with_early_stop,
)
from launch.cli.tables import show_plan
from launch.console import echo, emit, table_console
from launch.invocation import command
from launch.option_values import one_of, place, several_of, text, whole, whole_numbers
from launch.slurm.attempts import MAX_CRASHES
from launch.untrusted_files import printable

if TYPE_CHECKING:
    from launch.local.planned_run import RunRequest
    from launch.slurm.site import Site
    from launch.slurm.submit import Submission

commands = typer.Typer()

StrategyFile = Annotated[
    str | None,
    typer.Option(
        help="auto, or a file of accelerate_configs/ without .yaml.",
        show_default="auto: single for one process, ddp where it fits the GPUs, else fsdp",
    ),
]
SiteFile = Annotated[
    Path | None, option("--site", "FILE", "What differs between clusters: slurm/site.example.yaml.", place)
]
# What follows wins over the site's file.
MemoryOfSite = Annotated[
    str | None, option("--gpu-memory", "SIZE", "Memory of one GPU: 80GB.", memory_size, unset="the site's")
]


def as_of_sbatch(option: str) -> Any:
    """An option of sbatch's name and meaning."""
    return typer.Option(metavar="TEXT", parser=text(option), help="As of sbatch.", show_default="the site's")


TimeLimit = Annotated[
    str | None,
    option(
        "--time",
        "TEXT",
        "Limit of one attempt, as of sbatch: D-HH:MM:SS.",
        site_value,
        "time",
        unset="the site's",
    ),
]
Image = Annotated[
    str | None, option("--container", "IMAGE", "For the site's container.runtime.", text, unset="the site's")
]
Device = Annotated[
    str | None,
    option(
        "--device",
        "DEVICE",
        "What the nodes train on: cuda or cpu.",
        one_of,
        ("cuda", "cpu"),
        unset="the site's, cuda",
    ),
]
SignalLead = Annotated[
    int | None,
    option(
        "--signal-lead", "SECONDS", "Warning before the time limit.", whole, 1, 65535, unset="the site's, 120"
    ),
]
MaxCrashes = Annotated[
    int,
    option(
        "--max-crashes",
        "N",
        "Give up after N attempts in a row that save no step; dead nodes count half.",
        whole,
        1,
        1000,
    ),
]
NodeCounts = Annotated[
    Any,  # several, which typer has no type for
    option(
        "--nodes",
        "N[,N...]",
        "Machines. Of several numbers each is a job of its own: the first that starts takes the run.",
        whole_numbers,
        1,
    ),
]
LookFirst = Annotated[
    bool,
    typer.Option(
        "--doctor", help="Look at every node before the run trains; leave out those that are not fit."
    ),
]
NodeProcesses = Annotated[int, option("--gpus-per-node", "N", "Processes of a node, one a GPU.", whole, 1)]
FollowUps = Annotated[
    str,
    typer.Option(
        metavar="JOBS",
        parser=several_of("--then", ("merge", "evaluate"), none=True),
        help="Jobs for when the run is done: merge, evaluate, or both with a comma.",
    ),
]
PrintScript = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the script, and the plan on stderr; queue and write nothing."),
]


@commands.command(
    epilog=example(
        "samestep submit qwen2vl_7b_chartqa --nodes 4 --gpus-per-node 8 --partition gpu --time 12:00:00",
        "samestep submit recipes/embedded.yaml --site site.yaml --then merge,evaluate",
        "samestep submit qwen2vl_7b_chartqa --nodes 1,2,4 --gpus-per-node 8 --doctor",
        "samestep submit qwen2vl_7b_chartqa --nodes 4 --gpus-per-node 8 --dry-run > job.sbatch",
    )
)
def submit(
    recipe: RecipeArgument,
    strategy: StrategyFile = None,
    nodes: NodeCounts = 1,
    gpus_per_node: NodeProcesses = 1,
    site: SiteFile = None,
    gpu_memory: MemoryOfSite = None,
    partition: Annotated[str | None, as_of_sbatch("--partition")] = None,
    account: Annotated[str | None, as_of_sbatch("--account")] = None,
    qos: Annotated[str | None, as_of_sbatch("--qos")] = None,
    time: TimeLimit = None,
    constraint: Annotated[str | None, as_of_sbatch("--constraint")] = None,
    container: Image = None,
    device: Device = None,
    signal_lead: SignalLead = None,
    max_crashes: MaxCrashes = MAX_CRASHES,
    then: FollowUps = "",
    name: RunName = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    early_stop: EarlyStop = None,
    fresh: Fresh = False,
    allow: Allow = [],  # noqa: B006
    source: Source = None,
    doctor: LookFirst = False,
    dry_run: PrintScript = False,
) -> None:
    """Queue a recipe's training on a Slurm cluster, on the login node. The job goes on until the run is done.

    Everything that can be refused is refused before the job is queued. `sbatch runs/NAME/submit.sbatch` queues the
    same again.
    """
    from launch.local.planned_run import RunRequest
    from launch.slurm.site import load_site
    from launch.slurm.submit import check_follow_ups

    follow_ups = check_follow_ups(then)
    values = {"partition": partition, "account": account, "qos": qos, "time": time, "constraint": constraint}
    values |= {"container.image": container, "device": device, "gpu_memory": gpu_memory}
    cluster = load_site(site, {**values, "signal_lead": signal_lead})
    request = RunRequest(
        recipe=recipe,
        overrides=with_early_stop(overrides, early_stop),
        strategy=strategy,
        name=name,
        runs_dir=runs_dir,
        fresh=fresh,
        allow=tuple(allow),
        source=source,
    )
    _submit(request, cluster, nodes, gpus_per_node, follow_ups, max_crashes, doctor, dry_run)


def _submit(
    request: RunRequest,
    site: Site,
    nodes: Sequence[int],
    gpus_per_node: int,
    follow_ups: Sequence[str],
    max_crashes: int,
    doctor: bool,
    dry_run: bool,
) -> None:
    """Refuse, plan, show; then queue, or print the scripts."""
    from launch.local.import_checkpoint import import_foreign_checkpoint
    from launch.local.planned_run import describe_start
    from launch.slurm import submit as slurm

    slurm.refuse_short_time(site)
    if not dry_run:
        slurm.refuse_missing_sbatch()
        slurm.refuse_too_many_cpus(site, gpus_per_node)
    first, *others = nodes
    request = import_foreign_checkpoint(slurm.request_for_site(request, site, first, gpus_per_node))
    requests = [request, *(slurm.request_for_site(request, site, count, gpus_per_node) for count in others)]
    submission = slurm.plan_submission(requests, site, follow_ups, max_crashes, doctor)
    _show(submission, to_stderr=dry_run)
    if dry_run:
        echo(describe_start(submission.planned, submission.request), to_stderr=True)
        for script in (submission.script, *submission.follow_ups.values()):
            emit(script)
        return
    _queue(submission, request.fresh)


def _queue(submission: Submission, fresh: bool) -> None:
    from launch.local import planned_run
    from launch.local.execute import reserve_name
    from launch.slurm import submit as slurm

    planned = submission.planned
    with reserve_name(planned, submission.request):
        slurm.refuse_if_queued(planned.run)
        if not fresh and planned_run.is_done(planned):
            echo(
                f"{planned.run.path}: done already, adapter in {planned.run.adapter}; --fresh trains it anew"
            )
            return
        with planned_run.moved_aside(planned.run, fresh) as old:
            if old:
                echo(f"the older run is now {old}")
            queued = slurm.queue_submission(submission)
    emit(submission.script)
    for script, job in queued:
        echo(f"queued as job {job}: {planned.run.path / script}")
    echo(f"see: {command()} status {planned.run.name}; {command()} logs {planned.run.name} --follow")


def _show(submission: Submission, to_stderr: bool) -> None:
    """The derived numbers, and what is allowed to differ."""
    from launch.run.changes import consequences

    console = table_console(to_stderr)
    for consequence in consequences(submission.planned.changed):
        console.print(printable(f"allowed: {consequence}"), markup=False)
    show_plan(submission.planned.plan, to_stderr)
    if counts := submission.node_counts[1:]:
        several = ", ".join(map(str, counts))
        console.print(f"or the same run on {several} nodes: whichever job starts first", markup=False)
    if other := submission.other_packages:
        console.print(
            f"versions and DeepSpeed: not judged here, the job runs with {printable(other)}; "
            "its first node judges them",
            markup=False,
        )
