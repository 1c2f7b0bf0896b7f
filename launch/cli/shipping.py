"""The commands of `samestep` that show and ship what a run left: report, push, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.options import DEFAULT_RUNS_DIR, RunArgument, RunsDir, complete_run, example, option
from launch.console import echo
from launch.errors import ConfigError
from launch.hub_names import is_hub_id
from launch.option_values import named, one_of, place

commands = typer.Typer()


@commands.command(
    epilog=example("samestep report embedded", "samestep report first second --output both.html")
)
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            parser=named("RUN"),
            help="Names or folders of one run or several.",
            autocompletion=complete_run,
        ),
    ],
    output: Annotated[
        Path | None,
        option(
            "--output",
            "FILE",
            "The file to write.",
            place,
            unset="report.html in the run's folder; of several runs, beside the first one's",
        ),
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
) -> None:
    """Write a page with curves, answers beside their charts, accuracy, recipe, attempts and proofs of a run.

    One HTML file without any request to the network. Of several runs: side by side, compared on the same questions.
    """
    from launch.report.write import write_report
    from launch.run.find import find_run

    file = write_report([find_run(run, runs_dir) for run in runs], output)
    echo(f"report: {file}")


def _repository(value: str) -> str:
    """owner/name, as the hub itself would take it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # has no __all__

    try:
        validate_repo_id(value)
    except HFValidationError:
        value = ""
    if not is_hub_id(value):
        raise ConfigError("--repo: is not owner/name as the hub takes it; correct it")
    return value


@commands.command(
    epilog=example("samestep push first --repo owner/name", "samestep push first --repo owner/name --merged")
)
def push(
    run: RunArgument,
    repo: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            parser=_repository,
            help="The repository, made where it is missing.",
            show_default="the recipe's hub.repo_id",
        ),
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Upload the merged model too, to OWNER/NAME-merged.")
    ] = False,
    public: Annotated[
        bool, typer.Option("--public", help="A repository that is made can be read by everybody.")
    ] = False,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
) -> None:
    """Upload the adapter of a run to the Hugging Face hub, with processor, card, plan, metrics and evaluations.

    The token is that of `hf auth login` or HF_TOKEN. Repeated, it sends only what has changed.
    """
    from launch.hub.push import push_run
    from launch.recipe.loading import load_recipe
    from launch.run.find import find_run

    place = find_run(run, runs_dir)
    repository = repo or load_recipe(place.recipe_file).hub.repo_id
    if repository is None:
        raise ConfigError("--repo: missing, and the recipe has no hub.repo_id; give owner/name")
    for address in push_run(place, repository, merged=merged, private=not public):
        echo(f"uploaded: {address}")


@commands.command(
    name="export",
    epilog=example("samestep export first --format vllm", "samestep export first --format gguf --output ."),
)
def export_(
    run: RunArgument,
    format_: Annotated[
        str,
        option(
            "--format",
            "FORMAT",
            "vllm: check that the merged folder has what vLLM needs; gguf: convert it by llama.cpp.",
            one_of,
            ("vllm", "gguf"),
        ),
    ],
    output: Annotated[
        Path | None, option("--output", "FOLDER", "Where the GGUF files go.", place, unset="the run's folder")
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
) -> None:
    """Check a run's merged model for a loader, or convert it for llama.cpp."""
    from launch.export.gguf import convert
    from launch.export.loadable import check_loadable
    from launch.run.find import find_run

    if output is not None and format_ == "vllm":
        raise ConfigError("--output: vLLM loads the merged folder as it is; leave it out")
    run_directory = find_run(run, runs_dir)
    for each in check_loadable(run_directory):
        echo(f"{each.need:11} {each.finding}")
    if format_ == "vllm":
        echo(f"ready: vllm serve {run_directory.merged}")
        return
    for file in convert(run_directory, output or run_directory.path):
        echo(f"written: {file}")
