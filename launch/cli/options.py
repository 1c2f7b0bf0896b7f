"""Arguments that several commands of `samestep` share."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.errors import ConfigError
from launch.option_values import line_of_text, named, place, text, whole


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


RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", parser=named("RECIPE"), help="A recipe file, or a shipped one by name."),
]
RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", parser=named("RUN"), help="Name of a run below --runs-dir, or its folder."),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--gpus-per-node",
        metavar="N",
        parser=whole("--gpus-per-node", 1),
        help="Processes to start, one a GPU.",
        show_default="the GPUs present, 2 on a CPU",
    ),
]
Strategy = Annotated[
    str | None,
    typer.Option(help="single, ddp, fsdp, zero2 or zero3.", show_default="single for one process, else ddp"),
]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe value; may be repeated.")
]
RunsDir = Annotated[
    Path, typer.Option(metavar="FOLDER", parser=place("--runs-dir"), help="The folder that holds the runs.")
]
RunName = Annotated[str | None, typer.Option(help="Name of the run.", show_default="the recipe's")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Move an older run of this name aside first.")]
Allow = Annotated[
    list[str],
    typer.Option(
        "--allow",
        metavar="KEY",
        parser=text("--allow"),
        help="Go on although this value differs; may be repeated.",
    ),
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
GpuMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        parser=memory_size("--gpu-memory"),
        help="Plan for GPUs of this memory: 24GB.",
        show_default="the GPUs' here",
    ),
]
Source = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="CHECKPOINT",
        parser=place("--from"),
        help="Begin with a checkpoint of another run, or of plain trl or DeepSpeed.",
    ),
]


def example(*lines: str) -> str:
    """The epilog of a command's help."""
    return "\n\n".join(["Example:", *lines])


def nodes_option(help_text: str) -> Any:
    """`--nodes` of a command."""
    return typer.Option(metavar="N", parser=whole("--nodes", 1), help=help_text)
