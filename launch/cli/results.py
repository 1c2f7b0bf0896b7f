"""The commands of `samestep` for what a run left: evaluate, report, merge, consolidate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.options import AllowPart, Processes, RunArgument, RunsDir, example
from launch.console import echo
from launch.errors import ConfigError
from launch.option_values import named, one_of, place, positive, several_of, whole

commands = typer.Typer()


@commands.command(
    epilog=example(
        "samestep evaluate embedded --models base,adapter,shuffled",
        "samestep evaluate runs/embedded/checkpoint-140 --models adapter",
    )
)
def evaluate(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN[/checkpoint-N]",
            parser=named("RUN"),
            help="Name or folder of a run, or one of its checkpoints.",
        ),
    ],
    split: Annotated[
        str,
        typer.Option(
            metavar="SPLIT",
            parser=one_of(
                "--split", ("train", "validation", "test"), "which rows they hold, the recipe says"
            ),
            help="train, validation or test.",
        ),
    ] = "test",
    models: Annotated[
        str,
        typer.Option(
            metavar="MODELS",
            parser=several_of("--models", ("base", "adapter", "shuffled", "merged")),
            help="Any of base, adapter, shuffled (images exchanged), merged; separated by commas.",
        ),
    ] = "base,adapter,shuffled",
    max_samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=whole("--max-samples", 1, 10**9),
            help="Only N samples, spread over the split.",
            show_default="all",
        ),
    ] = None,
    gpus_per_node: Processes = None,
    allow: AllowPart = [],  # noqa: B006 - typer copies it
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Answer the questions of a split on all processes and score them, into eval.json (or eval-SPLIT.json).

    Answers of other models to the same questions stay in that file.
    """
    from launch.local import postprocess

    found, checkpoint = postprocess.find_evaluated(run, runs_dir)
    limit = [] if max_samples is None else ["--max-samples", str(max_samples)]
    chosen = [model.strip() for model in models.split(",")]
    allowed = [word for part in allow for word in ("--allow", part)]
    postprocess.evaluate(found, chosen, ["--split", split, *limit, *allowed], gpus_per_node, checkpoint)


@commands.command(
    epilog=example("samestep report embedded", "samestep report first second --output both.html")
)
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", parser=named("RUN"), help="Names or folders of one run or several."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=place("--output"),
            help="The file to write.",
            show_default="report.html in the run's folder; of several runs, beside the first one's",
        ),
    ] = None,
    runs_dir: RunsDir = Path("runs"),
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
    if value.count("/") != 1:
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
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Upload the adapter of a run to the Hugging Face hub, with processor, card, plan, metrics and evaluations.

    The token is that of `hf auth login` or HF_TOKEN. Repeated, it sends only what has changed.
    """
    from launch.hub.push import push_run
    from launch.recipe.loading import load_recipe
    from launch.run.find import find_run

    found = find_run(run, runs_dir)
    repository = repo or load_recipe(found.recipe_file).hub.repo_id
    if repository is None:
        raise ConfigError("--repo: missing, and the recipe has no hub.repo_id; give owner/name")
    for address in push_run(found, repository, merged=merged, private=not public):
        echo(f"uploaded: {address}")


@commands.command(
    name="export",
    epilog=example("samestep export first --format vllm", "samestep export first --format gguf --output ."),
)
def export_(
    run: RunArgument,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            parser=one_of("--format", ("vllm", "gguf")),
            help="vllm: check that the merged folder has what vLLM needs; gguf: convert it by llama.cpp.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            parser=place("--output"),
            help="Where the GGUF files go.",
            show_default="the run's folder",
        ),
    ] = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Check a run's merged model for a loader, or convert it for llama.cpp."""
    from launch.export.gguf import convert
    from launch.export.loadable import check_loadable
    from launch.run.find import find_run

    if output is not None and format_ == "vllm":
        raise ConfigError("--output: vLLM loads the merged folder as it is; leave it out")
    found = find_run(run, runs_dir)
    for each in check_loadable(found):
        echo(f"{each.need:11} {each.found}")
    if format_ == "vllm":
        echo(f"ready: vllm serve {found.merged}")
        return
    for file in convert(found, output or found.path):
        echo(f"written: {file}")


AdapterConfig = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        parser=place("--adapter-config"),
        help="adapter_config.json of a checkpoint without one.",
        show_default="the checkpoint's",
    ),
]
LoraAlpha = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER",
        parser=positive("--lora-alpha"),
        help="Of a checkpoint without adapter_config.json, such as FSDP's.",
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        parser=named("--base-model"),
        help="Folder or hub id of the unquantized base.",
        show_default="the adapter's",
    ),
]


@commands.command(
    epilog=example(
        "samestep merge embedded",
        "samestep merge runs/embedded/checkpoint-140 --output m140",
        "samestep merge old_run/checkpoint-500 --output merged --lora-alpha 16 --base-model MODEL",
    )
)
def merge(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CHECKPOINT|ADAPTER",
            parser=named("SOURCE"),
            help="Name of a run, or a folder: a run, an adapter, a checkpoint of any library.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            parser=place("--output"),
            help="Folder to write.",
            show_default="merged/ of the run",
        ),
    ] = None,
    base: Annotated[
        str,
        typer.Option(
            metavar="BASE",
            parser=one_of(
                "--base", ("original", "dequantized"), "a base model's folder goes to --base-model"
            ),
            help="original: the unquantized weights; dequantized: rounded to 4 bits and back, as a 4-bit run trained.",
        ),
    ] = "original",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            parser=one_of("--dtype", ("bfloat16", "float32"), "leave it out for the base's own"),
            help="bfloat16 or float32.",
            show_default="the base's",
        ),
    ] = None,
    compare: Annotated[
        bool | None,
        typer.Option(
            "--compare/--no-compare",
            help="Merge onto the other base too and set both beside the unmerged model; or compare nothing.",
            show_default="inside a run, this merge with the unmerged model",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            parser=named("--recipe"),
            help="The training's recipe, for --base dequantized outside a run.",
        ),
    ] = None,
    adapter_config: AdapterConfig = None,
    lora_alpha: LoraAlpha = None,
    base_model: BaseModel = None,
    allow: AllowPart = [],  # noqa: B006
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Add an adapter to its base, unquantized, verify it, and compare the result with base + adapter."""
    from launch.local import postprocess

    options = postprocess.MergeOptions(
        None if base == "original" else base, dtype, recipe, adapter_config, lora_alpha, base_model, allow
    )
    if not postprocess.merge(source, output, options, compare, runs_dir):
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
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", parser=place("--output"), help="Folder to write.")
    ],
    adapter_config: AdapterConfig = None,
    lora_alpha: LoraAlpha = None,
    base_model: BaseModel = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Make a PEFT adapter of a checkpoint of any form, on one CPU: DDP, FSDP, ZeRO, universal, merged weights."""
    from launch.local import postprocess

    options = postprocess.MergeOptions(
        adapter_config=adapter_config, lora_alpha=lora_alpha, base_model=base_model
    )
    postprocess.consolidate(source, output, options, runs_dir)
