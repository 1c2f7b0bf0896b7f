"""The logits of a merged model beside those of base + adapter: what merging changed.

    python -m trainer.evaluation.compare --source SOURCE --merged DIR [--samples N] [--run-dir RUN] [--base BASE]

On samples of the validation split, at the positions that predict the answer (its true tokens are given, nothing is
generated). The unmerged model is the unquantized base in the merged model's dtype plus the adapter: what differs is
rounding. When the recipe trains in 4 bits, the quantized base plus the adapter is shown too: that difference is the
price of leaving the quantized weights the adapter was trained on.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from launch.errors import CheckpointError, ConfigError, SamestepError
from launch.index import read_index
from launch.recipe import Recipe, load_recipe
from trainer.checkpoint.adapter import find_adapter, read_adapter
from trainer.checkpoint.merge import find_base
from trainer.data.chartqa import Row, decode_image, open_split
from trainer.data.collate import Encoder
from trainer.evaluation.answers import spread
from trainer.model.base import load_base
from trainer.prepare import prepare
from trainer.pretrained import load_processor
from trainer.speech import complain, speak_plainly

DEFAULT_SAMPLES = 32
Loader = Callable[[], torch.nn.Module]


@dataclass(frozen=True)
class Request:
    """What is compared: the adapter folder and its base, the merged model, on which recipe's data."""

    adapter: Path
    base: Path
    merged: Path
    recipe: Recipe
    samples: int


@dataclass(frozen=True)
class Difference:
    """Of the merged model's logits from another's, over all answer positions and the whole vocabulary.

    `largest`, `mean`: absolute; `logit_range`: largest minus smallest logit of the other model, to read them by;
    `agreement`: share of positions at which both put the same token first.
    """

    largest: float
    mean: float
    logit_range: float
    agreement: float


@dataclass(frozen=True)
class Comparison:
    """Merged against unmerged, and against the quantized base + adapter when the recipe is quantized."""

    samples: int
    positions: int
    dtype: str
    unmerged: Difference
    quantized: Difference | None


def compare(request: Request) -> Comparison:
    """Load one model after the other, keep the logits at the answers, and compare."""
    processor = load_processor(request.recipe)
    rows = validation_rows(request)
    dtype = stored_dtype(request.merged)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def plain(folder: Path) -> Qwen2VLForConditionalGeneration:
        return cast(
            Qwen2VLForConditionalGeneration,
            Qwen2VLForConditionalGeneration.from_pretrained(
                folder,
                dtype=dtype,
                device_map={"": device},
                attn_implementation="sdpa",
                local_files_only=True,
            ),
        )

    loaders: dict[str, Loader] = {
        "merged": lambda: plain(request.merged),
        "base + adapter": lambda: with_adapter(plain(request.base), request.adapter),
    }
    if request.recipe.quantization.load_in_4bit:
        loaders["4-bit base + adapter"] = lambda: with_adapter(
            load_base(request.recipe, device), request.adapter
        )
    logits: dict[str, Tensor] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name, load in loaders.items():
            task = progress.add_task(f"logits of {name}", total=len(rows))
            model = load().eval()
            parts = []
            for row in rows:
                parts.append(answer_logits(model, processor, request.recipe, row, dtype))
                progress.advance(task)
            logits[name] = torch.cat(parts)
            del model
            gc.collect()
    merged, quantized = logits["merged"], logits.get("4-bit base + adapter")
    return Comparison(
        samples=len(rows),
        positions=len(merged),
        dtype=str(dtype).removeprefix("torch."),
        unmerged=difference(merged, logits["base + adapter"]),
        quantized=None if quantized is None else difference(merged, quantized),
    )


def with_adapter(base: Qwen2VLForConditionalGeneration, folder: Path) -> torch.nn.Module:
    """PEFT's own loading, which says nothing about keys that match no layer: counted here."""
    model = PeftModel.from_pretrained(base, str(folder))
    loaded = sum(bool(weight.any()) for name, weight in model.named_parameters() if ".lora_B." in name)
    wanted = len(read_adapter(folder).pairs)
    if loaded != wanted:
        raise CheckpointError(
            f"{folder}: PEFT loaded {loaded} of {wanted} lora pairs into the base; "
            "its keys are of another transformers version, so there is no unmerged model to compare with"
        )
    return cast(torch.nn.Module, model)


def validation_rows(request: Request) -> list[Row]:
    """Rows of the validation split, evenly spaced over it."""
    index = read_index(request.recipe) or prepare(request.recipe)
    numbers = index.splits["validation"].rows
    if not len(numbers):
        raise ConfigError("data.validation: has no rows to compare on; correct the split")
    rows = open_split(request.recipe, "validation")
    return [rows[int(numbers[position])] for position in spread(len(numbers), request.samples)]


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that config.json of a merged model names."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"--merged: no config.json in {folder}; give the folder of a merged model"
        ) from None
    name = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype")
    return cast(torch.dtype, getattr(torch, name or "float32"))


@torch.inference_mode()
def answer_logits(
    model: torch.nn.Module, processor: Qwen2VLProcessor, recipe: Recipe, row: Row, dtype: torch.dtype
) -> Tensor:
    """fp32 logits [answer tokens, vocabulary] on the CPU, each row predicting one token of the row's answer."""
    encoder = Encoder(processor, recipe.data.system_message, recipe.data.loss)
    prompt, text = encoder.texts(row)
    device = next(model.parameters()).device
    inputs = processor(
        text=[text], images=[decode_image(row.image)], return_tensors="pt", add_special_tokens=False
    ).to(device)
    begin = encoder.prompt_length(prompt, inputs["input_ids"][0].cpu())
    with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[0, begin - 1 : -1].float().cpu()


def difference(merged: Tensor, other: Tensor) -> Difference:
    """Both [positions, vocabulary]."""
    gap = (merged - other).abs()
    return Difference(
        largest=float(gap.max()),
        mean=float(gap.mean()),
        logit_range=float(other.max() - other.min()),
        agreement=float((merged.argmax(-1) == other.argmax(-1)).float().mean()),
    )


def print_comparison(comparison: Comparison, console: Console) -> None:
    """A table for people, then one line of JSON for programs."""
    title = (
        f"logits of the merged model ({comparison.dtype}) at {comparison.positions} answer tokens "
        f"of {comparison.samples} validation samples"
    )
    table = Table(title=title, title_justify="left")
    for column in ("against", "largest difference", "mean difference", "logit range", "same first token"):
        table.add_column(column, justify="left" if column == "against" else "right")
    against = {"base + adapter, unmerged": comparison.unmerged, "4-bit base + adapter": comparison.quantized}
    for name, found in against.items():
        if found is not None:
            table.add_row(
                name,
                f"{found.largest:.3g}",
                f"{found.mean:.3g}",
                f"{found.logit_range:.3g}",
                f"{100 * found.agreement:.1f} %",
            )
    console.print(table)
    console.print(json.dumps(asdict(comparison)), markup=False)


def recipe_of(source: Path, run_dir: Path | None) -> Recipe:
    """The recipe of the run that `source` is or lies in, or of `run_dir`."""
    folders = [run_dir] if run_dir else [source, source.parent]
    for folder in folders:
        if (folder / "recipe.yaml").is_file():
            return load_recipe(folder / "recipe.yaml")
    raise ConfigError(
        f"{run_dir or source}: no recipe.yaml, which names the data to compare on; "
        "give the run's directory with --run-dir"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluation.compare",
        description="Compare the logits of a merged model with those of its base and adapter.",
        epilog="example: python -m trainer.evaluation.compare --source runs/embedded --merged runs/embedded/merged",
    )
    parser.add_argument(
        "--source", type=Path, required=True, help="run directory, checkpoint or adapter folder"
    )
    parser.add_argument("--merged", type=Path, required=True, help="folder of the merged model")
    parser.add_argument(
        "--samples", type=int, default=DEFAULT_SAMPLES, help="validation samples (default: 32)"
    )
    parser.add_argument(
        "--run-dir", type=Path, help="the run whose recipe names the data (default: the source's)"
    )
    parser.add_argument("--base", help="folder or hub id of the unquantized base; default: the adapter's")
    given = parser.parse_args(arguments)
    if given.samples < 1:
        parser.error(f"--samples: {given.samples} compares nothing; give at least 1")
    speak_plainly()
    try:
        source = given.source.expanduser().absolute()
        adapter = find_adapter(source)
        request = Request(
            adapter=adapter,
            base=find_base(read_adapter(adapter), given.base),
            merged=given.merged.expanduser().absolute(),
            recipe=recipe_of(source, given.run_dir),
            samples=given.samples,
        )
        comparison = compare(request)
    except SamestepError as error:
        return complain(error)
    print_comparison(comparison, Console(highlight=False, soft_wrap=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
