"""Answers of models on a split, on all ranks, and their relaxed accuracy.

    accelerate launch ... -m trainer.evaluation.generate --run-dir RUN [--split test] [--models base,adapter]

Every rank holds a whole replica (generation under sharding waits for answers of unequal length) and answers
some of the batches. The batches themselves do not depend on the number of ranks, so neither do the answers.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console

from launch.errors import SamestepError
from launch.inputs.dataset_index import SPLITS, read_index
from launch.option_values import add_option, whole
from launch.run.variants import in_order
from trainer.distributed.collectives import (
    broadcast_from_main,
    destroy_process_group,
    end_process,
    report_error,
    run_on_all_ranks,
    run_on_main,
)
from trainer.distributed.process_group import stay_on_this_machine
from trainer.evaluation.answer_store import AnswerStore
from trainer.evaluation.answering import Stored, answer_all
from trainer.evaluation.command_line import add_request_arguments, request_of
from trainer.evaluation.identity import hold_against_training
from trainer.evaluation.metric_functions import load_metrics
from trainer.evaluation.questions import Answer, Question
from trainer.evaluation.request import (
    EvaluationRequest,
    EvaluationTask,
    answer_facts,
    check_evaluation_request,
    variants_of,
    weights_of,
)
from trainer.evaluation.result import print_json, print_result, result_of
from trainer.evaluation.result_file import models_in, with_earlier_answers, write_result
from trainer.export.base_model import add_allow
from trainer.export.model_card import refresh_figures
from trainer.logging_setup import setup_logging
from trainer.prepare import prepare

PATIENCE = timedelta(days=1)  # of a rank that has answered its batches and waits for the others


def parse(arguments: Sequence[str] | None) -> tuple[EvaluationRequest, bool]:
    """Return the request of the command line, and whether its figures are printed as JSON.

    argparse ends the process with status 2 and the reason.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluation.generate",
        description="Answer the questions of a split with a run's models; writes eval.json.",
        epilog="example: accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 "
        "-m trainer.evaluation.generate --run-dir runs/embedded",
    )
    add_request_arguments(parser, "base,adapter,shuffled")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which split (default: test)")
    add_option(
        parser, "--max-samples", whole, 1, 10**9, help="ask only so many questions, spread over the split"
    )
    add_allow(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    return request_of(options, options.split, options.max_samples, tuple(options.allow)), options.json


def prepared(request: EvaluationRequest) -> EvaluationTask:
    """Return the evaluation with the run's recipe and index; made before the process group exists, as in training.

    Raises:
        ConfigError: something that was asked for is missing.
    """
    check_evaluation_request(request)
    recipe = request.recipe()
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    task = EvaluationTask(request, recipe, read_index(recipe) or prepare(recipe, quiet=not first))
    variants_of(request, recipe)
    return task


def evaluate(task: EvaluationTask, state: PartialState, as_json: bool = False) -> None:
    """Answer on all ranks and gather the answers; rank 0 writes and prints."""
    request = task.request

    def look() -> tuple[dict[str, Any], dict[str, str | None], dict[str, Stored]]:
        identity = hold_against_training(task)
        return identity, weights_of(request), stored_answers(task, identity["identity"])

    # A run that goes on meanwhile, or a merge, may replace the weights: the answers are of those that are there now.
    identity, weights, stored = broadcast_from_main(look)
    kinds = task.index.splits[request.split].human_or_machine
    metrics = run_on_all_ranks(lambda: load_metrics(task.recipe, has_kinds=bool((kinds >= 0).all())))
    share = run_on_all_ranks(lambda: answer_all(task, state, stored))
    gathered: list[tuple[list[Question], list[Answer]]] = gather_object([share])

    def conclude() -> None:
        answers = [answer for _, of_rank in gathered for answer in of_rank]
        result = result_of(task, share[0], answers, state.num_processes, weights, identity, metrics)
        names = in_order([*request.models, *models_in(request.file)])
        kept = with_earlier_answers(
            result, request.file, weights_of(request, names), request.adapter, metrics
        )
        write_result(kept, request.file)
        refresh_figures(request.run)
        if as_json:
            print_json(kept, request)
        else:
            print_result(kept, request, Console(highlight=False, soft_wrap=True))

    run_on_main(conclude)


def stored_answers(task: EvaluationTask, identity: Mapping[str, str]) -> dict[str, Stored]:
    """Return what every variant that is asked has answered so far, by its name."""
    stored = {}
    for variant in variants_of(task.request, task.recipe):
        kind = "merged" if variant.is_merged else "adapter" if variant.adapter else "base"
        facts = answer_facts(variant, task.request, task.recipe, identity)
        store = AnswerStore.of(task.request.run.answers, kind, facts)
        stored[variant.name] = Stored(store, store.read())
    return stored


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of every rank; returns the exit status."""
    request, as_json = parse(arguments)
    setup_logging()
    try:
        task = prepared(request)
        stay_on_this_machine()
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        evaluate(task, state, as_json)
    except SamestepError as error:
        return report_error(error)
    destroy_process_group()
    return 0


if __name__ == "__main__":
    end_process(main())
