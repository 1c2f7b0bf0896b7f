"""The unquantized base that an adapter is merged into: found, checked, and known to be the one of the training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.checkpoints.manifest import MANIFEST
from launch.errors import CheckpointError, ConfigError
from launch.hub_names import EMBEDDED, is_hub_id
from launch.inputs.caches import embedded_folder
from launch.inputs.families import Family, family_of
from launch.inputs.identity import (
    MODEL_PARTS,
    WEIGHTS_PART,
    RunIdentity,
    model_identity,
    recorded_identity,
    short,
)
from launch.inputs.model_files import old_base_identity, old_kind
from launch.recipe.loading import load_recipe
from launch.recipe.schema import Recipe
from launch.run.changes import Change, content_changes, is_allowed, refuse_unknown_parts
from launch.run.continuation import planned_identity
from launch.run.directory import RunDirectory
from launch.run.request_files import old_plan
from launch.untrusted_files import TABLE, UNREADABLE, printable, read_mapping
from trainer.base_files import refuse_unsafe_base
from trainer.export.adapter import Adapter
from trainer.formats.safetensors_blocks import read_base_shards
from trainer.formats.validated import FileSchema, checked, read_json_object, unreadable_is_refused
from trainer.pretrained import hub_snapshot

COPIED = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*")  # all but the weights


@dataclass(frozen=True)
class BaseCheck:
    """Whether a base was held against the training's: `how`, or why it could not be."""

    compared: bool
    how: str

    def __str__(self) -> str:
        return f"base {'' if self.compared else 'not '}compared with the training's: {self.how}"


class _Config(FileSchema):
    """What is read of config.json."""

    quantization_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None
    vision_config: dict[str, Any] | None = None
    tie_word_embeddings: bool | None = None


def run_containing(source: Path) -> RunDirectory | None:
    """Return the run directory that contains `source` or is it; None outside a run."""
    source = source.expanduser().absolute()
    for folder in (source, source.parent):
        if RunDirectory(folder).recipe_file.is_file():
            return RunDirectory(folder)
    return None


def run_recipe(source: Path, recipe_file: Path | None = None) -> Recipe | None:
    """Return the recipe of the run that `source` belongs to, or `recipe_file`; None without one."""
    if recipe_file is not None:
        return load_recipe(recipe_file)
    run = run_containing(source)
    return load_recipe(run.recipe_file) if run else None


@unreadable_is_refused()
def check_base(adapter: Adapter, folder: Path, allow: Sequence[str] = ()) -> BaseCheck:
    """Hold a base against what the newest checkpoint of the adapter's run says of the training's, part by part.

    `allow`: parts, or `model.content` for all, that may differ.

    Raises:
        CheckpointError: it is another; every part that differs is named, with both digests.
    """
    refuse_unknown_parts(allow, MODEL_PARTS)
    recorded, where = recorded_at(adapter.path)
    if recorded is None:
        return BaseCheck(False, where)
    if not recorded.only(*MODEL_PARTS).parts:
        return _check_old(adapter.path, folder, where, allow)
    now = model_identity(folder)
    differing = content_changes(recorded, now)
    if refused := [change for change in differing if not is_allowed(change, allow)]:
        raise CheckpointError(
            "\n".join(
                [
                    *(f"{change.key}: {change.comparison(f'{where} has')}" for change in refused),
                    f"{folder}: is not the base that the run was trained on (parts that differ: {len(refused)}); give "
                    f"the same one with --base-model, or --allow {' --allow '.join(each.key for each in refused)}",
                ]
            )
        )
    if differing:
        differences = "; ".join(f"{change.key}: {change.comparison(f'{where} has')}" for change in differing)
        return BaseCheck(True, f"it differs as allowed; {differences}")
    weights = short(now.parts[WEIGHTS_PART])
    return BaseCheck(True, f"the same content (weights {weights}, {len(now.parts)} parts) as in {where}")


def _check_old(source: Path, folder: Path, where: str, allow: Sequence[str]) -> BaseCheck:
    """Check by what older versions recorded: the commit of a hub model, or a sample of its weights."""
    identity = _newest_facts(source)[0].get("base_identity")
    kind, own_identity = old_kind(identity), old_base_identity(folder)
    if kind is None:
        return BaseCheck(False, f"{where} does not say what its base was")
    if old_kind(own_identity) != kind:
        return BaseCheck(
            False,
            f"{where} knows its base by its {kind}, and of the one given the {old_kind(own_identity)} alone is known",
        )
    if own_identity != identity and "model.content" in allow:
        return BaseCheck(
            True, f"another as allowed ({kind} {short(own_identity)}, {short(str(identity))} in {where})"
        )
    if own_identity != identity:
        raise CheckpointError(
            f"{folder}: is not the base that the run was trained on ({kind} {short(own_identity)} here, "
            f"{short(str(identity))} in {where}); give the same one with --base-model, or --allow model.content"
        )
    if kind == "sample":
        return BaseCheck(
            True, f"the same sampled content ({short(own_identity)}, not all bytes) as in {where}"
        )
    return BaseCheck(True, f"the same commit ({short(own_identity)}) as in {where}")


@unreadable_is_refused()
def find_base(adapter: Adapter, base_model: str | None = None) -> Path:
    """Return the folder of the base model: `base_model`, or what the adapter names; a local folder or a hub id.

    Raises:
        CheckpointError: it cannot be had.
    """
    name = base_model or adapter.base
    if not name:
        raise CheckpointError(
            f"{adapter.path}: its adapter_config.json names no base model; give it with --base-model"
        )
    folder = embedded_folder() / "model" if name == EMBEDDED else Path(name).expanduser()
    if name == EMBEDDED and not folder.is_dir():
        raise CheckpointError(
            f"{name}: the embedded base is not in the cache; run `samestep prepare embedded`"
        )
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json; give the base model's folder with --base-model")
        refuse_unsafe_base(folder, None)
        return folder.resolve()
    if not is_hub_id(name):
        raise CheckpointError(
            f"{printable(name)[:200]}: no such folder; give the base model's folder or hub id with --base-model"
        )
    folder = _hub_base(name, _revision(name, adapter))
    refuse_unsafe_base(folder, None)
    return folder


def old_base_change(source: Path, folder: Path) -> Change | None:
    """Compare a base with what an older version recorded beside an adapter, as far as that can be compared."""
    identity = _newest_facts(source)[0].get("base_identity")
    own_identity = old_base_identity(folder)
    comparable = old_kind(identity) is not None and old_kind(identity) == old_kind(own_identity)
    return (
        Change("model.content", identity, own_identity) if comparable and identity != own_identity else None
    )


def add_allow(parser: argparse.ArgumentParser) -> None:
    """Which parts of the run's identity may differ."""
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PART",
        help="go on although this part differs from the training's, such as model.processor; may be repeated",
    )


def recorded_at(source: Path) -> tuple[RunIdentity | None, str]:
    """Return the record of the newest checkpoint beside an adapter, else the plan's, and where; or None and why."""
    facts, where = _newest_facts(source)
    if facts:
        return recorded_identity(facts), where
    run = run_containing(source)
    if run is not None and (plan := old_plan(run)) is not None and plan.identity:
        return planned_identity(plan), run.plan_file.name
    return None, where


def _newest_facts(source: Path) -> tuple[dict[str, Any], str]:
    """Return the facts of the newest checkpoint beside an adapter, and where they stand; else none and the reason."""
    run = run_containing(source)
    if (source / MANIFEST).is_file():
        folders = [source]
    elif run is not None:
        folders = list(reversed(run.checkpoints()))
    else:
        return {}, f"{source.name} is no checkpoint of samestep and lies in no run"
    reason = "no checkpoint of the run is left, which would say what its base was"
    for folder in folders:
        where = f"{folder.name}/{MANIFEST}"
        try:
            facts = read_mapping(folder / MANIFEST, TABLE)["facts"]
        except (*UNREADABLE, LookupError):
            continue  # never published: says nothing
        if isinstance(facts, dict) and (facts.get("identity") or facts.get("base_identity")):
            return facts, where
        reason = f"{where} does not say what its base was"
    return {}, reason


def _revision(name: str, adapter: Adapter) -> str:
    """Return the revision that the run was trained on, when its recipe lies beside the adapter; else the adapter's."""
    recipe = run_recipe(adapter.path)
    if recipe is not None and recipe.model.name_or_path == name:
        return recipe.model.revision
    return adapter.revision if adapter.revision and adapter.base == name else "main"


def _hub_base(name: str, revision: str) -> Path:
    """The folder of a hub model's weights in the cache, whole; downloads what is missing."""
    patterns, key = ["*.safetensors", *COPIED], "--base-model"
    with suppress(ConfigError, CheckpointError):  # not in the cache, or only a part of it
        cached = hub_snapshot(name, revision, patterns, key, local_files_only=True)
        read_base_shards(cached)
        return cached
    try:
        return hub_snapshot(name, revision, patterns, key, local_files_only=False)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def refuse_quantized_base(folder: Path) -> None:
    """CheckpointError when a model's weights are stored quantized."""
    quantization = _config(folder).quantization_config
    if quantization:
        kind = printable(str(quantization.get("quant_method", "unknown method")))[:60]
        raise CheckpointError(
            f"{folder}: its weights are quantized ({kind}); merging would round the sum again, "
            "give the original bf16 or fp32 model with --base-model"
        )


def ties_embeddings(folder: Path) -> bool:
    """Return whether a model's lm_head is its embedding."""
    config = _config(folder)
    return bool(config.tie_word_embeddings or (config.text_config or {}).get("tie_word_embeddings"))


def has_vision(folder: Path) -> bool:
    """Return whether a model sees images."""
    return _config(folder).vision_config is not None


def base_family(folder: Path) -> Family:
    """The family of a base; CheckpointError when it is none that can be merged here."""
    file = folder / "config.json"
    try:
        return family_of(read_json_object(file))
    except ValueError as error:
        raise CheckpointError(f"{file}: is of {error}") from None


def _config(folder: Path) -> _Config:
    file = folder / "config.json"
    return checked(_Config, read_json_object(file), file)
