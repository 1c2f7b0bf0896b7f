"""Packed prompts and a static cache: the tokens of `model.generate` for one prompt at a time, of every family."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.errors import RunError
from launch.inputs.families import FAMILIES
from tests.helpers.plain_answers import AnsweredChats
from trainer.generation import decoding, image_features
from trainer.generation.image_features import ImageFeatures, chunks
from trainer.generation.replica import why_stock


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_answers_are_those_of_a_plain_call_for_one_prompt_at_a_time(
    kind: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None to three images, prompts of unequal length, answers that end early, two adapters and none."""
    chats = AnsweredChats(kind, world, tmp_path, "cpu")
    assert len({len(tokens) for tokens in chats.expected[0]}) > 2
    assert chats.expected[0] != chats.expected[1] != chats.expected[2]
    monkeypatch.setattr(decoding, "PROMPT_TOKENS", 150)  # several passes
    monkeypatch.setattr(image_features, "PATCHES", 100)
    replica = chats.fast()
    replica.look_ahead(range(len(chats.rows)))
    chats.check(replica)
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
