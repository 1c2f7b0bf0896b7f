"""The `samestep` command. Imports of substance are inside the commands: `--help` stays fast."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from launch.atomic_files import place_of
from launch.cli.audit import commands as audit_commands
from launch.cli.cluster import commands as cluster_commands
from launch.cli.data import commands as data_commands
from launch.cli.options import (
    DEFAULT_RUNS_DIR,
    Allow,
    AsJson,
    EarlyStop,
    Fresh,
    GpuMemory,
    Overrides,
    Price,
    Processes,
    RecipeArgument,
    RunArgument,
    RunName,
    RunsDir,
    Source,
    Strategy,
    Watts,
    example,
    nodes_option,
    with_early_stop,
)
from launch.cli.results import commands as results_commands
from launch.cli.shipping import commands as shipping_commands
from launch.cli.tables import plan_json, say_allowed, show_forecasts, show_memory, show_plan
from launch.console import add_row, echo, emit, table_console
from launch.errors import ConfigError, SamestepError
from launch.invocation import as_typed, remember_command
from launch.option_values import host, whole
from launch.subprocesses import ChildError
from launch.untrusted_files import printable, printable_lines

if TYPE_CHECKING:
    from launch.local import planned_run


app = typer.Typer(
    help="One QLoRA fine-tuning recipe, the same training run on one GPU, several GPUs or several nodes.",
    epilog="Begin with: samestep run recipes/embedded.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        from launch.versions import version_line

        echo(version_line())
        raise typer.Exit


@app.callback()
def samestep(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show this version and the libraries'."
        ),
    ] = False,
) -> None:
    """Options without a command."""


MachineRank = Annotated[
    int,
    typer.Option(
        metavar="R",
        parser=whole("--machine-rank", 0),
        help="Number of this machine, from 0; the first writes the run.",
    ),
]
MainProcessIp = Annotated[
    str | None,
    typer.Option(
        metavar="IP",
        parser=host("--main-process-ip"),
        help="Where machine 0 is found.",
        show_default="this machine",
    ),
]
MainProcessPort = Annotated[
    int | None,
    typer.Option(
        metavar="PORT",
        parser=whole("--main-process-port", 1, 65535),
        help="A free port there.",
        show_default="any",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show the plan, where the run would go on, and the command; write nothing but the data's cache.",
    ),
]

_PLACE_ERRORS = (
    *(errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT),
    *(errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ESTALE),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENXIO),
)


@app.command(
    epilog=example(
        "samestep plan qwen2vl_7b_chartqa --strategy ddp --gpus-per-node 8 --gpu-memory 24GB",
        "samestep plan qwen2vl_7b_chartqa --gpus-per-node 4 --price 2.50 --watts 700",
    )
)
def plan(
    recipe: RecipeArgument,
    strategy: Strategy = None,
    nodes: Annotated[int, nodes_option("Machines.")] = 1,
    gpus_per_node: Processes = None,
    gpu_memory: GpuMemory = None,
    price: Price = None,
    watts: Watts = None,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    as_json: AsJson = False,
) -> None:
    """Show every number derived from a recipe, a strategy and a topology. Prepares the data when it must."""
    from launch.hardware import gpu_name, gpus_present
    from launch.inputs import identity as run_identity
    from launch.local import planned_run
    from launch.local.topology import choose_topology, for_gpus_of
    from launch.planning.forecast import forecasts
    from launch.planning.make_plan import make_plan
    from launch.planning.speeds import CPU
    from launch.recipe.loading import find_recipe, load_recipe
    from launch.rules.checks import refuse_topology

    file = find_recipe(recipe)
    loaded = load_recipe(file, overrides)
    topology = for_gpus_of(choose_topology(strategy, nodes, gpus_per_node), gpu_memory)
    refuse_topology(loaded, topology.strategy, topology.nodes, topology.gpus_per_node, device=topology.device)
    index = planned_run.load_index(file, loaded, overrides)
    identity = run_identity.find_identity(loaded, index)
    planned = make_plan(loaded, index, topology, identity=identity)
    card = gpu_name() if topology.device == "cuda" else CPU
    # Of other GPUs than those here nothing is known.
    expected = [] if gpu_memory is not None else forecasts(loaded, index, planned, card, price, watts)
    if as_json:
        emit(plan_json(planned, loaded, index, topology, expected))
    else:
        show_plan(planned)
        show_memory(loaded, index, topology)
        show_forecasts(expected)
    if gpu_memory is not None and gpus_per_node is None and strategy != "single":
        counted = "the GPUs here" if gpus_present() else "no GPU is here to be counted"
        echo(
            f"planned for {topology.gpus_per_node} processes a node ({counted}); --gpus-per-node N plans for N",
            to_stderr=True,
        )


@app.command(
    epilog=example(
        "samestep prepare qwen2vl_7b_chartqa",
        "samestep prepare qwen2vl_7b_chartqa --vision --set data.vision_cache=disk",
    )
)
def prepare(
    recipe: RecipeArgument,
    vision: Annotated[
        bool,
        typer.Option(
            "--vision",
            help="Also run the vision tower over every image, on a GPU if there is one, and keep the features on "
            "disk (7B: about 5 MB an image). Started again, it goes on.",
        ),
    ] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Validate the data, count its tokens and fetch the base weights, into the cache. Needs no GPU."""
    from launch.local import planned_run
    from launch.recipe.loading import find_recipe, load_recipe

    file = find_recipe(recipe)
    load_recipe(file, overrides)
    planned_run.prepare(file, overrides, vision=vision)


@app.command(
    epilog=example(
        "samestep run recipes/embedded.yaml --set training.max_steps=8 --name short",
        "samestep run recipes/embedded.yaml --set training.max_steps=16 --name short --allow training.max_steps",
        "samestep run recipes/embedded.yaml --name gentle --from runs/embedded/checkpoint-140 "
        "--set training.learning_rate=1e-4 --allow training.learning_rate",
        "samestep run qwen2vl_7b_chartqa --nodes 2 --machine-rank 0 --main-process-ip 10.0.0.1 "
        "--main-process-port 29500",
    )
)
def run(
    recipe: RecipeArgument,
    strategy: Strategy = None,
    gpus_per_node: Processes = None,
    gpu_memory: GpuMemory = None,
    name: RunName = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    overrides: Overrides = [],  # noqa: B006
    early_stop: EarlyStop = None,
    fresh: Fresh = False,
    allow: Allow = [],  # noqa: B006
    source: Source = None,
    nodes: Annotated[
        int, nodes_option("Machines; give the same command on each, and its --machine-rank.")
    ] = 1,
    machine_rank: MachineRank = 0,
    main_process_ip: MainProcessIp = None,
    main_process_port: MainProcessPort = None,
    dry_run: DryRun = False,
) -> None:
    """Train a recipe on this machine, or on several that share the runs' folder. The same command again resumes.

    Ctrl-C, or a file STOP in the run's folder, stops it at the next step boundary with a checkpoint; a file SAVE
    writes a checkpoint there.
    """
    from launch.local import multi_machine, planned_run
    from launch.local.launcher import Machine

    machine = Machine(nodes, machine_rank, main_process_ip, main_process_port)
    request = planned_run.RunRequest(
        recipe=recipe,
        overrides=with_early_stop(overrides, early_stop),
        strategy=strategy,
        gpus_per_node=gpus_per_node,
        name=name,
        runs_dir=runs_dir,
        fresh=fresh,
        allow=tuple(allow),
        source=source,
        machine=machine,
        gpu_memory=gpu_memory,
    )
    multi_machine.refuse_machine(machine)
    if machine_rank > 0 and not dry_run:
        marker = multi_machine.join(request)
        echo(f"{marker.kind.lower()} ({marker.text})")
        return
    if dry_run:
        _dry_run(request)
        return
    with multi_machine.telling_others(request):
        _run_here(request)


def _dry_run(request: planned_run.RunRequest) -> None:
    """The plan, where the run would go on, and the command; trains nothing."""
    from launch.local import planned_run
    from launch.local.import_checkpoint import import_foreign_checkpoint
    from launch.local.launcher import run_command

    planned = planned_run.plan_run(import_foreign_checkpoint(request))
    say_allowed(planned.changed)
    show_plan(planned.plan)
    echo(planned_run.describe_start(planned, request))
    if request.fresh or not planned_run.is_done(planned):
        echo(_shell(run_command(planned.plan, planned.run, request.machine)))


def _run_here(request: planned_run.RunRequest) -> None:
    """Plan and train, on this machine or as the first of several."""
    from launch.local import planned_run
    from launch.local.execute import execute_with_oom_retry, reserve_name
    from launch.local.import_checkpoint import import_foreign_checkpoint

    request = import_foreign_checkpoint(request)
    planned = planned_run.plan_run(request)
    with reserve_name(planned, request):
        if not request.fresh and planned_run.is_done(planned):
            echo(
                f"{planned.run.path}: done already, adapter in {planned.run.adapter}; --fresh trains it anew"
            )
            return
        say_allowed(planned.changed)
        with planned_run.moved_aside(planned.run, request.fresh) as old:
            if old:
                echo(f"the older run is now {old}")
            show_plan(planned.plan)
            marker = execute_with_oom_retry(planned, request)
        if marker.kind == "STOPPED":
            echo(f"stopped ({marker.text}): {planned.run.path}; the same command goes on")
            return
        echo(f"done: {planned.run.path}, adapter in {planned.run.adapter}")


@app.command(epilog=example("samestep checkpoints embedded"))
def checkpoints(run: RunArgument, runs_dir: RunsDir = DEFAULT_RUNS_DIR, as_json: AsJson = False) -> None:
    """Show the checkpoints of a run, and why it cannot go on from a damaged one. Reads every file."""
    import json
    import time

    from rich.table import Table
    from rich.text import Text

    from launch.checkpoints.scan import scan_checkpoints
    from launch.monitor.checkpoint_table import COLUMNS, as_objects, reasons, rows
    from launch.run.find import find_run
    from launch.run.request_files import old_plan

    place = find_run(run, runs_dir, whole=False)
    console = table_console(to_stderr=as_json)
    with console.status("reading") as status:  # says nothing where nobody watches
        found = scan_checkpoints(place.path, telling=lambda folder: status.update(f"reading {folder.name}"))
    if as_json:
        emit(json.dumps(as_objects(found), indent=1))
        return
    if not found and place.adapter.exists():
        echo(f"{place.path}: no checkpoint is left, its adapter is; to go on would be refused (see --fresh)")
        return
    if not found:
        echo(
            f"{place.path}: no checkpoint yet (see checkpoint.every_steps); start or resume it with `samestep run`"
        )
        return
    title = Text(printable(f"checkpoints of {place.name}"))
    table = Table(*COLUMNS, title=title, title_justify="left")
    for row in rows(found, time.time()):
        add_row(table, *row)
    console.print(table)
    for line in reasons(found, old_plan(place)):
        echo(line)


app.add_typer(data_commands)
app.add_typer(results_commands)
app.add_typer(shipping_commands)
app.add_typer(audit_commands)
reference = typer.Typer()  # on its own because `--help` lists a group's commands in the order of the groups


@reference.command(epilog=example("samestep rules"))
def rules(as_json: AsJson = False) -> None:
    """Show what is refused before anything starts, and why."""
    import json

    from rich.table import Table

    from launch.rules.checks import rule_rows

    if as_json:
        emit(json.dumps([{"rule": name, "why": reason} for name, reason in rule_rows()], indent=1))
        return
    table = Table("rule", "why", title="what is refused", title_justify="left", show_lines=True)
    for name, reason in rule_rows():
        add_row(table, name, reason)
    table_console().print(table)


@reference.command(epilog=example("samestep schema > recipe.schema.json"))
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    import json

    from launch.recipe.schema import recipe_schema

    emit(json.dumps(recipe_schema(), indent=1))


app.add_typer(reference)
app.add_typer(cluster_commands)


def main() -> None:
    """Entry point: typer ends usage errors (2) and Ctrl-C (130), our errors become lines, not tracebacks."""
    remember_command()
    try:
        app(prog_name="samestep")
    except ChildError as error:  # the child has said on this terminal what is wrong
        sys.exit(error.exit_status) if error.was_explained else _print_error(str(error), error.exit_status)
    except SamestepError as error:
        _print_error(str(error), error.exit_status)
    except OSError as error:
        if error.errno not in _PLACE_ERRORS:
            raise
        remedy = "choose" if error.errno in (errno.ENOTDIR, errno.EISDIR) else "make room, or choose"
        _print_error(f"{place_of(error, 'disk')}; {remedy} another place", ConfigError.exit_status)


def _print_error(text: str, status: int) -> NoReturn:
    print(printable_lines(as_typed(text)), file=sys.stderr)
    sys.exit(status)


def _shell(command: Sequence[str]) -> str:
    import shlex

    return shlex.join(command)


if __name__ == "__main__":
    main()
