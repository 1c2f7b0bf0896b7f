"""The commands of `samestep` that check runs: verify, diff, replay, blame."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.cli.options import AllowPart, Processes, RunArgument, RunsDir, Strategy, example, option
from launch.console import add_row, echo, emit, table_console
from launch.errors import ConfigError
from launch.option_values import named, one_of, step_range, whole

if TYPE_CHECKING:
    from launch.audit.diff import Comparison

commands = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@commands.command(
    epilog=example("samestep diff embedded embedded-on-2", "samestep diff runs/a runs/b --deep")
)
def diff(
    left: Annotated[str, typer.Argument(metavar="RUN", parser=named("RUN"), help="Name or folder of a run.")],
    right: Annotated[
        str, typer.Argument(metavar="RUN", parser=named("RUN"), help="Name or folder of another run.")
    ],
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Compute the first step whose loss parts (beyond rounding, or else at all) again in both, and name "
            "the module that differs first.",
        ),
    ] = False,
    runs_dir: RunsDir = Path("runs"),
    json: Json = False,
) -> None:
    """Compare two runs: recipe, data, base, plan and versions, and the first step where they part.

    Ends with 0 when they are the same run within rounding, with 1 when they are not, or when --deep names a
    module whose difference rounding does not explain. --deep works in copies of the runs, in one process here (a GPU,
    if there is one).
    """
    from launch.audit.diff import compare_runs
    from launch.run.find import find_run

    places = find_run(left, runs_dir), find_run(right, runs_dir)
    comparison = compare_runs(*places)
    if not (json and deep):
        _show_comparison(comparison, json)
    if deep:
        from launch.audit.deep import compare_deeply, deep_verdict, parting_step, repeats_to_the_bit
        from launch.local.planned_run import RunRequest

        step = parting_step(comparison, repeats_to_the_bit(comparison, *places))
        request = RunRequest(recipe="", strategy="single", gpus_per_node=1, runs_dir=runs_dir)
        result = compare_deeply(*places, step, request) if step is not None else None
        if json:
            found = result.to_json() if result is not None else "null"
            emit(f'{{"comparison": {comparison.to_json()}, "deep": {found}}}')
        elif result is not None:
            echo(deep_verdict(result, (places[0].name, places[1].name)))
        else:
            echo("--deep: losses and norms are equal to the bit, so there is no step to look into")
    if comparison.first is not None or (deep and result is not None and result.first is not None):
        raise typer.Exit(1)


def _show_comparison(comparison: Comparison, json: bool) -> None:
    from launch.audit.diff import verdict

    if json:
        emit(comparison.to_json())
    else:
        from rich.table import Table

        left, right = comparison.names
        if comparison.differences:
            table = Table("", "value", left, right, title="what differs", title_justify="left")
            for each in comparison.differences:
                add_row(table, each.section, each.key, str(each.left), str(each.right))
            table_console().print(table)
        if comparison.partings:
            table = Table(
                "figure",
                "from step",
                left,
                right,
                title="first steps that differ beyond rounding",
                title_justify="left",
            )
            for parting in comparison.partings:
                add_row(table, parting.quantity, str(parting.step), str(parting.left), str(parting.right))
            table_console().print(table)
        adapters = {True: "equal to the byte", False: "different", None: "not both there"}[
            comparison.same_adapter
        ]
        last = comparison.last_steps
        unequal = f" ({left} has taken {last[0]:,}, {right} {last[1]:,})" if last[0] != last[1] else ""
        echo(f"{comparison.steps:,} common steps{unequal}; adapters {adapters}")
        echo(verdict(comparison))


@commands.command(
    epilog=example("samestep verify embedded", "samestep verify downloads/chart-adapter --json")
)
def verify(run: RunArgument, runs_dir: RunsDir = Path("runs"), json: Json = False) -> None:
    """Check the chain of a run: data, plan, every step, checkpoints, adapter, merged model, evaluation.

    Needs no GPU, and neither the data nor the base: what needs them is checked where they are. Of a downloaded adapter
    or merged model it checks the proof in its model card. Ends with 1 when a link does not hold.
    """
    from rich.console import Console
    from rich.table import Table

    from launch.audit.verify import to_json, verify_run
    from launch.audit.verify_folder import has_proof, verify_folder
    from launch.run.find import find_run

    with Console(stderr=True).status("reading") as status:
        folder = Path(run).expanduser()
        if has_proof(folder) and not (folder / "plan.json").is_file():
            links = verify_folder(folder)
        else:
            links = verify_run(find_run(run, runs_dir), status.update)
    if json:
        emit(to_json(links))
    else:
        table = Table("link", "state", "what was checked", title_justify="left")
        for link in links:
            add_row(table, link.name, link.state, link.text)
        table_console().print(table)
    if any(link.state == "failed" for link in links):
        raise typer.Exit(1)


@commands.command(
    epilog=example(
        "samestep replay embedded --steps 40:45", "samestep replay embedded --random 3 --gpus-per-node 1"
    )
)
def replay(
    run: RunArgument,
    steps: Annotated[Any, option("--steps", "FIRST:LAST", "Which steps, counted from 1.", step_range)] = None,
    random: Annotated[
        int | None, option("--random", "N", "So many single steps, drawn by --seed.", whole, 1, 1000)
    ] = None,
    seed: Annotated[int, option("--seed", "SEED", "Of --random.", whole, 0, 2**31)] = 0,
    strategy: Strategy = None,
    gpus_per_node: Processes = None,
    allow: AllowPart = [],  # noqa: B006
    runs_dir: RunsDir = Path("runs"),
    json: Json = False,
) -> None:
    """Take steps of a run again, on what is here, and compare samples, loss and norm with what the run wrote.

    Begins at the newest checkpoint before the steps, in a folder of its own; the run is only read. Ends with 1 when a
    figure differs beyond rounding. Another data set or base is refused by name; --allow takes the steps all the same.
    """
    from launch.audit.replay import random_steps, refuse_steps_not_taken, replays
    from launch.local.planned_run import RunRequest
    from launch.run.figures import read_steps
    from launch.run.find import find_run
    from launch.strategies import AUTO, STRATEGIES

    if (steps is None) == (random is None):
        raise ConfigError("--steps: give the steps, such as 40:45, or --random 3")
    if strategy is not None:
        one_of("--strategy", (*STRATEGIES, AUTO))(strategy)
    place = find_run(run, runs_dir)
    last = max(read_steps(place.metrics_file), default=0)
    if steps:
        refuse_steps_not_taken(steps, last)
    ranges = [steps] if steps else [(s, s) for s in random_steps(random or 0, seed, last)]
    request = RunRequest(
        recipe="", strategy=strategy, gpus_per_node=gpus_per_node, runs_dir=runs_dir, allow=tuple(allow)
    )
    results = []
    for result in replays(place, ranges, request):
        results.append(result)
        echo(str(result), to_stderr=json)
    for note in dict.fromkeys(note for result in results for note in result.notes(allow)):
        echo(note, to_stderr=json)
    if json:
        emit(f"[{', '.join(result.to_json() for result in results)}]")
    if any(result.parting for result in results):
        raise typer.Exit(1)


@commands.command(
    epilog=example(
        "samestep blame embedded --step 120", "samestep blame embedded --step 120 --without 17 --until 140"
    )
)
def blame(
    run: RunArgument,
    step: Annotated[int, option("--step", "N", "Which step, counted from 1.", whole, 1, 10**9)],
    without: Annotated[
        list[int],
        option(
            "--without",
            "ROW",
            "Train on without this row of the training split; may be repeated.",
            whole,
            0,
            10**12,
        ),
    ] = [],  # noqa: B006
    until: Annotated[
        int | None,
        option(
            "--until",
            "N",
            "Of --without: the last step to take.",
            whole,
            1,
            10**9,
            unset="the last one of the run",
        ),
    ] = None,
    allow: AllowPart = [],  # noqa: B006
    runs_dir: RunsDir = Path("runs"),
    json: Json = False,
) -> None:
    """Rank the samples of a step by what each adds to its loss, computed again from the checkpoint before it.

    Needs one process (a GPU, if there is one) and works in a copy; the run's folder gets blame/step-N.json, which
    `samestep report` shows with pictures. --without trains on from there without a row, all else being the same, and
    shows what that changes.
    """
    from launch.audit.blame import blame as blame_step
    from launch.cli.tables import show_blame
    from launch.local.planned_run import RunRequest
    from launch.run.find import find_run

    place = find_run(run, runs_dir)
    request = RunRequest(recipe="", strategy="single", gpus_per_node=1, runs_dir=runs_dir, allow=tuple(allow))
    result = blame_step(place, step, sorted({*without}), until, request)
    if json:
        emit(result.to_json())
    else:
        show_blame(result)
        echo(f"kept for `samestep report {place.name}`: {place.path / 'blame' / f'step-{step}.json'}")
