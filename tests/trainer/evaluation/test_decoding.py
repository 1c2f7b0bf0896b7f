"""Packed prompts and a static cache: the tokens of `model.generate` for one prompt at a time, of every family."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.errors import RunError
from launch.inputs.families import FAMILIES
from launch.recipe.loading import recipe_from_dict
from tests.helpers.chats import chats_recipe, write_chats
from tests.helpers.tiny_families import write_tiny
from trainer.data.encoder import Encoder
from trainer.data.images import decode_image
from trainer.data.rows import Row
from trainer.data.splits import open_split
from trainer.evaluation import decoding, image_features
from trainer.evaluation.image_features import ImageFeatures, chunks
from trainer.evaluation.replica import Replica, why_stock
from trainer.model.base import add_lora, load_base, prepare_answers
from trainer.prepare import prepare
from trainer.pretrained import load_processor

NEW = 9


Plain = list[list[int]]


def _plain(model: Any, processor: Any, prompts: list[str], rows: list[Row]) -> Plain:
    """New tokens of one prompt after the other, as the documentation of transformers has it."""
    answers = []
    for prompt, row in zip(prompts, rows, strict=True):
        images = [decode_image(image) for image in row.images] or None
        inputs = processor(text=[prompt], images=images, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def _activate(model: Any, adapter: str | None) -> AbstractContextManager[Any]:
    if adapter is None:
        return model.disable_adapter()  # type: ignore[no-any-return]
    model.set_adapter(adapter)
    return nullcontext()


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_answers_are_those_of_a_plain_call_for_one_prompt_at_a_time(
    kind: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None to three images, prompts of unequal length, answers that end early, two adapters and none."""
    values = chats_recipe(world, write_chats(tmp_path / "data", {"train": 8, "val": 1}))
    values["model"]["name_or_path"] = str(write_tiny(kind, tmp_path / "base", initializer_range=0.3))
    recipe = recipe_from_dict(values)
    prepare(recipe, quiet=True)
    processor, rows = load_processor(recipe), list(open_split(recipe, "train"))
    assert len({len(row.images) for row in rows}) > 2
    encoder = Encoder(processor, None, "all_answers")
    prompts = [encoder.conversation(row).prompt for row in rows]
    model: Any = add_lora(load_base(recipe, torch.device("cpu")), recipe)
    model.add_adapter("other", model.peft_config["default"])
    torch.manual_seed(3)
    for name, parameter in model.eval().named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    base = model.get_base_model()
    long = _plain(model, processor, prompts, rows)
    own = base.generation_config.eos_token_id
    # Half of the answers end with a token that is no end of the model's own, at different places.
    base.generation_config.eos_token_id = [*own, *(tokens[2 + n % 5] for n, tokens in enumerate(long[::2]))]
    adapters = ("default", "other", None)
    expected: list[Plain] = []
    for adapter in adapters:
        with _activate(model, adapter):
            expected.append(_plain(model, processor, prompts, rows))
    assert len({len(tokens) for tokens in expected[0]}) > 2
    assert expected[0] != expected[1] != expected[2]
    prepare_answers(base, torch.float32)
    monkeypatch.setattr(decoding, "PROMPT_TOKENS", 150)  # several passes
    monkeypatch.setattr(image_features, "PATCHES", 100)
    replica = Replica(model, processor, rows, NEW, torch.float32, stock=None)  # type: ignore[arg-type]
    replica.look_ahead(range(len(rows)))
    for few in (range(len(rows)), range(3, 5)):
        for adapter, tokens in zip(adapters, expected, strict=True):
            with _activate(model, adapter):
                answers = replica.answers([prompts[n] for n in few], few)
            texts = processor.tokenizer.batch_decode([tokens[n] for n in few], skip_special_tokens=True)
            assert answers == [text.strip() for text in texts]
    replica.features.stop()


def test_images_are_decoded_ahead_in_their_order_and_a_damaged_one_is_named_when_its_turn_comes() -> None:
    seen: list[int] = []

    class Some:
        def __getitem__(self, number: int) -> Any:
            seen.append(number)
            return SimpleNamespace(images=[b"no image"] if number == 7 else [])

    features = ImageFeatures(None, None, Some(), packed=True)  # type: ignore[arg-type]
    features.look_ahead([*range(10), *range(10)])
    assert features.of([0, 1]) == [[], []]
    with pytest.raises(RunError, match="data: row 7 of the split"):
        features.of([7])
    features.stop()
    assert sorted(seen) == list(range(10))
    assert features.of([3]) == [[]]  # also those that nobody decodes ahead any more


def test_transformers_generates_where_graphs_cannot_be_and_the_reason_is_said() -> None:
    def base(device: str, kind: str, layers: list[str]) -> Any:
        text = SimpleNamespace(layer_types=layers)
        config = SimpleNamespace(model_type=kind, get_text_config=lambda: text)
        return SimpleNamespace(device=torch.device(device), config=config)

    full = ["full_attention"]
    assert why_stock(base("cuda", "qwen2_vl", full)) is None
    assert "need a GPU, this is a cpu" in str(why_stock(base("cpu", "qwen2_vl", full)))
    assert "layers of other" in str(why_stock(base("cuda", "other", full)))
    assert "layers of qwen2_vl" in str(why_stock(base("cuda", "qwen2_vl", ["sliding_attention", *full])))


def test_consecutive_items_go_together_up_to_a_bound_and_a_large_one_alone() -> None:
    assert chunks([3, 4, 9, 1, 1], 7) == [(0, 2), (2, 3), (3, 5)]
    assert chunks([], 7) == []
