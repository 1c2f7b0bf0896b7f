"""The tokens that prompts begin with, found when data is prepared: which rows have them, and how many."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.inputs.dataset_index import Index, read_index
from launch.recipe.loading import dump_recipe, recipe_from_dict
from launch.recipe.schema import Recipe
from tests.helpers.chats import chat_row, chats_recipe
from trainer.data.encoder import Encoder
from trainer.data.lengths import _count_text
from trainer.data.splits import open_split
from trainer.prepare import main, prepare
from trainer.pretrained import load_processor

MESSAGE = "Read the chart and answer in one word."
OWN = {"role": "system", "content": [{"type": "text", "text": f"{MESSAGE} Be brief."}]}


@pytest.fixture(scope="module")
def values(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Chats of one question, of which every third has a system message of its own."""
    folder = tmp_path_factory.mktemp("prefix")
    rows = [chat_row(number, [], 1) for number in range(12)]
    for row in rows[::3]:
        row["messages"].insert(0, OWN)
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return chats_recipe(world, folder, system_message=MESSAGE, loss="answer")


@pytest.fixture(scope="module")
def recipe(values: dict[str, Any]) -> Recipe:
    return recipe_from_dict(values)


@pytest.fixture(scope="module")
def index(recipe: Recipe) -> Index:
    return prepare(recipe, quiet=True)


@pytest.fixture(scope="module")
def encoder(recipe: Recipe, index: Index) -> Encoder:
    return Encoder(load_processor(recipe), recipe.data.system_message, recipe.data.loss)


def test_it_is_what_the_template_writes_before_the_words_of_the_user(encoder: Encoder) -> None:
    text = encoder.processor.tokenizer.decode(encoder.shared_prefix)
    assert text == f"<|im_start|>system\n{MESSAGE}<|im_end|>\n<|im_start|>user\n"


def test_a_row_with_a_system_message_of_its_own_does_not_share_it(
    recipe: Recipe, index: Index, encoder: Encoder
) -> None:
    split, length = index.splits["train"], len(encoder.shared_prefix)
    assert split.prefixes(range(12)) == [0, length, length] * 4
    for number, row in enumerate(open_split(recipe, "train")):
        ids = encoder(row).input_ids.tolist()
        assert (ids[:length] == encoder.shared_prefix) == (number % 3 > 0)
    assert (split.tokens - split.own_tokens).tolist() == split.prefixes(range(12))


def test_a_micro_batch_computes_it_once(index: Index, encoder: Encoder) -> None:
    split, length = index.splits["train"], len(encoder.shared_prefix)
    for samples, copies in (((1, 2, 4), 2), ((0, 1, 2), 1), ((0, 3), 0), ((5,), 0)):
        whole = int(split.tokens[list(samples)].sum())
        assert split.computed_tokens(samples) == whole - copies * length


def test_without_prefix_sharing_the_same_index_says_that_no_row_has_it(
    values: dict[str, Any], index: Index
) -> None:
    alone = read_index(recipe_from_dict(values | {"batch": {**values["batch"], "prefix_sharing": False}}))
    assert alone is not None
    assert alone.path == index.path
    assert alone.splits["train"].prefixes(range(12)) == [0] * 12
    assert alone.splits["train"].own_tokens.tolist() == index.splits["train"].tokens.tolist()


def test_there_is_none_where_every_token_is_a_target_or_the_template_writes_an_image(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert replace(encoder, loss="sequence").shared_prefix == []
    monkeypatch.setattr(Encoder, "_rendered", lambda *_, **__: encoder.processor.image_token * 2)
    assert replace(encoder).shared_prefix == []


def test_there_is_none_where_the_template_refuses_a_chat_without_an_image(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise ValueError("an image is needed")

    monkeypatch.setattr(Encoder, "_rendered", refuse)
    assert replace(encoder).shared_prefix == []


def test_it_is_not_shared_where_its_last_token_predicts_a_target(
    recipe: Recipe, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a template that lets the model speak first."""
    row = open_split(recipe, "train")[1]
    length = len(encoder.shared_prefix)
    for begin, expected in ((length - 1, 0), (length, 0), (length + 1, length)):
        monkeypatch.setattr(Encoder, "spans", lambda *_, at=begin: [(at, at + 1)])
        assert _count_text(encoder, row)[2] == expected


def test_prepare_says_how_many_tokens_are_computed_once(
    recipe: Recipe, encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert main([str(file)]) == 0
    said = f", the first {len(encoder.shared_prefix)} computed once for a micro-batch in 8 of 12 rows)"
    assert said in capsys.readouterr().out
    assert main([str(file), "--set", "batch.prefix_sharing=false"]) == 0
    assert "computed once" not in capsys.readouterr().out
