"""The commands of `samestep` for a recipe on this machine: plan, prepare, run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

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
    RunName,
    RunsDir,
    Source,
    Strategy,
    Watts,
    example,
    nodes_option,
    option,
    with_early_stop,
)
from launch.cli.tables import plan_json, show_allowed, show_forecasts, show_memory, show_plan
from launch.console import echo, emit
from launch.option_values import host, whole

if TYPE_CHECKING:
    from launch.local import planned_run

commands = typer.Typer()

MachineRank = Annotated[
    int, option("--machine-rank", "R", "Number of this machine, from 0; the first writes the run.", whole, 0)
]
MainProcessIp = Annotated[
    str | None, option("--main-process-ip", "IP", "Where machine 0 is found.", host, unset="this machine")
]
MainProcessPort = Annotated[
    int | None, option("--main-process-port", "PORT", "A free port there.", whole, 1, 65535, unset="any")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show the plan, where the run would go on, and the command; write nothing but the data's cache.",
    ),
]


@commands.command(
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
    from launch.planning.auto_strategy import resolve_strategy
    from launch.planning.forecast import forecasts
    from launch.planning.make_plan import make_plan
    from launch.planning.speeds import CPU
    from launch.planning.step_plan import StreamOffset
    from launch.recipe.loading import find_recipe, load_recipe
    from launch.rules.checks import refuse_topology

    file = find_recipe(recipe)
    loaded = load_recipe(file, overrides)
    topology = for_gpus_of(choose_topology(strategy, nodes, gpus_per_node), gpu_memory)
    refuse_topology(loaded, topology.strategy, topology.nodes, topology.gpus_per_node, device=topology.device)
    index = planned_run.load_index(file, loaded, overrides)
    identity = run_identity.find_identity(loaded, index)
    topology = resolve_strategy(loaded, index, topology, StreamOffset())
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


@commands.command(
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
    planned_run.start_prepare(file, overrides, vision=vision)


@commands.command(
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
    show_allowed(planned.changed)
    show_plan(planned.plan)
    echo(planned_run.describe_start(planned, request))
    if request.fresh or not planned_run.is_done(planned):
        echo(_shell(run_command(planned.plan, planned.run, request.machine)))


def _run_here(request: planned_run.RunRequest) -> None:
    """Plan and train, on this machine or as the first of several."""
    from launch.local import planned_run
    from launch.local.execute import execute_with_oom_retry, reserve_name
    from launch.local.import_checkpoint import import_foreign_checkpoint
    from launch.local.record_repair import repair_records

    request = import_foreign_checkpoint(request)
    planned = planned_run.plan_run(request)
    with reserve_name(planned, request):
        if not request.fresh and planned_run.is_done(planned):
            echo(
                f"{planned.run.path}: done already, adapter in {planned.run.adapter}; --fresh trains it anew"
            )
            if repaired := repair_records(planned):
                echo(repaired)
            return
        show_allowed(planned.changed)
        with planned_run.moved_aside(planned.run, request.fresh) as old:
            if old:
                echo(f"the older run is now {old}")
            show_plan(planned.plan)
            marker = execute_with_oom_retry(planned, request)
        if marker.kind == "STOPPED":
            echo(f"stopped ({marker.text}): {planned.run.path}; the same command goes on")
            return
        echo(f"done: {planned.run.path}, adapter in {planned.run.adapter}")


def _shell(command: Sequence[str]) -> str:
    import shlex

    return shlex.join(command)
