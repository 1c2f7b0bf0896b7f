"""Arguments that several commands of `samestep` share.

A command that starts a child on the trainer's side declares its options here for typer, and the child reads them with
argparse: two parsers on purpose. typer takes them from a function's signature and would cost every rank its import;
the child's command line is `python -m trainer...`, shorter, and what a job's script or `ps` shows. What must agree is
defined once and used by both: the values an option may have (`launch.option_values`, `launch.run.merge_options`,
`launch.run.variants`), and the flags that are passed on (`MergeOptions.flags`, `Target.flags`).
"""

import glob
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.errors import ConfigError
from launch.option_values import line_of_text, named, place, positive, text, whole
from launch.resources import resource_names

DEFAULT_RUNS_DIR = Path("runs")


def option(
    name: str,
    metavar: str,
    help_text: str,
    judge: Callable[..., Callable[[str], Any]],
    *limits: Any,
    unset: str | None = None,
) -> Any:
    """An option whose value `judge(name, *limits)` reads; `unset` is what the help shows for leaving it out."""
    return typer.Option(
        name, metavar=metavar, parser=judge(name, *limits), help=help_text, show_default=unset or True
    )


def allowed_part(value: str) -> str:
    """A part of the run's identity, or all parts of its data or model, for `--allow` of merge and evaluate."""
    from launch.inputs.identity import PARTS
    from launch.run.changes import refuse_unknown_parts

    refuse_unknown_parts([value], PARTS)
    return value


def site_value(option: str, key: str) -> Callable[[str], str]:
    """What the site file could say as well: judged as there."""

    def parse(value: str) -> str:
        from launch.slurm.site import load_site

        try:
            load_site(None, {key: line_of_text(option, value)})
        except ConfigError as error:
            raise ConfigError(str(error).replace(f"{key}:", f"{option}:", 1)) from None
        return value

    return parse


def memory_size(option: str) -> Callable[[str], str]:
    """The memory of a GPU, as it was written."""

    def parse(value: str) -> str:
        from launch.planning.auto_settings import parse_gpu_memory

        parse_gpu_memory(value, option)
        return value

    return parse


def complete_run(ctx: typer.Context, incomplete: str) -> list[str]:
    """The names of runs that begin with what was typed, for the shell's completion."""
    folder = Path(ctx.params.get("runs_dir") or DEFAULT_RUNS_DIR).expanduser()
    try:
        return sorted(path.parent.name for path in folder.glob(f"{glob.escape(incomplete)}*/plan.json"))
    except OSError:
        return []


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes by name, and recipe files here, that begin with what was typed."""
    shipped = [name.removesuffix(".yaml") for name in resource_names("recipes") if name.endswith(".yaml")]
    files = [str(path) for path in Path().glob(f"{glob.escape(incomplete)}*.yaml")]
    return [*(name for name in shipped if name.startswith(incomplete)), *sorted(files)]


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        parser=named("RECIPE"),
        help="A recipe file, or a shipped one by name.",
        autocompletion=complete_recipe,
    ),
]
RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        parser=named("RUN"),
        help="Name of a run below --runs-dir, or its folder.",
        autocompletion=complete_run,
    ),
]
Processes = Annotated[
    int | None,
    option(
        "--gpus-per-node",
        "N",
        "Processes to start, one a GPU.",
        whole,
        1,
        unset="the GPUs present, 2 on a CPU",
    ),
]
Strategy = Annotated[
    str | None,
    typer.Option(
        help="auto, single, ddp, fsdp, zero2 or zero3.",
        show_default="auto: single for one process, ddp where it fits the GPUs, else fsdp",
    ),
]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe value; may be repeated.")
]
RunsDir = Annotated[Path, option("--runs-dir", "FOLDER", "The folder that holds the runs.", place)]
RunName = Annotated[str | None, typer.Option(help="Name of the run.", show_default="the recipe's")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Move an older run of this name aside first.")]
Allow = Annotated[
    list[str], option("--allow", "KEY", "Go on although this value differs; may be repeated.", text)
]
AllowPart = Annotated[
    list[str],
    typer.Option(
        "--allow",
        metavar="PART",
        parser=allowed_part,
        help="Go on although this part differs from the training's, such as model.processor; may be repeated.",
    ),
]
EarlyStop = Annotated[
    int | None,
    option(
        "--early-stop",
        "N",
        "End the run after N evaluations without gain (evaluation.early_stop; 0: never).",
        whole,
        0,
        10**6,
        unset="the recipe's",
    ),
]
GpuMemory = Annotated[
    str | None,
    option(
        "--gpu-memory", "SIZE", "Plan for GPUs of this memory: 24GB.", memory_size, unset="the GPUs' here"
    ),
]
Price = Annotated[
    float | None, option("--price", "AMOUNT", "Of a GPU hour: the forecast then has the cost.", positive)
]
Watts = Annotated[
    float | None, option("--watts", "W", "Of a GPU: the forecast then has the energy.", positive)
]
Source = Annotated[
    Path | None,
    option(
        "--from", "CHECKPOINT", "Begin with a checkpoint of another run, or of plain trl or DeepSpeed.", place
    ),
]


def example(*lines: str) -> str:
    """The epilog of a command's help."""
    return "\n\n".join(["Example:", *lines])


def with_early_stop(overrides: list[str], early_stop: int | None) -> tuple[str, ...]:
    """The overrides of a recipe, `--early-stop` among them."""
    return (*overrides, *([] if early_stop is None else [f"evaluation.early_stop={early_stop}"]))


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def nodes_option(help_text: str) -> Any:
    """`--nodes` of a command."""
    return typer.Option(metavar="N", parser=whole("--nodes", 1), help=help_text)
