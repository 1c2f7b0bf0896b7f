"""Answers a second, of base and adapter: as `samestep evaluate` gives them, and by plain `model.generate`.

    python benchmarks/evaluation.py --folder /tmp/bench                          # 7B shape, random weights, on a GPU
    python benchmarks/evaluation.py --shape tiny --questions 8 --folder /tmp/bench   # a smoke run, also on a CPU

Random weights end no answer: every one has as many new tokens as the recipe allows (32). Both models answer every
question, so there are twice as many answers as questions. Each way is timed after loading, and after one batch that is
not counted; `plain` are calls on the same weights as transformers' documentation has them, images included.
The answers of our way, and of plain batches, are compared with those of plain calls one at a time: kernels of other
shapes round otherwise in bfloat16, and the logits of random weights lie close together.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from benchmarks.random_base import RECIPE, build, recipe_settings
from launch.errors import SamestepError
from launch.recipe.loading import dump_recipe, find_recipe, load_recipe
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from trainer.data.encoder import Encoder
from trainer.data.images import decode_image
from trainer.data.splits import Rows, open_split
from trainer.evaluation.loading import answering_as, load_with_adapters, replica_of
from trainer.evaluation.questions import make_batches
from trainer.evaluation.request import EvaluationRequest, Variant, variants_of
from trainer.formats.portable import save_adapter
from trainer.generation.replica import greedy
from trainer.logging_setup import print_error, setup_logging
from trainer.model.base import RECIPE_DTYPES, load_base
from trainer.model.lora import add_lora
from trainer.pretrained import load_processor

Way = Callable[[Variant, Sequence[int]], list[str]]


def main() -> int:
    """Command line; prints one line of JSON for each way."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/evaluation.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="where weights and charts lie, or are built"
    )
    parser.add_argument(
        "--shape", choices=["7b", "tiny"], default="7b", help="of the random base (default: 7b)"
    )
    parser.add_argument("--questions", type=int, default=192, help="of the training split (default: 192)")
    parser.add_argument("--batch", type=int, default=64, help="prompts together, ours (default: 64)")
    parser.add_argument("--plain", type=int, default=24, help="questions of the plain ways (default: 24)")
    options = parser.parse_args()
    options.steps = 8  # of the charts that `build` writes: 256 rows
    setup_logging()
    build(options)
    try:
        measure(options)
    except SamestepError as error:
        return print_error(error)
    return 0


def measure(options: argparse.Namespace) -> None:
    """Ours in batches, plain one at a time, plain in batches of 8."""
    words = recipe_settings(options.folder, options.steps, [])
    recipe = load_recipe(find_recipe(RECIPE), [word for word in words if word != "--set"])
    run = RunDirectory(options.folder / f"run-{options.shape}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_run(recipe, run, device)
    variants = variants_of(EvaluationRequest(run, "train", ("base", "adapter"), None), recipe)
    began = time.perf_counter()
    model = load_with_adapters(recipe, device, variants)
    print(
        json.dumps({"loading": round(time.perf_counter() - began, 1), "device": describe(device)}), flush=True
    )
    processor, rows = load_processor(recipe), open_split(recipe, "train")
    encoder = Encoder(processor, recipe.data.system_message, recipe.data.loss)
    prompts = [encoder.texts(rows[number])[0] for number in range(options.questions)]
    dtype = RECIPE_DTYPES[recipe.quantization.bnb_4bit_compute_dtype]

    def plain(variant: Variant, numbers: Sequence[int]) -> list[str]:
        return plain_answers(model, processor, recipe, rows, [prompts[n] for n in numbers], numbers)

    few = min(options.plain, options.questions)
    answers = {"plain": timed("plain, one at a time", plain, model, variants, batched(few, 1))}
    answers["plain by 8"] = timed("plain, batches of 8", plain, model, variants, batched(few, 8))
    # Last: it prepares the model, which makes plain calls faster too.
    replica = replica_of(model, processor, rows, recipe.evaluation.max_new_tokens, dtype)

    def ours(variant: Variant, numbers: Sequence[int]) -> list[str]:
        return replica.answers([prompts[n] for n in numbers], numbers)

    batches = make_batches([visual_size(rows[n].images[0]) for n in range(options.questions)], options.batch)

    def begin() -> None:
        replica.features.forget()
        replica.look_ahead(number for batch in batches for number in batch)

    answers["ours"] = timed(f"ours, by {replica.way}", ours, model, variants, batches, begin)
    replica.features.stop()
    same = {
        way: sum(
            answers[way][name][number] == answer
            for name in ("base", "adapter")
            for number, answer in answers["plain"][name].items()
        )
        for way in ("plain by 8", "ours")
    }
    print(json.dumps({"as plain ones one at a time": same, "of": 2 * few}), flush=True)


def batched(questions: int, size: int) -> list[list[int]]:
    """Their numbers in order, so many at a time."""
    return [list(range(begin, min(begin + size, questions))) for begin in range(0, questions, size)]


def visual_size(image: bytes) -> int:
    """Pixels, which the length of a prompt goes by; of the header alone."""
    width, height = Image.open(io.BytesIO(image)).size
    return int(width * height)


def timed(
    name: str,
    way: Way,
    model: Any,
    variants: Sequence[Variant],
    batches: Sequence[Sequence[int]],
    begin: Callable[[], None] = lambda: None,
) -> dict[str, dict[int, str]]:
    """Put every question to both, in batches, and print how fast that was; the answers by question."""
    found: dict[str, dict[int, str]] = {variant.name: {} for variant in variants}
    with answering_as(model, variants[0]):
        way(variants[0], batches[-1])  # kernels are chosen and compiled
    synchronize()
    began = time.perf_counter()
    begin()
    for numbers in batches:
        for variant in variants:
            with answering_as(model, variant):
                found[variant.name] |= zip(numbers, way(variant, numbers), strict=True)
    synchronize()
    seconds = time.perf_counter() - began
    answers = sum(map(len, batches)) * len(variants)
    values = {
        "answers": answers,
        "seconds": round(seconds, 2),
        "answers_per_second": round(answers / seconds, 2),
    }
    print(json.dumps({"way": name, "batch": len(batches[0]), **values, **peak()}), flush=True)
    return found


@torch.no_grad()
def plain_answers(
    model: Any, processor: Any, recipe: Recipe, rows: Rows, prompts: Sequence[str], numbers: Sequence[int]
) -> list[str]:
    """As the documentation of transformers has it, with images in every call."""
    images = [decode_image(rows[number].images[0]) for number in numbers]
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = processor(
        text=list(prompts), images=images, padding=True, return_tensors="pt", add_special_tokens=False
    ).to(base.device)
    dtype = RECIPE_DTYPES[recipe.quantization.bnb_4bit_compute_dtype]
    with torch.autocast(base.device.type, dtype):
        config = greedy(base, processor, recipe.evaluation.max_new_tokens)
        output = model.generate(**inputs, generation_config=config)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def write_run(recipe: Recipe, run: RunDirectory, device: torch.device) -> None:
    """A run with an adapter of random numbers, unless it is there."""
    if run.adapter.is_dir():
        return
    run.path.mkdir(parents=True, exist_ok=True)
    run.recipe_file.write_text(dump_recipe(recipe))
    model = add_lora(load_base(recipe, device), recipe)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.02).to(device)
    save_adapter(model, run.adapter)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak() -> dict[str, float]:
    """GiB that PyTorch has had at most."""
    if not torch.cuda.is_available():
        return {}
    return {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)}


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    sys.exit(main())
