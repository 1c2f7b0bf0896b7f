"""Merged models beside base + adapter: what merging changed, in logits, answers and accuracy.

    python -m trainer.evaluation.compare --source SOURCE --merged DIR [--merged DIR] [--both-bases] [--samples N]

On samples of the validation split. The logits are those at the positions that predict the true answer, whose tokens
are given; the answers are generated. The unmerged model is the unquantized base in the merged model's dtype plus the
adapter: what differs from it is rounding. When the recipe trains in 4 bits, the quantized base plus the adapter is
shown too: that difference is the price of leaving the quantized weights the adapter was trained on.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from launch.atomic_files import atomic_write
from launch.errors import CheckpointError, ConfigError, SamestepError
from launch.inputs.dataset_index import read_index
from launch.option_values import add_option, place, whole
from launch.recipe.loading import load_recipe
from launch.recipe.schema import Recipe
from launch.run.merged_model import COMPARISON, RECORD
from trainer.data.encoder import Encoder
from trainer.data.images import decode_image
from trainer.data.row_errors import naming_row
from trainer.data.rows import Row
from trainer.data.splits import open_split
from trainer.evaluation.comparison import (
    QUANTIZED,
    UNMERGED,
    Compared,
    MergeComparison,
    Seen,
    answered,
    difference,
    print_comparison,
)
from trainer.evaluation.comparison_request import (
    ComparisonRequest,
    merged_folders,
    recipe_file_of,
    stored_dtype,
)
from trainer.evaluation.loading import load_stored, with_named_targets
from trainer.evaluation.metric_functions import Metrics, load_metrics
from trainer.evaluation.questions import evenly_spaced
from trainer.export.adapter import read_adapter
from trainer.export.base_model import add_allow, check_base, find_base
from trainer.export.consolidate import add_adapter_options, missing_of, write_adapter
from trainer.generation.replica import Replica
from trainer.logging_setup import print_error, setup_logging
from trainer.model.base import load_base
from trainer.prepare import prepare
from trainer.pretrained import load_processor

BATCH = 8  # of generated answers
DEFAULT_SAMPLES = 32
ModelLoader = Callable[[], torch.nn.Module]


def compare(request: ComparisonRequest) -> MergeComparison:
    """Load one model after the other, keep logits and answers, and compare."""
    with merged_folders(request) as folders, TemporaryDirectory() as adapter:
        # As PEFT's present version reads it.
        write_adapter(with_named_targets(request.adapter), Path(adapter))
        return _compare(request, folders, Path(adapter))


def _compare(request: ComparisonRequest, folders: dict[str, Path], adapter: Path) -> MergeComparison:
    dtype = stored_dtype(request.merged[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    pairs = len(request.adapter.pairs)
    loaders: dict[str, ModelLoader] = {
        name: partial(load_stored, folder, device, dtype) for name, folder in folders.items()
    }
    loaders[UNMERGED] = lambda: with_adapter(load_stored(request.base, device, dtype), adapter, pairs)
    if request.recipe.quantization.load_in_4bit:
        loaders[QUANTIZED] = lambda: with_adapter(load_base(request.recipe, device), adapter, pairs)
    seen, rows = _look(request, loaders, dtype)
    reference = QUANTIZED if QUANTIZED in seen else UNMERGED
    metrics = metrics_of(request.recipe, rows)
    return MergeComparison(
        samples=len(rows),
        positions=len(seen[UNMERGED].logits),
        dtype=str(dtype).removeprefix("torch."),
        reference=reference,
        merged=tuple(
            Compared(
                name,
                str(folder),
                difference(seen[name].logits, seen[UNMERGED].logits),
                difference(seen[name].logits, seen[QUANTIZED].logits) if QUANTIZED in seen else None,
            )
            for name, folder in folders.items()
        ),
        answers=tuple(answered(name, each, seen[reference], rows, metrics) for name, each in seen.items()),
    )


def _look(
    request: ComparisonRequest, loaders: Mapping[str, ModelLoader], dtype: torch.dtype
) -> tuple[dict[str, Seen], list[Row]]:
    """Every model's logits and answers, one model in memory at a time; and the rows they are of."""
    processor = load_processor(request.recipe)
    numbers = validation_numbers(request)
    source = open_split(request.recipe, "validation")
    rows = [source[number] for number in numbers]
    # A function of the user's own that cannot be loaded: before any model is.
    metrics_of(request.recipe, rows)
    encoder = Encoder(processor, request.recipe.data.system_message, request.recipe.data.loss)
    prompts = [encoder.texts(row)[0] for row in rows]
    seen: dict[str, Seen] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name, load in loaders.items():
            task = progress.add_task(name, total=2 * len(rows))
            model = load().eval()
            parts = []
            for row in rows:
                parts.append(answer_logits(model, processor, request.recipe, row, dtype))
                progress.advance(task)
            tokens = request.recipe.evaluation.max_new_tokens
            replica = Replica(cast(Any, model), processor, source, tokens, dtype)
            answers: list[str] = []
            for begin in range(0, len(rows), BATCH):
                end = begin + BATCH
                answers += replica.answers(prompts[begin:end], numbers[begin:end])
                progress.advance(task, len(rows[begin:end]))
            seen[name] = Seen(torch.cat(parts), tuple(answers))
            del model, replica
            gc.collect()
    return seen, rows


def metrics_of(recipe: Recipe, rows: Sequence[Row]) -> Metrics:
    """The metrics that an evaluation of these rows has."""
    return load_metrics(recipe, has_kinds=all(row.human_or_machine is not None for row in rows))


def with_adapter(base: PreTrainedModel, folder: Path, pairs: int) -> torch.nn.Module:
    """Load an adapter as PEFT does, and count its pairs: PEFT says nothing about keys that match no layer."""
    model = PeftModel.from_pretrained(base, str(folder))
    loaded = sum(bool(weight.any()) for name, weight in model.named_parameters() if ".lora_B." in name)
    if loaded != pairs:
        raise CheckpointError(
            f"{folder}: PEFT loaded {loaded} of {pairs} lora pairs into the base; "
            "its keys are of another transformers version, so there is no unmerged model to compare with"
        )
    return cast(torch.nn.Module, model)


def validation_numbers(request: ComparisonRequest) -> list[int]:
    """Return the numbers of rows of the validation split, evenly spaced over it."""
    index = read_index(request.recipe) or prepare(request.recipe)
    numbers = index.splits["validation"].rows
    if not len(numbers):
        raise ConfigError("data.validation: has no rows to compare on; correct the split")
    return [int(numbers[position]) for position in evenly_spaced(len(numbers), request.samples)]


@torch.inference_mode()
def answer_logits(
    model: torch.nn.Module, processor: ProcessorMixin, recipe: Recipe, row: Row, dtype: torch.dtype
) -> Tensor:
    """Return fp32 logits [answer tokens, vocabulary] on the CPU, each row predicting one token of the row's answer."""
    encoder = Encoder(processor, recipe.data.system_message, recipe.data.loss)
    conversation = encoder.conversation(row)
    device = next(model.parameters()).device
    with naming_row(f"data: the row that asks {row.query!r}"):
        images = [decode_image(image) for image in row.images] or None
        inputs = processor(
            text=[conversation.text], images=images, return_tensors="pt", add_special_tokens=False
        )
        begin, end = encoder.spans(conversation, encoder.text_ids(conversation.text))[-1]
        begin = inputs["input_ids"].shape[1] - (end - begin)  # no image stands in an answer
    inputs = inputs.to(device)
    with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[0, begin - 1 : -1].float().cpu()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluation.compare",
        description="Compare merged models with their base and adapter: logits, answers, accuracy.",
        epilog="example: python -m trainer.evaluation.compare --source runs/embedded --merged runs/embedded/merged",
    )
    add_option(parser, "--source", place, required=True, help="run directory, checkpoint or adapter folder")
    add_option(
        parser,
        "--merged",
        place,
        required=True,
        action="append",
        help="folder of a merged model; may be repeated",
    )
    parser.add_argument(
        "--both-bases",
        action="store_true",
        help="merge onto the other base too (original or dequantized), compare it, and remove it",
    )
    add_option(
        parser,
        "--samples",
        whole,
        1,
        10**9,
        default=DEFAULT_SAMPLES,
        help=f"validation samples (default: {DEFAULT_SAMPLES})",
    )
    add_option(parser, "--run-dir", place, help="the run whose recipe names the data (default: the source's)")
    add_adapter_options(parser)
    add_allow(parser)
    options = parser.parse_args(arguments)
    setup_logging()
    try:
        comparison = compare(_request(options))
    except SamestepError as error:
        return print_error(error)
    print_comparison(comparison, Console(highlight=False, soft_wrap=True))
    for folder in options.merged:
        keep_comparison(comparison, folder)
    return 0


def keep_comparison(comparison: MergeComparison, merged: Path) -> None:
    """Write a comparison beside the record of a merge of ours. A folder that cannot be written costs another
    comparison, nothing else.
    """
    if (merged / RECORD).is_file():
        with suppress(OSError):
            atomic_write(merged / COMPARISON, json.dumps(asdict(comparison), indent=1) + "\n")


def _request(options: argparse.Namespace) -> ComparisonRequest:
    source, missing = options.source.expanduser().absolute(), missing_of(options)
    adapter = read_adapter(source, missing)
    recipe_file = recipe_file_of(source, options.run_dir)
    base = find_base(adapter, missing.base_model)
    check_base(adapter, base, options.allow)
    return ComparisonRequest(
        source=source,
        adapter=adapter,
        base=base,
        merged=tuple(folder.expanduser().absolute() for folder in options.merged),
        recipe=load_recipe(recipe_file),
        samples=options.samples,
        recipe_file=recipe_file,
        missing=missing,
        both_bases=options.both_bases,
        allow=tuple(options.allow),
    )


if __name__ == "__main__":
    sys.exit(main())
