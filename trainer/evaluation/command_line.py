"""Options of every command that asks models: who is asked, as `launch.run.evaluation_target.Target.flags` writes it."""

from __future__ import annotations

import argparse
from functools import partial

from launch.inputs.dataset_index import SplitName
from launch.option_values import add_option, for_argparse, place, whole
from launch.run.directory import RunDirectory
from launch.run.variants import NO_PROMPT, VARIANT_WEIGHTS, parse_models
from trainer.evaluation.request import EvaluationRequest


def add_request_arguments(parser: argparse.ArgumentParser, models: str) -> None:
    """Add the options that say who is asked. `models`: their names where the command line has none."""
    folder, file = for_argparse(place("--run-dir")), for_argparse(place("--prompt-file"))
    parser.add_argument("--run-dir", type=folder, required=True, help="the run's folder")
    parser.add_argument(
        "--models",
        type=for_argparse(partial(parse_models, of_files=True)),
        default=models,
        help=f"comma-separated, of {', '.join(VARIANT_WEIGHTS)}, checkpoint-STEP, each also with {NO_PROMPT} "
        f"(default: {models})",
    )
    add_option(
        parser,
        "--checkpoint",
        whole,
        0,
        10**9,
        metavar="STEP",
        help="the run's checkpoint of that step (default: its adapter)",
    )
    parser.add_argument("--adapter", type=file, help="another adapter in the place of the run's")
    parser.add_argument("--label", default="", help="of the file with the results")
    parser.add_argument("--recipe", type=file, help="a recipe in the place of the run's recipe.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of it"
    )
    parser.add_argument("--prompt-file", type=file, help="the system message of NAME-prompt-FILE")


def request_of(
    options: argparse.Namespace,
    split: SplitName = "test",
    max_samples: int | None = None,
    allow: tuple[str, ...] = (),
) -> EvaluationRequest:
    """Return the request of parsed options."""
    return EvaluationRequest(
        run=RunDirectory(options.run_dir.expanduser().absolute()),
        split=split,
        models=tuple(options.models.split(",")),
        max_samples=max_samples,
        allow=allow,
        checkpoint=options.checkpoint,
        adapter_folder=options.adapter and options.adapter.absolute(),
        label=options.label,
        recipe_file=options.recipe,
        overrides=tuple(options.set),
        prompt_file=options.prompt_file,
    )
