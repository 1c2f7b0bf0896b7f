"""The commands of `samestep` that make weights of a checkpoint: merge, consolidate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from launch.cli.options import DEFAULT_RUNS_DIR, AllowPart, RunsDir, complete_run, example, option
from launch.console import echo
from launch.option_values import named, one_of, place, positive
from launch.run.merge_options import BaseKind, MergeOptions, StoredDtype

commands = typer.Typer()

AdapterConfig = Annotated[
    Path | None,
    option(
        "--adapter-config",
        "FILE",
        "adapter_config.json of a checkpoint without one.",
        place,
        unset="the checkpoint's",
    ),
]
LoraAlpha = Annotated[
    float | None,
    option(
        "--lora-alpha", "NUMBER", "Of a checkpoint without adapter_config.json, such as FSDP's.", positive
    ),
]
BaseModel = Annotated[
    str | None,
    option(
        "--base-model", "MODEL", "Folder or hub id of the unquantized base.", named, unset="the adapter's"
    ),
]
MergeSource = Annotated[
    str,
    typer.Argument(
        metavar="RUN|CHECKPOINT|ADAPTER",
        parser=named("SOURCE"),
        help="Name of a run, or a folder: a run, an adapter, a checkpoint of any library.",
        autocompletion=complete_run,
    ),
]
MergedOutput = Annotated[
    Path | None, option("--output", "FOLDER", "Folder to write.", place, unset="merged/ of the run")
]
Base = Annotated[
    str,
    option(
        "--base",
        "BASE",
        "original: the unquantized weights; dequantized: rounded to 4 bits and back, as a 4-bit run trained.",
        one_of,
        get_args(BaseKind),
        "a base model's folder goes to --base-model",
    ),
]
Dtype = Annotated[
    str | None,
    option(
        "--dtype",
        "DTYPE",
        "bfloat16 or float32.",
        one_of,
        get_args(StoredDtype),
        "leave it out for the base's own",
        unset="the base's",
    ),
]
Compare = Annotated[
    bool | None,
    typer.Option(
        "--compare/--no-compare",
        help="Merge onto the other base too and set both beside the unmerged model; or compare nothing.",
        show_default="inside a run, this merge with the unmerged model",
    ),
]
TrainingRecipe = Annotated[
    str | None,
    option("--recipe", "RECIPE", "The training's recipe, for --base dequantized outside a run.", named),
]


@commands.command(
    epilog=example(
        "samestep merge embedded",
        "samestep merge runs/embedded/checkpoint-140 --output m140",
        "samestep merge old_run/checkpoint-500 --output merged --lora-alpha 16 --base-model MODEL",
    )
)
def merge(
    source: MergeSource,
    output: MergedOutput = None,
    base: Base = "original",
    dtype: Dtype = None,
    compare: Compare = None,
    recipe: TrainingRecipe = None,
    adapter_config: AdapterConfig = None,
    lora_alpha: LoraAlpha = None,
    base_model: BaseModel = None,
    allow: AllowPart = [],  # noqa: B006
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
) -> None:
    """Add an adapter to its base, unquantized, verify it, and compare the result with base + adapter."""
    from launch.local.postprocess import start_merge

    options = MergeOptions(
        None if base == "original" else base, dtype, recipe, adapter_config, lora_alpha, base_model, allow
    )
    if not start_merge(source, output, options, compare, runs_dir):
        echo("not compared with base + adapter: the adapter lies in no run, which would name the data")


@commands.command(epilog=example("samestep consolidate old_run/checkpoint-500 --output adapter"))
def consolidate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            parser=named("SOURCE"),
            help="Of ours, transformers, trl, accelerate or DeepSpeed.",
        ),
    ],
    output: Annotated[Path, option("--output", "FOLDER", "Folder to write.", place)],
    adapter_config: AdapterConfig = None,
    lora_alpha: LoraAlpha = None,
    base_model: BaseModel = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
) -> None:
    """Make a PEFT adapter of a checkpoint of any form, on one CPU: DDP, FSDP, ZeRO, universal, merged weights."""
    from launch.local.postprocess import start_consolidate

    options = MergeOptions(adapter_config=adapter_config, lora_alpha=lora_alpha, base_model=base_model)
    start_consolidate(source, output, options, runs_dir)
