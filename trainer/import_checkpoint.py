"""`python -m trainer.import_checkpoint RECIPE CHECKPOINT --output DIR`: make a checkpoint of another library's.

Adapter, optimizer state and step are imported where the form has them; what is lost is printed.
`samestep run RECIPE --from CHECKPOINT` starts it, and then begins a run with the result.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from transformers import TrainerState

from launch.checkpoints.adapter_file import ADAPTER_WEIGHTS
from launch.checkpoints.manifest import MANIFEST, OPTIMIZER_FILE
from launch.checkpoints.publish import partial_folder, publish
from launch.errors import CheckpointError, SamestepError
from launch.hub_names import EMBEDDED
from launch.inputs.dataset_index import Index, read_index
from launch.inputs.model_files import COMMIT
from launch.option_values import add_option, place
from launch.planning.step_plan import StreamOffset
from launch.recipe.fingerprint import altering_values
from launch.recipe.loading import find_recipe, load_recipe
from launch.recipe.schema import Recipe
from launch.untrusted_files import printable
from trainer.export.adapter import AdapterOverrides, adapter_of
from trainer.formats.detect import import_checkpoint
from trainer.formats.imported import ImportedCheckpoint
from trainer.logging_setup import print_error, setup_logging
from trainer.prepare import prepare
from trainer.pretrained import base_name, base_path

STATE_FILE = "trainer_state.json"
_NOT_CONTINUED = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "modules_to_save")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.import_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m trainer.import_checkpoint recipe.yaml old_run/checkpoint-500 --output taken",
    )
    parser.add_argument("recipe", help="the recipe that is to go on")
    add_option(
        parser, "source", place, help="a checkpoint of plain trl, transformers, accelerate or DeepSpeed"
    )
    add_option(parser, "--output", place, required=True, help="folder in which checkpoint-<step> is written")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe value"
    )
    options = parser.parse_args(arguments)
    setup_logging()
    try:
        recipe = load_recipe(find_recipe(options.recipe), options.set)
        index = read_index(recipe) or prepare(recipe)
        imported = import_checkpoint(options.source)
        refuse_what_we_do_not_train(recipe, imported)
        write_checkpoint(recipe, index, imported, options.output)
    except SamestepError as error:
        return print_error(error)
    print(
        f"{printable(str(options.source))}: {imported.form}, step {imported.step or 0}; imported: "
        f"{', '.join(_taken(imported))}"
    )
    for lost in (*imported.lost, *_lost_always(recipe, imported)):
        print(f"not imported: {lost}")
    return 0


def refuse_what_we_do_not_train(recipe: Recipe, imported: ImportedCheckpoint) -> None:
    """Refuse what a recipe cannot say and would be dropped in silence: another scale, say, or another base.

    Raises:
        CheckpointError: it is no whole LoRA, or of a kind that this training does not continue.
    """
    if (imported.source / MANIFEST).is_file():
        raise CheckpointError(
            f"{imported.source}: is a checkpoint of samestep; give it to `samestep run --from` as it is"
        )
    adapter_of(
        imported,
        AdapterOverrides() if imported.config else AdapterOverrides(lora_alpha=recipe.lora.lora_alpha),
    )
    config = imported.config or {}
    if refused := [name for name in _NOT_CONTINUED if config.get(name)]:
        raise CheckpointError(
            f"{imported.source}: its adapter uses {', '.join(refused)}, which a run here does not continue; merge it "
            "(`samestep merge`) and train on the result, or go on with the library that wrote it"
        )


def write_checkpoint(recipe: Recipe, index: Index, imported: ImportedCheckpoint, output: Path) -> Path:
    """Publish `checkpoint-<step>` below `output`, replacing an older one; returns its folder.

    Its facts say of the old run what is known (LoRA, base), and for the rest what the recipe says.
    """
    step = imported.step or 0
    tmp_dir = partial_folder(output, step)
    shutil.rmtree(tmp_dir, ignore_errors=True)
    tmp_dir.mkdir(parents=True)
    save_file(
        {key: tensor.float().contiguous() for key, tensor in imported.tensors.items()},
        tmp_dir / ADAPTER_WEIGHTS,
    )
    if imported.optimizer_state:
        optimizer_state = {
            name: tensor.float().contiguous() for name, tensor in imported.optimizer_state.items()
        }
        save_file(optimizer_state, tmp_dir / OPTIMIZER_FILE)
    lora_config(recipe, imported).save_pretrained(str(tmp_dir))
    TrainerState(global_step=step, train_batch_size=1).save_to_json(str(tmp_dir / STATE_FILE))
    facts = {
        "step": step,
        "samples_consumed": step * recipe.batch.global_batch_size,
        "form": "portable",
        "strategy": imported.form,
        "world_size": None,
        "global_batch_size": recipe.batch.global_batch_size,
        "begin": {"step": StreamOffset().step, "sample": StreamOffset().sample},
        "learning_rate": None,
        "recipe": altering_values(recipe) | old_values(recipe, imported),
        "dataset_fingerprint": index.fingerprint,
        "base_identity": known_base(imported),
        "taken_over_from": str(imported.source.absolute()),
        "lost": list(imported.lost),
    }
    final = output / f"checkpoint-{step}"
    publish(tmp_dir, final, facts, replace=True)
    return final


def known_base(imported: ImportedCheckpoint) -> str | None:
    """Find the commit of the old run's base; None where adapter_config.json has only a name, which is any model's."""
    revision = (imported.config or {}).get("revision") or ""
    return revision if COMMIT.fullmatch(revision) else None


def old_values(recipe: Recipe, imported: ImportedCheckpoint) -> dict[str, Any]:
    """Return the recipe values that the old run had otherwise: of its adapter_config.json, or its tensors."""
    config = imported.config or {"r": _rank_of(imported)}
    old = {f"lora.{key}": config[key] for key in ("r", "lora_alpha", "lora_dropout") if key in config}
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if getattr(recipe.lora, key) and not config.get(key):
            old[f"lora.{key}"] = config.get(key)
    targets = config.get("target_modules")
    target_modules = recipe.lora.target_modules
    if isinstance(targets, list) and not isinstance(target_modules, str) and {*targets} != {*target_modules}:
        old["lora.target_modules"] = sorted(targets)
    base = config.get("base_model_name_or_path")
    name = recipe.model.name_or_path
    same = {name, base_path(recipe) if name == EMBEDDED else base_name(recipe)}
    if base and base not in same:
        old["model.name_or_path"] = base
    return old


def lora_config(recipe: Recipe, imported: ImportedCheckpoint) -> LoraConfig:
    """Return the adapter_config.json of the imported adapter: its own values, the recipe's where it has none."""
    lora, own = recipe.lora, imported.config or {}
    values: dict[str, Any] = {
        "r": own.get("r", _rank_of(imported)),
        "lora_alpha": own.get("lora_alpha", lora.lora_alpha),
        "lora_dropout": own.get("lora_dropout", lora.lora_dropout),
        "target_modules": own.get("target_modules", lora.target_modules),
    }
    config = LoraConfig(**values, task_type="CAUSAL_LM", inference_mode=True)
    config.base_model_name_or_path = own.get("base_model_name_or_path") or base_name(recipe)
    return config


def _rank_of(imported: ImportedCheckpoint) -> int:
    return next(tensor.shape[0] for key, tensor in imported.tensors.items() if ".lora_A." in key)


def _taken(imported: ImportedCheckpoint) -> Iterator[str]:
    yield f"the adapter ({len(imported.tensors)} tensors)"
    if imported.optimizer_state:
        yield f"the optimizer's moments of {len(imported.optimizer_state) // 3} parameters"
    if imported.step is not None:
        yield "the step"


def _lost_always(recipe: Recipe, imported: ImportedCheckpoint) -> Iterator[str]:
    sample = (imported.step or 0) * recipe.batch.global_batch_size
    yield (
        f"the order of its samples: this run goes on at sample {sample:,} of its own stream, so some are seen again "
        "and some not in the epoch under way"
    )
    yield "the learning-rate schedule: the recipe's is entered at that step"
    yield "what its base was quantized to, and its data: the recipe's are taken for the same"
    if known_base(imported) is None:
        yield "which weights its base had: it says no more than a name, the recipe's are taken for the same"
    if imported.config is None:
        yield f"lora_alpha, which the form does not store: taken from the recipe ({recipe.lora.lora_alpha})"


if __name__ == "__main__":
    sys.exit(main())
