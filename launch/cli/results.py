"""The commands of `samestep` that ask a model: evaluate, ask, demo."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.cli.options import (
    DEFAULT_RUNS_DIR,
    AllowPart,
    Overrides,
    Processes,
    RunsDir,
    complete_run,
    example,
    option,
)
from launch.console import echo
from launch.option_values import named, one_of, whole
from launch.run.variants import parse_models, prompt_option, with_prompt

commands = typer.Typer()


TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN|CHECKPOINT|ADAPTER|MODEL|RECIPE",
        parser=named("TARGET"),
        autocompletion=complete_run,
        help="A run by name or folder, one of its checkpoints, an adapter, a model, or a recipe before it has run.",
    ),
]
HandModels = Annotated[
    str | None,
    typer.Option(
        "--models",
        metavar="MODELS",
        parser=parse_models,
        help="Any of base, adapter, best, merged, checkpoint-STEP, each also as NAME-no-prompt; separated by commas.",
        show_default="the adapter; of a run that is not done its newest checkpoint",
    ),
]
PromptOption = Annotated[
    str,
    option(
        "--prompt",
        "none|recipe|FILE",
        "The system message: none (the chat template's own), the recipe's, or that of a text file.",
        named,
    ),
]
OutsideRecipe = Annotated[
    str | None,
    option("--recipe", "RECIPE", "Names data and base for an adapter or a model that lies in no run.", named),
]


@commands.command(
    epilog=example(
        "samestep evaluate embedded --models base-no-prompt,base,adapter",
        "samestep evaluate runs/embedded/checkpoint-140 --models adapter",
        "samestep evaluate qwen2vl_7b_chartqa --models base --split validation --max-samples 200",
        "samestep evaluate Qwen/Qwen2-VL-2B-Instruct --recipe qwen2vl_7b_chartqa",
    )
)
def evaluate(
    target: TargetArgument,
    split: Annotated[
        str | None,
        option(
            "--split",
            "SPLIT",
            "train, validation or test.",
            one_of,
            ("train", "validation", "test"),
            "which rows they hold, the recipe says",
            unset="test; validation where the recipe has no test split",
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            metavar="MODELS",
            parser=parse_models,
            help="Any of base, adapter, best, merged, checkpoint-STEP, shuffled (images exchanged), each also as "
            "NAME-no-prompt; separated by commas.",
            show_default="base,adapter,shuffled; of a run that is not done base and its newest checkpoint",
        ),
    ] = None,
    prompt: PromptOption = "recipe",
    max_samples: Annotated[
        int | None,
        option("--max-samples", "N", "Only N samples, spread over the split.", whole, 1, 10**9, unset="all"),
    ] = None,
    recipe: OutsideRecipe = None,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    gpus_per_node: Processes = None,
    allow: AllowPart = [],  # noqa: B006
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON, without the answers.")
    ] = False,
) -> None:
    """Answer the questions of a split on all processes and score them, into eval.json (or eval-SPLIT.json).

    Every answer is kept in answers/ of the run's folder as soon as it is given: the same command goes on after an
    interruption, and asks nothing again that is there. Answers of other models to the same questions stay.
    """
    from launch.local import postprocess
    from launch.run.evaluation_target import asks_one_question, find_target, split_of

    evaluated = find_target(target, runs_dir, recipe, overrides)
    rows = split_of(evaluated, split)
    if split is None and rows != "test":
        echo(f"the recipe has no test split: asking the questions of {rows}", to_stderr=True)
    limit = [] if max_samples is None else ["--max-samples", str(max_samples)]
    words = [word for part in allow for word in ("--allow", part)]
    suffix, message = prompt_option(prompt)
    chosen = models.split(",") if models else list(evaluated.models)
    if not models and "shuffled" in chosen and asks_one_question(evaluated, rows, max_samples):
        chosen.remove("shuffled")
        echo(
            "shuffled is left out: only one question is asked, so there is no other image to show",
            to_stderr=True,
        )
    model_names = with_prompt(chosen, suffix)
    words += ["--prompt-file", str(message)] if message else []
    words += ["--json"] if as_json else []
    postprocess.start_evaluate(evaluated, model_names, ["--split", rows, *limit, *words], gpus_per_node)


@commands.command(
    epilog=example(
        'samestep ask embedded chart.png "Which bar is the highest?"',
        "samestep ask embedded chart.png --models base,adapter < questions.txt",
        'samestep ask runs/embedded/checkpoint-140 left.png right.png "Which one grows?"',
    )
)
def ask(
    target: TargetArgument,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE... [QUESTION]",
            help="One or several images, which are looked at together, and a question; without one, every line of the "
            "standard input is.",
        ),
    ],
    models: HandModels = None,
    prompt: PromptOption = "recipe",
    recipe: OutsideRecipe = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
) -> None:
    """Ask about images; the answer appears as it comes. Several models answer one after the other."""
    from launch.local import ask_by_hand

    ask_by_hand.start_ask(ask_by_hand.model_flags(target, runs_dir, recipe, models, prompt), words)


@commands.command(
    epilog=example("samestep demo embedded", "samestep demo embedded --models base-no-prompt,base,best")
)
def demo(
    target: TargetArgument,
    models: HandModels = None,
    prompt: PromptOption = "recipe",
    recipe: OutsideRecipe = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
) -> None:
    """Show a page on this machine that asks about images, the base and the tuned model beside each other.

    It is reached on loopback alone and needs gradio: pip install 'samestep[demo]'.
    """
    from launch.local import ask_by_hand

    ask_by_hand.start_demo(
        ask_by_hand.model_flags(target, runs_dir, recipe, models, prompt, beside_base=True)
    )
