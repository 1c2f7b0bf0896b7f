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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
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
from launch.option_values import for_argparse, place, whole
from launch.recipe.loading import load_recipe
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from launch.run.merged_model import COMPARISON, RECORD
from launch.untrusted_files import TABLE, UNREADABLE, printable, read_mapping
from trainer.data.encoder import Encoder
from trainer.data.images import decode_image
from trainer.data.row_errors import naming_row
from trainer.data.rows import Row
from trainer.data.splits import open_split
from trainer.evaluation.answers import Replica, spread
from trainer.evaluation.comparison import (
    QUANTIZED,
    UNMERGED,
    Compared,
    Comparison,
    Seen,
    answered,
    difference,
    print_comparison,
)
from trainer.evaluation.loading import with_named_targets
from trainer.evaluation.metric_functions import Metrics, load_metrics
from trainer.export.adapter import Adapter, AdapterOverrides, read_adapter
from trainer.export.base_model import add_allow, check_base, find_base, run_containing
from trainer.export.consolidate import add_adapter_options, missing_of, write_adapter
from trainer.export.merge import merge, print_report
from trainer.export.merge_plan import BaseKind, DtypeChoice, MergeRequest
from trainer.formats.validated import read_json
from trainer.logging_setup import print_error, setup_logging
from trainer.model.base import load_base
from trainer.prepare import prepare
from trainer.pretrained import load_processor, model_class_of

BATCH = 8  # of generated answers
DEFAULT_SAMPLES = 32
Loader = Callable[[], torch.nn.Module]


@dataclass(frozen=True)
class Request:
    """What is compared: an adapter and its base, the merged models, on which recipe's data.

    `both_bases`: make the merge onto the other base too (original or dequantized), compare it, and remove it.
    """

    source: Path
    adapter: Adapter
    base: Path
    merged: tuple[Path, ...]
    recipe: Recipe
    samples: int
    recipe_file: Path
    missing: AdapterOverrides
    both_bases: bool = False
    allow: tuple[str, ...] = ()


def compare(request: Request) -> Comparison:
    """Load one model after the other, keep logits and answers, and compare."""
    with _merged_folders(request) as folders, TemporaryDirectory() as adapter:
        write_adapter(
            with_named_targets(request.adapter), Path(adapter)
        )  # as PEFT's present version reads it
        return _compare(request, folders, Path(adapter))


def _compare(request: Request, folders: dict[str, Path], adapter: Path) -> Comparison:
    dtype = stored_dtype(request.merged[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def plain(folder: Path) -> PreTrainedModel:
        return model_class_of(folder).from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
        )

    pairs = len(request.adapter.pairs)
    loaders: dict[str, Loader] = {name: partial(plain, folder) for name, folder in folders.items()}
    loaders[UNMERGED] = lambda: with_adapter(plain(request.base), adapter, pairs)
    if request.recipe.quantization.load_in_4bit:
        loaders[QUANTIZED] = lambda: with_adapter(load_base(request.recipe, device), adapter, pairs)
    seen, rows = _look(request, loaders, dtype)
    reference = QUANTIZED if QUANTIZED in seen else UNMERGED
    metrics = metrics_of(request.recipe, rows)
    return Comparison(
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
    request: Request, loaders: Mapping[str, Loader], dtype: torch.dtype
) -> tuple[dict[str, Seen], list[Row]]:
    """Every model's logits and answers, one model in memory at a time; and the rows they are of."""
    processor = load_processor(request.recipe)
    numbers = validation_numbers(request)
    source = open_split(request.recipe, "validation")
    rows = [source[number] for number in numbers]
    metrics_of(
        request.recipe, rows
    )  # a function of the user's own that cannot be loaded: before any model is
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


@contextmanager
def _merged_folders(request: Request) -> Iterator[dict[str, Path]]:
    """The merged models by a name that says their base; with `both_bases` the other one is made meanwhile."""
    folders = {f"merged, {kind_of(folder)}": folder for folder in request.merged}
    if len(folders) < len(request.merged):
        raise CheckpointError(
            f"--merged: {len(request.merged)} folders of the same kind of base; give one of each kind"
        )
    if not request.both_bases or not request.recipe.quantization.load_in_4bit:
        yield folders
        return
    first = request.merged[0]
    other: BaseKind = "original" if kind_of(first) == "dequantized" else "dequantized"
    dtype = cast(DtypeChoice, str(stored_dtype(first)).removeprefix("torch."))
    with _room_beside(first) as room:
        twin = Path(room, first.name)
        print_report(
            merge(
                MergeRequest(
                    request.source, twin, other, dtype, request.recipe_file, request.missing, request.allow
                )
            ),
            Console(highlight=False, soft_wrap=True),
        )
        yield {**folders, f"merged, {other}": twin}


def _room_beside(folder: Path) -> TemporaryDirectory[str]:
    """A folder of our own on the same disk, which no other attempt and no user has made."""
    try:
        return TemporaryDirectory(prefix=f"{folder.name}.other-base-", dir=folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"{folder.parent}: cannot be written to ({error.strerror}); the merge onto the other base needs a place "
            "there, compare without it"
        ) from error


def kind_of(folder: Path) -> str:
    """`original` or `dequantized`, as the merge recorded it; the folder's name where nothing is recorded."""
    try:
        return printable(str(read_mapping(folder / RECORD, TABLE)["base"]))
    except (*UNREADABLE, KeyError):
        return folder.name


def with_adapter(base: PreTrainedModel, folder: Path, wanted: int) -> torch.nn.Module:
    """PEFT's own loading, which says nothing about keys that match no layer: counted here."""
    model = PeftModel.from_pretrained(base, str(folder))
    loaded = sum(bool(weight.any()) for name, weight in model.named_parameters() if ".lora_B." in name)
    if loaded != wanted:
        raise CheckpointError(
            f"{folder}: PEFT loaded {loaded} of {wanted} lora pairs into the base; "
            "its keys are of another transformers version, so there is no unmerged model to compare with"
        )
    return cast(torch.nn.Module, model)


def validation_numbers(request: Request) -> list[int]:
    """Numbers of rows of the validation split, evenly spaced over it."""
    index = read_index(request.recipe) or prepare(request.recipe)
    numbers = index.splits["validation"].rows
    if not len(numbers):
        raise ConfigError("data.validation: has no rows to compare on; correct the split")
    return [int(numbers[position]) for position in spread(len(numbers), request.samples)]


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that config.json of a merged model names."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"--merged: no config.json in {folder}; give the folder of a merged model")
    config = read_json(folder / "config.json")
    name = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    return cast(torch.dtype, getattr(torch, name or "float32"))


@torch.inference_mode()
def answer_logits(
    model: torch.nn.Module, processor: ProcessorMixin, recipe: Recipe, row: Row, dtype: torch.dtype
) -> Tensor:
    """fp32 logits [answer tokens, vocabulary] on the CPU, each row predicting one token of the row's answer."""
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


def recipe_file_of(source: Path, run_dir: Path | None) -> Path:
    """The recipe of the run that `source` is or lies in, or of `run_dir`."""
    run = RunDirectory(run_dir) if run_dir else run_containing(source)
    if run is not None and run.recipe_file.is_file():
        return run.recipe_file
    raise ConfigError(
        f"{run_dir or source}: no recipe.yaml, which names the data to compare on; "
        "give the run's directory with --run-dir"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluation.compare",
        description="Compare merged models with their base and adapter: logits, answers, accuracy.",
        epilog="example: python -m trainer.evaluation.compare --source runs/embedded --merged runs/embedded/merged",
    )
    parser.add_argument(
        "--source",
        type=for_argparse(place("--source")),
        required=True,
        help="run directory, checkpoint or adapter folder",
    )
    parser.add_argument(
        "--merged",
        type=for_argparse(place("--merged")),
        required=True,
        action="append",
        help="folder of a merged model; may be repeated",
    )
    parser.add_argument(
        "--both-bases",
        action="store_true",
        help="merge onto the other base too (original or dequantized), compare it, and remove it",
    )
    parser.add_argument(
        "--samples",
        type=for_argparse(whole("--samples", 1, 10**9)),
        default=DEFAULT_SAMPLES,
        help=f"validation samples (default: {DEFAULT_SAMPLES})",
    )
    parser.add_argument(
        "--run-dir",
        type=for_argparse(place("--run-dir")),
        help="the run whose recipe names the data (default: the source's)",
    )
    add_adapter_options(parser)
    add_allow(parser)
    given = parser.parse_args(arguments)
    setup_logging()
    try:
        comparison = compare(_request(given))
    except SamestepError as error:
        return print_error(error)
    print_comparison(comparison, Console(highlight=False, soft_wrap=True))
    for folder in given.merged:
        keep_comparison(comparison, folder)
    return 0


def keep_comparison(comparison: Comparison, merged: Path) -> None:
    """Beside the record of a merge of ours. A folder that cannot be written costs another comparison, nothing else."""
    if (merged / RECORD).is_file():
        with suppress(OSError):
            atomic_write(merged / COMPARISON, json.dumps(asdict(comparison), indent=1) + "\n")


def _request(given: argparse.Namespace) -> Request:
    source, missing = given.source.expanduser().absolute(), missing_of(given)
    adapter = read_adapter(source, missing)
    recipe_file = recipe_file_of(source, given.run_dir)
    base = find_base(adapter, missing.base_model)
    check_base(adapter, base, given.allow)
    return Request(
        source=source,
        adapter=adapter,
        base=base,
        merged=tuple(folder.expanduser().absolute() for folder in given.merged),
        recipe=load_recipe(recipe_file),
        samples=given.samples,
        recipe_file=recipe_file,
        missing=missing,
        both_bases=given.both_bases,
        allow=tuple(given.allow),
    )


if __name__ == "__main__":
    sys.exit(main())
