"""Adapters of random numbers: what training would leave, without training."""

from pathlib import Path
from typing import Any

import torch

from launch.recipe.loading import dump_recipe
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from trainer.formats.portable import save_adapter
from trainer.model.base import load_base
from trainer.model.lora import add_lora


def random_adapter(recipe: Recipe) -> Any:
    """The recipe's base with an adapter of random numbers, large enough to change answers."""
    model = add_lora(load_base(recipe, torch.device("cpu")), recipe)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


def write_run(recipe: Recipe, folder: Path) -> RunDirectory:
    """A run directory as a finished run leaves it: recipe and adapter."""
    run = RunDirectory(folder)
    folder.mkdir()
    run.recipe_file.write_text(dump_recipe(recipe))
    save_adapter(random_adapter(recipe), run.adapter)
    return run
