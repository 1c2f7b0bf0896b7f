"""Answers of base and adapter on a split, on all ranks, and their relaxed accuracy.

    accelerate launch ... -m trainer.evaluation.generate --run-dir RUN [--split test] [--models base,adapter]

Every rank holds a whole replica (generation under sharding hangs on answers of unequal length) and answers
some of the batches. The batches themselves do not depend on the number of ranks, so neither do the answers.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table

from launch.checkpoints.adapter_file import read_digest
from launch.checkpoints.manifest import read_manifest
from launch.errors import RunError, SamestepError
from launch.inputs.dataset_index import SPLITS, read_index
from launch.invocation import VARIABLE, command
from launch.option_values import for_argparse, place, whole
from launch.recipe.loading import load_recipe
from launch.run.directory import RunDirectory
from launch.run.merged_model import merge_behind, merged_digest
from trainer.data.relaxed_accuracy import correct
from trainer.distributed.collectives import (
    broadcast_from_main,
    destroy_process_group,
    end_process,
    report_error,
    run_on_all_ranks,
    run_on_main,
)
from trainer.distributed.process_group import stay_on_this_machine
from trainer.evaluation.answers import (
    MODELS,
    PATIENCE,
    TITLES,
    Answer,
    ModelName,
    Question,
    Request,
    Task,
    answer_all,
    check_request,
)
from trainer.evaluation.identity import hold_against_training
from trainer.evaluation.metrics import Accuracy, Prediction, summary
from trainer.evaluation.stored_answers import Kept, compared, with_earlier_answers, write_result
from trainer.export.base_model import add_allow
from trainer.export.model_card import refresh_figures
from trainer.logging_setup import setup_logging
from trainer.prepare import prepare

# The result: rank 0 ----------------------------------------------------------------------


_COMMAND = Path(sys.executable).with_name("samestep")


def result_of(
    task: Task,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    world_size: int,
    weights: Mapping[str, str | None],
    identity: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Everything that eval.json holds. `weights`: as of `weights_of`, before they were loaded; `identity`: as of
    `hold_against_training`.

    Raises:
        RunError: a question has not exactly one answer of every model.
    """
    request, recipe = task.request, task.recipe
    by_model: dict[ModelName, dict[int, Answer]] = {model: {} for model in request.models}
    for answer in answers:
        by_model[answer["model"]][answer["row"]] = answer
    expected = {question.row for question in questions}
    whole = all(given.keys() == expected for given in by_model.values())
    if not whole or len(answers) != len(expected) * len(by_model):
        raise RunError(
            f"evaluation: {len(answers)} answers where {len(expected)} questions were put to {len(by_model)} "
            "models; the ranks did not share the questions as agreed, report this"
        )
    accuracy: dict[str, dict[str, Accuracy]] = {}
    outcomes: dict[str, list[bool]] = {}
    for model, given in by_model.items():
        scored: list[Prediction] = [
            {
                "prediction": given[q.row]["prediction"],
                "target": q.label[0],
                "human_or_machine": q.human_or_machine,
            }
            for q in questions
        ]
        accuracy[model] = summary(scored)
        outcomes[model] = [correct(each["prediction"], each["target"]) for each in scored]
    predictions = [
        {
            "row": question.row,
            "query": question.query,
            "label": list(question.label),
            "human_or_machine": question.human_or_machine,
            **{
                model: {
                    "prediction": given[question.row]["prediction"],
                    "correct": outcomes[model][position],
                    **({"image_of_row": given[question.row]["image_row"]} if model == "shuffled" else {}),
                }
                for model, given in by_model.items()
            },
        }
        for position, question in enumerate(questions)
    ]
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "run": request.run.name,
        "split": request.split,
        "source": getattr(recipe.data, request.split),
        "questions": len(questions),
        "max_new_tokens": recipe.evaluation.max_new_tokens,
        "prompts_sha256": hashlib.sha256("\0".join(q.prompt for q in questions).encode()).hexdigest(),
        "world_size": world_size,
        **identity,
        "finished": finished,
        "finished_of": dict.fromkeys(by_model, finished),
        "weights": {model: weights[model] for model in by_model},
        "accuracy": accuracy,
        "mcnemar_p": compared(predictions, request.models),
        "predictions": predictions,
    }


def weights_of(request: Request) -> dict[str, str | None]:
    """What every model that can be asked is of, in the models' order; None where that is not known."""
    adapter = read_digest(request.adapter)
    if request.checkpoint is not None:  # whatever form its adapter has
        adapter = str(read_manifest(request.adapter)["sha256"])
    return {
        "base": None,
        "adapter": adapter,
        "shuffled": adapter,
        "merged": merged_digest(request.run.merged),
    }


def print_result(kept: Kept, request: Request, console: Console) -> None:
    """The accuracies as a table, then the paths and what to type next."""
    run, result = request.run, kept.result
    accuracy: dict[str, dict[str, Accuracy]] = result["accuracy"]
    title = f"relaxed accuracy on {result['questions']} questions of {result['source']}"
    table = Table(title=title, title_justify="left")
    table.add_column("questions")
    for model in accuracy:
        table.add_column(TITLES[model], justify="right")
    for group in ("human", "augmented", "overall"):
        table.add_row(group, *(_share_text(of_model[group]) for of_model in accuracy.values()))
    console.print(table)
    for pair, probability in result["mcnemar_p"].items():
        console.print(f"McNemar {pair}: p = {probability:.2g}")
    for model in kept.models:
        console.print(f"{model}: answers of {result['finished_of'][model]}, kept", markup=False)
    if kept.aside is not None:
        console.print(
            f"{_short(request.file)}: was of other weights or questions; that one is now {_short(kept.aside)}",
            markup=False,
        )
    paths = {
        "adapter": run.adapter,
        "merged": run.merged,
        "answers": request.file,
        "every step": run.metrics_file,
    }
    console.print(*(f"{name:11} {_short(path)}" for name, path in paths.items() if path.exists()), sep="\n")
    console.print("next:", *(f"  {command}" for command in next_commands(run)), sep="\n")


def _share_text(accuracy: Accuracy) -> str:
    if accuracy["percent"] is None:
        return "-"
    return f"{accuracy['percent']:.1f} % ({accuracy['correct']}/{accuracy['count']})"


def next_commands(run: RunDirectory) -> list[str]:
    """Three commands that make sense after an evaluation."""
    samestep = (
        command() if shutil.which("samestep") or VARIABLE in os.environ else shlex.quote(_short(_COMMAND))
    )
    folder, place = shlex.quote(_short(run.path)), shlex.quote(_short(run.path.parent))
    is_merged = run.merged.is_dir() and merge_behind(run, run.merged) is None
    merged = f"evaluate {folder} --models base,adapter,merged" if is_merged else f"merge {folder}"
    longer = "--set training.max_steps=-1 --set training.num_train_epochs=5"
    return [
        f"{samestep} {merged}",
        f"{samestep} run {folder}/recipe.yaml --runs-dir {place} --name {run.name}-longer {longer}",
        f"{samestep} plan {folder}/recipe.yaml --gpus-per-node 4",
    ]


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


# The command -----------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> Request:
    """The request of the command line; argparse ends the process with status 2 and the reason."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluation.generate",
        description="Answer the questions of a split with a run's models; writes eval.json.",
        epilog="example: accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 "
        "-m trainer.evaluation.generate --run-dir runs/embedded",
    )
    parser.add_argument(
        "--run-dir", type=for_argparse(place("--run-dir")), required=True, help="the run's folder"
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="which split (default: test)")
    parser.add_argument(
        "--models",
        default="base,adapter,shuffled",
        help=f"comma-separated, of {', '.join(MODELS)} (default: base,adapter,shuffled)",
    )
    parser.add_argument(
        "--max-samples",
        type=for_argparse(whole("--max-samples", 1, 10**9)),
        help="ask only so many questions, spread over the split",
    )
    add_allow(parser)
    parser.add_argument(
        "--checkpoint",
        type=for_argparse(whole("--checkpoint", 0, 10**9)),
        metavar="STEP",
        help="the run's checkpoint of that step (default: its adapter)",
    )
    given = parser.parse_args(arguments)
    models = tuple(dict.fromkeys(part.strip() for part in given.models.split(",")))
    unknown = [model for model in models if model not in MODELS]
    if unknown:
        parser.error(f"--models: unknown {', '.join(map(repr, unknown))}; choose of {', '.join(MODELS)}")
    run = RunDirectory(given.run_dir.expanduser().absolute())
    chosen = cast("tuple[ModelName, ...]", models)
    return Request(run, given.split, chosen, given.max_samples, tuple(given.allow), given.checkpoint)


def prepared(request: Request) -> Task:
    """Recipe and index of the run, both there; made before the process group exists, as in training.

    Raises:
        ConfigError: something that was asked for is missing.
    """
    check_request(request)
    recipe = load_recipe(request.run.recipe_file)
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    return Task(request, recipe, read_index(recipe) or prepare(recipe, quiet=not first))


def evaluate(task: Task, state: PartialState) -> None:
    """Answer on all ranks, gather; rank 0 writes and prints."""
    # A run that goes on meanwhile, or a merge, may replace the weights: the answers are of those that are there now.
    identity, weights = broadcast_from_main(lambda: (hold_against_training(task), weights_of(task.request)))
    share = run_on_all_ranks(lambda: answer_all(task, state))
    gathered: list[tuple[list[Question], list[Answer]]] = gather_object([share])

    def conclude() -> None:
        answers = [answer for _, of_rank in gathered for answer in of_rank]
        request = task.request
        result = result_of(task, share[0], answers, state.num_processes, weights, identity)
        kept = with_earlier_answers(result, request.file, weights_of(request), request.adapter)
        write_result(kept, request.file)
        refresh_figures(request.run)
        print_result(kept, request, Console(highlight=False, soft_wrap=True))

    run_on_main(conclude)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of every rank; returns the exit status."""
    request = parse(arguments)
    setup_logging()
    try:
        task = prepared(request)
        stay_on_this_machine()
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        evaluate(task, state)
    except SamestepError as error:
        return report_error(error)
    destroy_process_group()
    return 0


if __name__ == "__main__":
    end_process(main())
