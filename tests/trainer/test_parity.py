"""Our numbers are those of transformers and PEFT alone, one sample at a time, from image files of every size, for every
family.

The stock side knows nothing of ours: Pillow opens the files, `AutoProcessor` and `AutoModelForImageTextToText` do the
rest, and the mask is found in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from launch.inputs.families import FAMILIES
from launch.planning.step_plan import MicroBatch
from launch.recipe.loading import recipe_from_dict
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from tests.conftest import recipe_values
from tests.helpers.adapters import random_adapter, write_run
from tests.helpers.tiny_families import write_tiny
from trainer.data.encoder import Encoder
from trainer.data.micro_batches import assemble
from trainer.data.packing import pack
from trainer.data.rows import question_row
from trainer.data.splits import open_split
from trainer.generation.replica import Replica
from trainer.model.base import prepare_training
from trainer.model.lora import trainable_parameters
from trainer.prepare import prepare
from trainer.pretrained import load_processor

SIZES = (
    (1, 1), (1, 3), (3, 1), (3, 3), (2, 2), (1, 200), (200, 1), (5, 900),
    (13, 7), (27, 27), (28, 28), (29, 29), (27, 57), (56, 56), (57, 55), (14, 140),
    (64, 64), (100, 30), (42, 84), (97, 131), (112, 56), (140, 139), (168, 112), (199, 301),
    (224, 224), (333, 77), (300, 300), (420, 300), (512, 384), (800, 557), (640, 1136), (2400, 1800),
)  # fmt: skip
"""Width and height: needles up to the processor's limit, sizes beside its multiples of 28, and beyond its bounds."""
MODES = ("turned", "L", "RGBA", "P", "LA", "CMYK")
NEW_TOKENS = 4


def _write_images(folder: Path) -> list[Path]:
    """A drawing of every size, each in one of the modes that files have."""
    folder.mkdir()
    files = []
    for number, (width, height) in enumerate(SIZES):
        image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
        canvas = ImageDraw.Draw(image)
        for bar in range(5):
            left, top = bar * width // 5, (number * 7 + bar * 31) % (height + 1)
            colour = tuple((number * 37 + bar * 91 + channel * 53) % 256 for channel in range(3))
            canvas.rectangle((left, top, left + width // 7, height), fill=colour)
        files.append(_save(image, MODES[number % len(MODES)], folder / f"{width}x{height}"))
    return files


def _save(image: Image.Image, mode: str, place: Path) -> Path:
    """Write a file in `mode`; `turned`: a JPEG that its EXIF tag turns by 90 degrees."""
    if mode == "turned":
        exif = Image.Exif()
        exif[0x112] = 6
        image.save(file := place.with_suffix(".jpg"), exif=exif)
        return file
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").rotate(90).resize(image.size))
    image.convert(mode).save(file := place.with_suffix(".tiff" if mode == "CMYK" else ".png"))
    return file


class Stock:
    """The plain way: one image file, one question, one forward."""

    def __init__(self, base: Path, adapter: Path, system_message: str) -> None:
        self.processor = AutoProcessor.from_pretrained(base)
        plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(plain, str(adapter)).eval()
        self.system_message = system_message

    def inputs(self, files: Sequence[Path], question: str, answer: str | None) -> Any:
        chat = [
            {"role": "system", "content": [{"type": "text", "text": self.system_message}]},
            {
                "role": "user",
                "content": [*[{"type": "image"}] * len(files), {"type": "text", "text": question}],
            },
        ]
        if answer is not None:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer is None)
        images = [ImageOps.exif_transpose(Image.open(file)) for file in files]
        return self.processor(text=[text], images=images or None, return_tensors="pt")

    def loss(self, files: Sequence[Path], question: str, answer: str) -> Tensor:
        """Summed over what follows `<|im_start|>assistant` and its line break."""
        inputs = self.inputs(files, question, answer)
        ids = inputs["input_ids"][0]
        opening = self.processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
        begin = max(
            place for place in range(len(ids)) if ids[place : place + len(opening)].tolist() == opening
        ) + len(opening)
        logits = self.model(**inputs).logits[0]
        return cross_entropy(logits[begin - 1 : -1], ids[begin:], reduction="sum")

    @torch.no_grad()
    def answer(self, file: Path, question: str) -> str:
        inputs = self.inputs([file], question, None)
        ids = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.decode(new, skip_special_tokens=True)).strip()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def files(kind: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return _write_images(tmp_path_factory.mktemp("parity") / "images")


@pytest.fixture(scope="module")
def recipe(kind: str, world: Path, files: list[Path]) -> Recipe:
    """Random weights large enough that the picture decides the answer, and transformers' own bounds of pixels."""
    folder = files[0].parent.parent
    write_tiny(kind, folder / "base", seed=1, initializer_range=0.08, max_tokens=1280)
    rows = [
        {
            "image": {"bytes": file.read_bytes(), "path": None},
            "query": f"How high is bar {number}" + "?" * (number % 4 + 1),
            "label": [("7", "Yes", "the blue one", "12.5")[number % 4]],
            "human_or_machine": number % 2,
        }
        for number, file in enumerate(files)
    ]
    (folder / "charts").mkdir()
    for split, count in (("train", len(rows)), ("val", 1), ("test", 1)):
        pq.write_table(pa.Table.from_pylist(rows[:count]), folder / "charts" / f"{split}.parquet")
    values = recipe_values(world)
    values["model"]["name_or_path"] = str(folder / "base")
    values["data"]["dataset"] = str(folder / "charts")
    return recipe_from_dict(values)


@pytest.fixture(scope="module")
def run(recipe: Recipe, files: list[Path]) -> RunDirectory:
    return write_run(recipe, files[0].parent.parent / "run")


@pytest.fixture(scope="module")
def stock(recipe: Recipe, run: RunDirectory) -> Stock:
    return Stock(Path(recipe.model.name_or_path), run.adapter, recipe.data.system_message)


def _questions(recipe: Recipe) -> list[tuple[str, str]]:
    rows = open_split(recipe, "train")
    return [(rows[number].query, rows[number].label[0]) for number in range(len(rows))]


@torch.no_grad()
def test_packed_losses_are_those_of_the_stock_model_on_each_image_file_alone(
    recipe: Recipe, files: list[Path], stock: Stock
) -> None:
    asked = _questions(recipe)
    alone = torch.tensor(
        [float(stock.loss([file], *texts)) for file, texts in zip(files, asked, strict=True)],
        dtype=torch.float64,
    )
    split = prepare(recipe, quiet=True).splits["train"]
    encoder = Encoder(load_processor(recipe), recipe.data.system_message, "answer")
    model, rows = random_adapter(recipe), open_split(recipe, "train")
    prepare_training(model, recipe)
    model.eval()  # no dropout, which the stock model draws otherwise
    together = torch.empty_like(alone)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    for begin in range(0, len(order), 8):
        samples = tuple(order[begin : begin + 8])
        batch = assemble(rows, split, encoder, MicroBatch(samples, filler=False), 0, 1)
        inputs = dict(batch["inputs"])
        labels = inputs.pop("shift_labels")[0]
        with torch.no_grad():
            losses = cross_entropy(model(**inputs).logits[0], labels, reduction="none")
        parts = losses.split(split.target_tokens[list(samples)].tolist())
        together[list(samples)] = torch.stack([part.sum() for part in parts]).double()
    off = (together - alone).abs() / alone
    assert off.max() <= 1e-5, [(SIZES[number], float(off[number])) for number in off.argsort()[-3:]]
    swapped = [float(stock.loss([files[number - 1]], *asked[number])) for number in range(12)]
    apart = (torch.tensor(swapped) - alone[:12]).abs() / alone[:12]
    assert (apart > 1e-4).all()  # another picture is another loss: what is compared hangs on the image


@torch.no_grad()
def test_packed_rows_of_none_to_three_images_have_the_losses_of_the_stock_model(
    recipe: Recipe, files: list[Path], stock: Stock
) -> None:
    groups = [(), (20,), (12, 3), (18, 9, 18), (27, 24)]
    questions = _questions(recipe)
    processor = load_processor(recipe)
    encoder = Encoder(processor, recipe.data.system_message, "answer")
    samples = [
        encoder(question_row([files[image].read_bytes() for image in images], query, [answer]))
        for images, (query, answer) in zip(groups, questions, strict=False)
    ]
    model = random_adapter(recipe)
    prepare_training(model, recipe)
    inputs = pack(
        samples,
        sample_ids=range(len(samples)),
        step=0,
        masked=False,
        image_token_id=processor.image_token_id,
        merge=processor.image_processor.merge_size,
    )
    parts = model.eval()(**inputs).log_probs[0].split([sample.target_tokens for sample in samples])
    for images, part, question in zip(groups, parts, questions, strict=False):
        alone = stock.loss([files[image] for image in images], *question)
        assert float(-part.sum()) == pytest.approx(float(alone), rel=1e-5), images


REACH = {"qwen2_vl": ["qkv", "fc2", "merger.mlp.0"], "qwen2_5_vl": ["qkv", "visual.blocks.0.mlp.up_proj", "mlp.2"],
         "qwen3_vl": ["attn.proj", "linear_fc1"]}  # fmt: skip
"""Layers of each tower, in blocks and mergers, that LoRA is put on besides those of the decoder."""


def _reaching(recipe: Recipe, kind: str) -> Recipe:
    """LoRA on the decoder and the tower, of several ranks and scales, without dropout."""
    lora = {
        "target_modules": ["q_proj", "up_proj", *REACH[kind]],
        "lora_dropout": 0.0,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"layers.1.mlp.up_proj": 3},
    }
    return recipe_from_dict(recipe.model_dump(mode="json") | {"lora": lora})


@pytest.mark.parametrize("dora", [False, True])
def test_the_gradients_of_a_step_are_those_of_the_stock_model(
    kind: str, recipe: Recipe, files: list[Path], dora: bool, tmp_path: Path
) -> None:
    recipe = _reaching(recipe, kind)
    recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"use_dora": dora})})
    run = write_run(recipe, tmp_path / "run")
    stock = Stock(Path(recipe.model.name_or_path), run.adapter, recipe.data.system_message)
    numbers = (18, 3, 17, 14, 9, 20)
    questions, split = _questions(recipe), prepare(recipe, quiet=True).splits["train"]
    count = int(split.target_tokens[list(numbers)].sum())
    expected = {
        name: each.requires_grad_() for name, each in stock.model.named_parameters() if "lora_" in name
    }
    for number in numbers:
        (stock.loss([files[number]], *questions[number]) / count).backward()
    encoder = Encoder(load_processor(recipe), recipe.data.system_message, "answer")
    model, rows = random_adapter(recipe).train(), open_split(recipe, "train")
    prepare_training(model, recipe, recompute_every=2)
    for samples in (numbers[:4], numbers[4:]):
        inputs = assemble(rows, split, encoder, MicroBatch(samples, filler=False), 0, 1)["inputs"]
        (-model(**inputs).log_probs.sum() / count).backward()
    trained = trainable_parameters(model)
    assert trained.keys() == expected.keys()
    assert sum(".visual." in name for name in trained) >= 2 * len(REACH[kind])
    for name, parameter in trained.items():
        wanted = expected[name].grad
        assert (parameter.grad - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max())), name


def test_the_gradients_of_a_step_are_those_of_trl_with_its_own_collator(
    recipe: Recipe, files: list[Path], tmp_path: Path
) -> None:
    """Padded by trl, packed by us; the tokens of the answers are the targets of both."""
    lora = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
    recipe = recipe_from_dict(recipe.model_dump(mode="json") | {"lora": lora})
    run = write_run(recipe, tmp_path / "run")
    stock = Stock(Path(recipe.model.name_or_path), run.adapter, recipe.data.system_message)
    groups = [(20,), (3, 9), (14,), (17,)]  # none that an EXIF tag turns: trl leaves that to its user
    questions = _questions(recipe)
    batch = DataCollatorForVisionLanguageModeling(stock.processor, completion_only_loss=True)(
        [
            {
                "images": [Image.open(files[image]) for image in images],
                "prompt": [
                    {"role": "system", "content": recipe.data.system_message},
                    {"role": "user", "content": query},
                ],
                "completion": [{"role": "assistant", "content": answer}],
            }
            for images, (query, answer) in zip(groups, questions, strict=False)
        ]
    )
    for name, parameter in stock.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    loss = stock.model(**batch).loss
    loss.backward()
    expected = {name: each.grad for name, each in stock.model.named_parameters() if each.requires_grad}

    processor = load_processor(recipe)
    encoder = Encoder(processor, recipe.data.system_message, "answer")
    samples = [
        encoder(question_row([files[image].read_bytes() for image in images], query, [answer]))
        for images, (query, answer) in zip(groups, questions, strict=False)
    ]
    inputs = pack(
        samples,
        sample_ids=range(len(samples)),
        step=0,
        masked=False,
        image_token_id=processor.image_token_id,
        merge=processor.image_processor.merge_size,
    )
    model = random_adapter(recipe).train()
    prepare_training(model, recipe)
    log_probs = model(**inputs).log_probs
    assert log_probs.numel() == int((batch["labels"][:, 1:] != -100).sum())
    ours = -log_probs.mean()
    ours.backward()
    assert float(ours) == pytest.approx(float(loss), rel=1e-5)
    trained = trainable_parameters(model)
    assert trained.keys() == expected.keys()
    for name, parameter in trained.items():
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5, name
        assert expected[name].any(), name


def test_answers_are_those_of_the_stock_model_on_each_image_file_alone(
    recipe: Recipe, files: list[Path], stock: Stock
) -> None:
    prepare(recipe, quiet=True)
    processor, rows = load_processor(recipe), open_split(recipe, "train")
    encoder = Encoder(processor, recipe.data.system_message, "answer")
    replica = Replica(random_adapter(recipe), processor, rows, NEW_TOKENS, torch.float32)
    numbers = range(len(files))
    prompts = [encoder.texts(rows[number])[0] for number in numbers]
    answers = replica.answers(prompts[:16], numbers[:16]) + replica.answers(prompts[16:], numbers[16:])
    expected = [
        stock.answer(file, question) for file, (question, _) in zip(files, _questions(recipe), strict=True)
    ]
    assert answers == expected
    assert len(set(answers)) > 8
