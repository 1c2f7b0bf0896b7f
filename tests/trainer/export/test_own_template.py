"""A merged model has the chat template that its run trained with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoProcessor, AutoTokenizer

from launch.errors import CheckpointError
from launch.recipe.loading import load_recipe, recipe_from_dict
from tests.conftest import recipe_values
from tests.helpers.adapters import write_run
from tests.helpers.merging import merge
from trainer.embedded.tiny_model import CHAT_TEMPLATE, random_tiny
from trainer.export.adapter import read_adapter
from trainer.export.own_template import own_template

OWN = CHAT_TEMPLATE.replace("You are a helpful assistant.", "Short answers, caf\u00e9.")


def test_a_merged_model_has_the_template_of_its_training_alone_or_is_not_made(
    world: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    random_tiny(base)
    values = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(values | {"chat_template": "another"}))
    (base / "chat_template.json").write_text(json.dumps({"chat_template": "another"}))
    file = tmp_path / "mine.jinja"
    file.write_text(OWN, encoding="utf-8")
    recipe_file = recipe_values(world)
    recipe_file["model"]["name_or_path"] = str(base)
    recipe_file["data"]["chat_template"] = str(file)
    run = write_run(recipe_from_dict(recipe_file), tmp_path / "run")
    report = merge(run.path, run.merged)
    assert report.template == file
    for loader in (AutoProcessor, AutoTokenizer):
        assert loader.from_pretrained(run.merged).chat_template == OWN
    assert "another" not in "".join(each.read_text() for each in run.merged.glob("*.json"))
    assert "`mine.jinja`" in (run.merged / "README.md").read_text()
    assert json.loads((run.merged / "merge.json").read_text())["chat_template"] == str(file)

    adapter, recipe = read_adapter(run.path), load_recipe(run.recipe_file)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"mine\.jinja cannot be read"):
        own_template(adapter, recipe)
    (run.adapter / "chat_template.jinja").write_text(OWN, encoding="utf-8")
    kept = own_template(adapter, recipe)
    assert kept is not None
    assert (kept.text, kept.source.parent) == (OWN, run.adapter)
