"""The result of an evaluation on rank 0: figures and answers as eval.json holds them, and as they are shown."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Container, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.errors import ConfigError, RunError
from launch.invocation import VARIABLE, command
from launch.planning.make_plan import compute_dtype_of
from launch.planning.plan import Plan
from launch.run.directory import RunDirectory
from launch.run.merged_model import merge_behind
from launch.run.variants import in_order
from launch.untrusted_files import UNREADABLE
from trainer.evaluation.comparison_request import stored_dtype
from trainer.evaluation.metric_functions import RELAXED, Metrics, figures
from trainer.evaluation.metrics import Accuracy, Paired, summary_of
from trainer.evaluation.questions import Answer, Question
from trainer.evaluation.request import EvaluationRequest, EvaluationTask, Variant, variants_of
from trainer.evaluation.result_file import Kept, compared, probabilities

_COMMAND = Path(sys.executable).with_name("samestep")


def result_of(
    task: EvaluationTask,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    world_size: int,
    weights: Mapping[str, str | None],
    identity: Mapping[str, Any] = MappingProxyType({}),
    metrics: Metrics = RELAXED,
) -> dict[str, Any]:
    """Return everything that eval.json holds. `metrics`: the first one says what is correct.

    `weights`: as of `weights_of`, before they were loaded; `identity`: as of
    `hold_against_training`.

    Raises:
        RunError: a question has not exactly one answer of every model.
    """
    request, recipe = task.request, task.recipe
    by_model = _answers_by_model(request, questions, answers)
    accuracy: dict[str, dict[str, Accuracy]] = {}
    outcomes: dict[str, list[bool]] = {}
    for model, by_row in by_model.items():
        outcomes[model] = [metrics.is_correct(by_row[q.row]["prediction"], q.label) for q in questions]
        kinds = (question.human_or_machine for question in questions)
        accuracy[model] = summary_of(zip(outcomes[model], kinds, strict=True))
    variants = variants_of(request, recipe)
    predictions = _predictions(
        questions, by_model, outcomes, metrics, {v.name for v in variants if v.shuffled}
    )
    pairs = compared(predictions, request.models)
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "run": request.run.name,
        "split": request.split,
        "source": getattr(recipe.data, request.split),
        "questions": len(questions),
        "max_new_tokens": recipe.evaluation.max_new_tokens,
        "prompts_sha256": _digest([question.prompt for question in questions]),
        "prompts": {
            variant.name: _digest([question.prompt_of(variant.prompt) for question in questions])
            for variant in variants
        },
        "world_size": world_size,
        **identity,
        "finished": finished,
        "finished_of": dict.fromkeys(by_model, finished),
        "weights": {model: weights[model] for model in by_model},
        "products": {variant.name: products_of(variant, task) for variant in variants},
        "accuracy": accuracy,
        "metrics": figures(predictions, list(by_model), metrics),
        "mcnemar_p": probabilities(pairs),
        "paired": pairs,
        "predictions": predictions,
    }


def products_of(variant: Variant, task: EvaluationTask) -> str:
    """Return the dtype of the matrix products that a variant answers with: never 8 bits, whatever it was trained with.

    A merged model computes in the dtype it is stored in.
    """
    if variant.is_merged:
        return str(stored_dtype(task.request.run.merged)).removeprefix("torch.")
    return compute_dtype_of(task.recipe)


def _answers_by_model(
    request: EvaluationRequest, questions: Sequence[Question], answers: Sequence[Answer]
) -> dict[str, dict[int, Answer]]:
    """Model -> row -> answer, of every model to every question."""
    by_model: dict[str, dict[int, Answer]] = {model: {} for model in in_order(request.models)}
    for answer in answers:
        by_model[answer["model"]][answer["row"]] = answer
    expected = {question.row for question in questions}
    whole = all(by_row.keys() == expected for by_row in by_model.values())
    if not whole or len(answers) != len(expected) * len(by_model):
        raise RunError(
            f"evaluation: {len(answers)} answers where {len(expected)} questions were put to {len(by_model)} "
            "models; the ranks did not share the questions as agreed, report this"
        )
    return by_model


def _predictions(
    questions: Sequence[Question],
    by_model: Mapping[str, Mapping[int, Answer]],
    outcomes: Mapping[str, Sequence[bool]],
    metrics: Metrics,
    shuffled: Container[str],
) -> list[dict[str, Any]]:
    """Every question with the answers of all models; `shuffled`: the models that saw the images of other rows."""
    return [
        {
            "row": question.row,
            "query": question.query,
            "label": list(question.label),
            "human_or_machine": question.human_or_machine,
            **{
                model: _prediction(
                    by_row[question.row], question, outcomes[model][position], metrics, model in shuffled
                )
                for model, by_row in by_model.items()
            },
        }
        for position, question in enumerate(questions)
    ]


def _prediction(
    answer: Answer, question: Question, correct: bool, metrics: Metrics, shuffled: bool
) -> dict[str, Any]:
    """One model's answer to a question, with its scores; `shuffled`: it saw the image of another row."""
    prediction = {
        "prediction": answer["prediction"],
        "correct": correct,
        "scores": metrics.score(answer["prediction"], question.label),
    }
    return prediction | ({"image_of_row": answer["image_row"]} if shuffled else {})


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def print_result(kept: Kept, request: EvaluationRequest, console: Console) -> None:
    """Print the accuracies as a table, then the paths and what to type next."""
    run, result = request.run, kept.result
    accuracy: dict[str, dict[str, Accuracy]] = result["accuracy"]
    first, *others = result["metrics"]
    title = f"{first.replace('_', ' ')} on {result['questions']} questions of {result['source']}"
    table = Table(title=title, title_justify="left")
    groups = [group for group, each in next(iter(accuracy.values())).items() if each["count"]]
    table.add_column("model", no_wrap=True, min_width=max(len(_title(model)) for model in accuracy))
    for column in (*groups, "95 % interval", *others):
        table.add_column(column, justify="right")
    for model, of_model in accuracy.items():
        shares = (_share_text(of_model[group]) for group in groups)
        more = (f"{result['metrics'][name][model]['percent']:.1f} %" for name in others)
        table.add_row(_title(model), *shares, _interval_text(of_model["overall"]), *more)
    console.print(table)
    pairs: dict[str, Paired] = result["paired"]
    for pair, each in pairs.items():
        console.print(
            f"McNemar {pair}: {each['gained']} gained, {each['lost']} lost, p = {each['p']:.2g}", markup=False
        )
    console.print(_products_text(result["products"], request), markup=False)
    for model in kept.models:
        console.print(f"{model}: answers of {result['finished_of'][model]}, kept", markup=False)
    if kept.aside is not None:
        console.print(
            f"{_short(request.file)}: was of other weights or questions; that one is now {_short(kept.aside)}",
            markup=False,
        )
    paths = {
        "adapter": request.adapter,
        "merged": run.merged,
        "answers": request.file,
        "every step": run.metrics_file,
    }
    console.print(*(f"{name:11} {_short(path)}" for name, path in paths.items() if path.exists()), sep="\n")
    if request.run.adapter.is_dir() and not request.label:
        console.print("next:", *(f"  {command}" for command in next_commands(run)), sep="\n")


def _products_text(products: Mapping[str, str | None], request: EvaluationRequest) -> str:
    """In words, the dtype of each model's products; of a recipe that trains in 8 bits that it does."""
    by_dtype: dict[str, list[str]] = {}
    for model, dtype in products.items():
        by_dtype.setdefault(dtype or "unknown (an older version)", []).append(model)
    if len(by_dtype) == 1:
        text = next(iter(by_dtype))
    else:
        text = ", ".join(f"{dtype} ({', '.join(models)})" for dtype, models in by_dtype.items())
    trained = "; the recipe trains with fp8" if request.recipe().model.products == "fp8" else ""
    return f"products: {text}{trained}"


def _title(model: str) -> str:
    return model.replace("shuffled", "adapter, images shuffled")


def _interval_text(accuracy: Accuracy) -> str:
    interval = accuracy["interval"]
    return "-" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f} %"


def _share_text(accuracy: Accuracy) -> str:
    if accuracy["percent"] is None:
        return "-"
    return f"{accuracy['percent']:.1f} % ({accuracy['correct']}/{accuracy['count']})"


def next_commands(run: RunDirectory) -> list[str]:
    """Return commands that make sense after an evaluation."""
    samestep = (
        command() if shutil.which("samestep") or VARIABLE in os.environ else shlex.quote(_short(_COMMAND))
    )
    folder, place = shlex.quote(_short(run.path)), shlex.quote(_short(run.path.parent))
    is_merged = run.merged.is_dir() and merge_behind(run, run.merged) is None
    merged = f"evaluate {folder} --models base,adapter,merged" if is_merged else f"merge {folder}"
    commands = [merged, f"plan {folder}/recipe.yaml --gpus-per-node 4"]
    with contextlib.suppress(ConfigError, *UNREADABLE):  # without a plan nobody knows what would be longer
        longer = f"--set training.max_steps={2 * Plan.read(run.plan_file).max_steps}"
        commands.insert(1, f"run {folder}/recipe.yaml --runs-dir {place} --name {run.name}-longer {longer}")
    return [f"{samestep} {words}" for words in commands]


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def print_json(kept: Kept, request: EvaluationRequest) -> None:
    """Print the figures, without the answers, and where those are."""
    figures = {key: value for key, value in kept.result.items() if key != "predictions"}
    sys.stdout.write(json.dumps({**figures, "file": str(request.file)}, indent=1, ensure_ascii=False) + "\n")
    sys.stdout.flush()
