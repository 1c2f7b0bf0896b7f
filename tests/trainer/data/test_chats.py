"""Chats of several turns and none to several images: each packed sample is the stock model's on that chat alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from launch.inputs.dataset_index import Index
from launch.planning.step_plan import MicroBatch, cost
from launch.recipe.loading import recipe_from_dict
from launch.recipe.schema import Recipe
from tests.helpers.chats import chats_recipe, write_chats
from trainer.checks.training import describe_targets
from trainer.data.encoder import IGNORED, Encoder, Sample, mrope_positions
from trainer.data.images import decode_image
from trainer.data.micro_batches import assemble
from trainer.data.packing import pack
from trainer.data.rows import Row
from trainer.data.splits import open_split
from trainer.generation.replica import Replica
from trainer.model.base import load_base, prepare_training
from trainer.model.lora import add_lora
from trainer.prepare import prepare
from trainer.prepare_vision import _images_of
from trainer.pretrained import load_processor
from trainer.show_data import conversation_text, show_data
from trainer.vision_cache.file import Features, Kind
from trainer.vision_cache.store import image_name, open_cache

COUNT = 24


@pytest.fixture(scope="module")
def recipe(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = write_chats(tmp_path_factory.mktemp("chats") / "data", {"train": COUNT, "val": 6})
    return recipe_from_dict(chats_recipe(world, folder) | {"lora": {"lora_dropout": 0.0}})


@pytest.fixture(scope="module")
def index(recipe: Recipe) -> Index:
    return prepare(recipe, quiet=True)


@pytest.fixture(scope="module")
def encoder(recipe: Recipe, index: Index) -> Encoder:
    return Encoder(load_processor(recipe), None, "all_answers")


@pytest.fixture(scope="module")
def rows(recipe: Recipe, index: Index) -> list[Row]:
    return list(open_split(recipe, "train"))


@pytest.fixture(scope="module")
def samples(rows: list[Row], encoder: Encoder) -> list[Sample]:
    return [encoder(row) for row in rows]


def _model(recipe: Recipe) -> Any:
    model = add_lora(load_base(recipe, torch.device("cpu")), recipe)
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1
    return model.eval()


def _stock_inputs(sample: Sample, encoder: Encoder) -> dict[str, Any]:
    is_image = sample.input_ids == encoder.processor.image_token_id
    inputs: dict[str, Any] = {
        "input_ids": sample.input_ids[None],
        "attention_mask": torch.ones_like(sample.input_ids)[None],
    }
    if sample.images:
        pixels = [image.pixel_values for image in sample.images if image.pixel_values is not None]
        inputs |= {
            "pixel_values": torch.cat(pixels),
            "image_grid_thw": torch.tensor([image.grid for image in sample.images]),
            "mm_token_type_ids": is_image.long()[None],
        }
    return inputs


def _inputs(samples: list[Sample], encoder: Encoder, prefixes: Sequence[int] = ()) -> dict[str, Any]:
    packed = pack(
        samples,
        sample_ids=list(range(len(samples))),
        step=0,
        masked=False,
        image_token_id=encoder.processor.image_token_id,
        merge=2,
        prefixes=prefixes,
    )
    return dict(packed)


def test_the_chats_are_of_every_kind(rows: list[Row], index: Index) -> None:
    assert {len(row.images) for row in rows} == {0, 1, 2, 3}
    assert {sum(turn.role == "user" for turn in row.turns) for row in rows} == {1, 2, 3}
    split = index.splits["train"]
    assert split.image_tokens is not None
    assert [len(images) for images in split.image_tokens] == [len(row.images) for row in rows]
    assert split.visual_tokens.tolist() == [sum(images) for images in split.image_tokens]
    assert split.digests == tuple(row.digest for row in rows)


def test_a_packed_micro_batch_of_chats_gives_the_losses_and_gradients_of_each_chat_alone(
    recipe: Recipe, index: Index, samples: list[Sample], encoder: Encoder
) -> None:
    """What they all begin with, the first words of a turn, is computed once."""
    stock, packed = _model(recipe), _model(recipe)
    prepare_training(packed, recipe)
    alone = []
    for sample in samples:
        logits = stock(**_stock_inputs(sample, encoder)).logits[0]
        alone.append(
            torch.nn.functional.cross_entropy(
                logits[:-1], sample.labels[1:], ignore_index=IGNORED, reduction="sum"
            )
        )
    order = [*range(0, COUNT, 2), *range(1, COUNT, 2)]
    prefixes = index.splits["train"].prefixes(order)
    assert prefixes == [len(encoder.shared_prefix)] * COUNT
    assert prefixes[0] > 0
    log_probs = packed(**_inputs([samples[number] for number in order], encoder, prefixes)).log_probs[0]
    parts = (-log_probs).split([samples[number].target_tokens for number in order])
    together = torch.stack([part.sum() for part in parts])
    torch.testing.assert_close(
        together, torch.stack([alone[number] for number in order]), rtol=1e-5, atol=1e-5
    )
    torch.stack(alone).sum().backward()
    together.sum().backward()
    for one, other in zip(stock.parameters(), packed.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4)
    without = [sample for sample in samples if not sample.images][:3]
    packed(**_inputs(without, encoder)).log_probs.sum().backward()  # a rank without any image


def test_positions_are_those_of_the_stock_model(
    recipe: Recipe, samples: list[Sample], encoder: Encoder
) -> None:
    model = load_base(recipe, torch.device("cpu"))
    for sample in samples:
        inputs = _stock_inputs(sample, encoder)
        if not sample.images:
            assert torch.equal(sample.positions, torch.arange(len(sample.input_ids)).expand(3, -1))
            continue
        expected, _ = model.model.get_rope_index(
            input_ids=inputs["input_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
        )
        assert torch.equal(sample.positions, expected[-3:, 0])
        is_image = sample.input_ids == encoder.processor.image_token_id
        assert torch.equal(
            mrope_positions(is_image, [image.grid for image in sample.images], 2), sample.positions
        )


def test_the_loss_counts_the_answers_that_the_recipe_names(rows: list[Row], encoder: Encoder) -> None:
    row = next(row for row in rows if len(row.turns) == 6 and row.images)
    answers = [turn.text for turn in row.turns if turn.role == "assistant"]
    decode = encoder.processor.tokenizer.decode

    def scored(loss: str) -> list[str]:
        sample = replace(encoder, loss=loss)(row)
        runs = "".join("x" if label == IGNORED else "." for label in sample.labels.tolist())
        begins = [place for place in range(1, len(runs)) if runs[place - 1 : place + 1] == "x."]
        return [decode(sample.labels[begin:][: runs[begin:].find("x") % len(runs)]) for begin in begins]

    assert scored("all_answers") == [f"{answer}<|im_end|>\n" for answer in answers]
    assert scored("answer") == [f"{answers[-1]}<|im_end|>\n"]
    sequence = replace(encoder, loss="sequence")(row)
    assert sequence.target_tokens == len(sequence.input_ids) - 1
    inputs: Any = _inputs([encoder(row)], encoder)
    texts = encoder.scored_texts(row)
    assert "targets" in describe_targets(inputs, (0,), [texts], encoder.processor.tokenizer)
    assert texts is not None
    for wrong in (texts[1:], texts[::-1], (*texts[:-1], "other")):
        with pytest.raises(Exception, match=r"data\.loss: sample 0 scores"):
            describe_targets(inputs, (0,), [wrong], encoder.processor.tokenizer)


def test_some_images_of_a_chat_may_be_cached(
    recipe: Recipe, index: Index, rows: list[Row], encoder: Encoder, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("SAMESTEP_VISION_CACHE", str(tmp_path))
    split, source = index.splits["train"], open_split(recipe, "train")
    cache = open_cache("disk", Kind(b"c" * 16, torch.float32, 8, 2), {})
    number = next(place for place, row in enumerate(rows) if len(row.images) == 3)
    plain = encoder(rows[number])
    features = torch.randn(plain.images[1].visual_tokens(2), 8)
    cache.write(image_name(rows[number].images[1]), Features(features, plain.images[1].grid))
    batch = MicroBatch((0, number, 1), filler=False)
    some, none = (
        assemble(source, split, one, batch, 0, 1)["inputs"]
        for one in (replace(encoder, features=cache), encoder)
    )
    assert torch.equal(some["input_ids"], none["input_ids"])
    assert torch.equal(some["position_ids"], none["position_ids"])
    assert torch.equal(some["cached_features"], features)
    both = torch.cat([some["fresh_positions"], some["cached_positions"]]).sort().values
    assert torch.equal(both, none["fresh_positions"])
    assert len(some["fresh_grids"]) == len(none["fresh_grids"]) - 1
    sizes = [image.visual_tokens(2) for image in plain.images]
    of_sample = (none["sample_ids"][none["fresh_positions"]] == number).nonzero()[:, 0] + 0
    cached = none["fresh_positions"][of_sample][sizes[0] : sizes[0] + sizes[1]]
    assert torch.equal(some["cached_positions"], cached)


def test_images_of_a_sample_do_not_see_each_other_in_its_cost(recipe: Recipe, index: Index) -> None:
    split = index.splits["train"]
    one = split.visual_tokens**2
    several = [place for place, images in enumerate(split.image_tokens or ()) if len(images) > 1]
    assert (split.visual_squares <= one).all()
    assert all(split.visual_squares[place] < one[place] for place in several)
    apart = cost(split.text_tokens, split.visual_tokens, split.visual_squares)
    assert (apart <= cost(split.text_tokens, split.visual_tokens)).all()


def test_answers_to_chats_together_are_those_of_a_plain_call_on_each(
    recipe: Recipe, rows: list[Row], samples: list[Sample], encoder: Encoder
) -> None:
    model = _model(recipe)
    source = open_split(recipe, "train")
    numbers = [next(n for n, row in enumerate(rows) if len(row.images) == count) for count in (0, 1, 2, 3)]
    prompts = [encoder.conversation(rows[number]).prompt for number in numbers]
    replica = Replica(model, encoder.processor, source, 5, torch.float32)
    together = replica.answers(prompts, numbers)
    assert replica.answers(prompts[:1], numbers[:1]) == together[:1]  # no image in the whole batch
    for number, prompt, answer in zip(numbers, prompts, together, strict=True):
        images = [decode_image(image) for image in rows[number].images] or None
        inputs = encoder.processor(text=[prompt], images=images, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        assert answer == encoder.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_every_distinct_image_of_the_chats_is_wanted_once_for_the_cache(
    recipe: Recipe, index: Index, rows: list[Row]
) -> None:
    splits: Any = {"train": open_split(recipe, "train"), "validation": open_split(recipe, "validation")}
    wanted = list(_images_of(recipe, index, splits, lambda done, total: None))
    every = [*rows, *splits["validation"]]
    assert {image.name for image in wanted} == {image_name(image) for row in every for image in row.images}
    assert len(wanted) == len({image.name for image in wanted})
    sizes = {
        image_name(image): size
        for row in every
        for image, size in zip(row.images, _sizes(row, recipe), strict=True)
    }
    assert all(image.visual_tokens == sizes[image.name] for image in wanted)


def _sizes(row: Row, recipe: Recipe) -> list[int]:
    return [image.visual_tokens(2) for image in Encoder(load_processor(recipe), None, "answer")(row).images]


def test_what_the_model_sees_of_a_chat_is_shown_with_its_targets(
    recipe: Recipe, index: Index, rows: list[Row], encoder: Encoder
) -> None:
    number = next(n for n, row in enumerate(rows) if len(row.images) == 2 and len(row.turns) > 2)
    tokens = index.splits["train"].tokens_of_images(number)
    plain = conversation_text(encoder, rows[number], tokens, colour=False).plain
    for turn in rows[number].turns[1::2]:
        assert f"»{turn.text}<|im_end|>\\n«\n" in plain  # its line break is a target
    assert [f"[image: {count} tokens]" in plain for count in tokens] == [True, True]
    coloured = conversation_text(encoder, rows[number], tokens)
    targets = [coloured.plain[span.start : span.end] for span in coloured.spans]
    assert targets == [f"{turn.text}<|im_end|>\\n\n" for turn in rows[number].turns[1::2]]
    console = Console(record=True, width=100, file=io.StringIO())
    show_data(recipe, index, 1, console)
    shown = console.export_text()
    assert "0 to 3, mean" in shown
    lines = shown.partition("tokens a sample (train)")[2].partition("targets a sample")[0].splitlines()
    counts = [int(line.split()[-1]) for line in lines if line.strip() and line.split()[-1].isdigit()]
    assert sum(counts) == COUNT
