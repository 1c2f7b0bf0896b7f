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
    nodes_option,
    site_value,
    with_early_stop,
)
from launch.cli.tables import show_plan
from launch.console import echo, emit, table_console
from launch.invocation import command
from launch.option_values import one_of, place, several_of, text, whole
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
        help="A file of accelerate_configs/, without .yaml.", show_default="single for one process, else ddp"
    ),
]
SiteFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", parser=place("--site"), help="What differs between clusters: slurm/site.example.yaml."
    ),
]
# What follows wins over the site's file.
MemoryOfSite = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        parser=memory_size("--gpu-memory"),
        help="Memory of one GPU: 80GB.",
        show_default="the site's",
    ),
]


def as_of_sbatch(option: str) -> Any:
    """An option of sbatch's name and meaning."""
    return typer.Option(metavar="TEXT", parser=text(option), help="As of sbatch.", show_default="the site's")


TimeLimit = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        parser=site_value("--time", "time"),
        help="Limit of one attempt, as of sbatch: D-HH:MM:SS.",
        show_default="the site's",
    ),
]
Image = Annotated[
    str | None,
    typer.Option(
        metavar="IMAGE",
        parser=text("--container"),
        help="For the site's container.runtime.",
        show_default="the site's",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        parser=one_of("--device", ("cuda", "cpu")),
        help="What the nodes train on: cuda or cpu.",
        show_default="the site's, cuda",
    ),
]
SignalLead = Annotated[
    int | None,
    typer.Option(
        metavar="SECONDS",
        parser=whole("--signal-lead", 1, 65535),
        help="Warning before the time limit.",
        show_default="the site's, 120",
    ),
]
MaxCrashes = Annotated[
    int,
    typer.Option(
        metavar="N",
        parser=whole("--max-crashes", 1, 1000),
        help="Give up after N attempts in a row that save no step; dead nodes count half.",
    ),
]
NodeProcesses = Annotated[
    int, typer.Option(metavar="N", parser=whole("--gpus-per-node", 1), help="Processes of a node, one a GPU.")
]
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
        "samestep submit qwen2vl_7b_chartqa --nodes 4 --gpus-per-node 8 --dry-run > job.sbatch",
    )
)
def submit(
    recipe: RecipeArgument,
    strategy: StrategyFile = None,
    nodes: Annotated[int, nodes_option("Machines.")] = 1,
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
    _submit(request, cluster, nodes, gpus_per_node, follow_ups, max_crashes, dry_run)


def _submit(
    request: RunRequest,
    site: Site,
    nodes: int,
    gpus_per_node: int,
    follow_ups: Sequence[str],
    max_crashes: int,
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
    request = import_foreign_checkpoint(slurm.request_for_site(request, site, nodes, gpus_per_node))
    submission = slurm.plan_submission(request, site, follow_ups, max_crashes)
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
    if other := submission.other_packages:
        console.print(
            f"versions and DeepSpeed: not judged here, the job runs with {printable(other)}; "
            "its first node judges them",
            markup=False,
        )
