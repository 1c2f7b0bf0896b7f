"""What stands between a request and a run directory: what may differ, where the run goes on, what is written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from launch.checkpoints.adapter_file import ADAPTER_CONFIG
from launch.checkpoints.manifest import MANIFEST, read_manifest
from launch.checkpoints.scan import Checkpoint, newest_valid
from launch.errors import CheckpointError, ConfigError, SamestepError
from launch.inputs.identity import TRAIN_ROWS, RunIdentity, recorded_identity
from launch.planning.plan import Plan, RunHistory, SamplesDigest
from launch.planning.step_plan import StreamOffset
from launch.planning.topology import Topology
from launch.recipe.fingerprint import LATER, altering_values
from launch.recipe.loading import load_recipe
from launch.run.changes import (
    OTHER_RUN,
    Change,
    changes,
    content_changes,
    refuse_changes,
    refuse_unknown_keys,
    still_allowed,
)
from launch.run.request_files import old_plan
from launch.untrusted_files import UNREADABLE, read_yaml

if TYPE_CHECKING:
    from launch.recipe.schema import Recipe
    from launch.run.directory import RunDirectory

_OTHER_SOURCE = "begin with another checkpoint, or from nothing"


@dataclass(frozen=True)
class Continuation(RunHistory):
    """How a request goes on with what was begun before: nothing, the run itself, or `source`, another run's checkpoint.

    `source` is None once the run has a checkpoint of its own; `started_from` says for ever where it came from.
    `changed`: values of the recipe that differ from before, and are allowed to.
    """

    changed: tuple[Change, ...] = ()
    source: Path | None = None


class _Metadata(BaseModel):
    """What a plan needs to know of a checkpoint, of all that the trainer writes into its manifest."""

    model_config = ConfigDict(strict=True, frozen=True)

    step: int
    samples_consumed: int
    global_batch_size: int
    begin: StreamOffset
    recipe: dict[str, Any]
    dataset_fingerprint: str
    identity: dict[str, str] = {}


def continue_run(
    run: RunDirectory, recipe: Recipe, allow: Sequence[str], source: Path | None = None
) -> Continuation:
    """Hold a request against the run that was begun under its name, or against `source`. Writes nothing.

    What was allowed once stays so: the run may have been killed before a checkpoint of its own said it.

    Raises:
        ConfigError: the recipe differs in values that are not allowed to, all of them named.
        CheckpointError: `source` is no published checkpoint of ours, or damaged.
    """
    refuse_unknown_keys(allow, [*LATER, *altering_values(recipe)])
    changed = _changed_since(run, recipe, allow)
    size, old = recipe.batch.global_batch_size, old_plan(run)
    before = old.started_from if old else ""
    now = str(source.expanduser().resolve()) if source else before  # killed before the copy was there: again
    if now != before and _has_begun(run):
        raise ConfigError(
            f"--from: the run {run.name} began with {before or 'nothing'}, not with {now}; leave --from out to go "
            f"on with it, or {OTHER_RUN}"
        )
    carried = still_allowed(old.allowed, allow) if old and now == before else []
    allowed = tuple(sorted({*allow, *carried}))
    if not now or _has_begun(run):
        digest: SamplesDigest = old.samples_digest if old and _has_begun(run) else "content"
        return Continuation(_begin_of(run, old, size), allowed, now, digest, tuple(changed))
    metadata = _metadata_of_source(Path(now))
    changed = changes(metadata.recipe, altering_values(recipe))
    refuse_changes(changed, allowed, now, _OTHER_SOURCE)
    return Continuation(_begin_at(metadata, size), allowed, now, changed=tuple(changed), source=Path(now))


def as_begun(run: RunDirectory, recipe: Recipe, source: Path | None = None) -> Recipe:
    """Return a request's recipe as an older version began the run, or `source`: the same command goes on with it.

    A key that the request does not have takes the value that means what older versions did (`LATER`), where the run has
    that value or its version did not know the key.
    """
    begun = _values_begun_with(run, source)
    if begun is None:
        return recipe
    for dotted in altering_values(recipe).keys() & LATER.keys():
        name, _, key = dotted.partition(".")
        section, value = getattr(recipe, name), LATER[dotted]
        if begun.get(dotted, value) == value and key not in section.model_fields_set:
            recipe = recipe.model_copy(update={name: section.model_copy(update={key: value})})
    return recipe


def _values_begun_with(run: RunDirectory, source: Path | None) -> dict[str, Any] | None:
    """Dotted key -> value of what is recorded of the beginning: by the run's own recipe, else by its newest checkpoint
    or by `source`. None where nothing is, or nothing that can be read: `continue_run` says what is wrong with it.
    """
    with suppress(*UNREADABLE):
        if isinstance(own := read_yaml(run.recipe_file), dict):
            sections = {name: values for name, values in own.items() if isinstance(values, dict)}
            return {
                f"{name}.{key}": each for name, values in sections.items() for key, each in values.items()
            }
    with suppress(*UNREADABLE, SamestepError, LookupError):
        newest = run.checkpoints()[-1] if run.checkpoints() else None
        if folder := newest or source:
            return dict(read_manifest(folder, verify=False)["facts"]["recipe"])
    return None


def _has_begun(run: RunDirectory) -> bool:
    """There is something that another beginning would lose."""
    return bool(run.checkpoints()) or run.adapter.exists()


def refuse_lost_checkpoints(
    run: RunDirectory, passed_over: Sequence[Checkpoint] = (), begins_at: int = 0
) -> None:
    """Refuse to begin anew in the place of what was there, where no checkpoint is valid any more.

    `passed_over`: those that cannot be used; `begins_at`: the step that the run's plan goes on from.

    Raises:
        CheckpointError: the run has a result, checkpoints or a beginning that would be lost.
    """
    if (run.adapter / ADAPTER_CONFIG).is_file() and not run.checkpoints():
        raise CheckpointError(
            f"{run.adapter}: the run has a result and no checkpoint to go on from (0 are left); bring one back from "
            "a copy, or begin anew with --fresh"
        )
    if damaged := [checkpoint for checkpoint in passed_over if checkpoint.published]:
        names = ", ".join(checkpoint.folder.name for checkpoint in damaged)
        raise CheckpointError(
            f"{run.path}: every published checkpoint is damaged ({names}; {damaged[0].problems[0]}); "
            "bring one back from a copy, or begin anew with --fresh"
        )
    if begins_at:
        raise CheckpointError(
            f"{run.path}: goes on from step {begins_at} by its plan, and no checkpoint is there; "
            "bring one back from a copy, or begin anew with --fresh"
        )


def _changed_since(run: RunDirectory, recipe: Recipe, allow: Sequence[str]) -> list[Change]:
    if not run.recipe_file.is_file():
        return []
    try:
        before = load_recipe(run.recipe_file)
    except ConfigError as error:
        raise ConfigError(
            [*error.problems, f"{run.recipe_file}: what the run was begun with cannot be read; {OTHER_RUN}"]
        ) from None
    changed = changes(altering_values(before), altering_values(recipe))
    refuse_changes(changed, allow, str(run.path))
    return changed


def _begin_of(run: RunDirectory, old: Plan | None, size: int) -> StreamOffset:
    """Where the arithmetic of a run begins: as its newest checkpoint says, for steps of `size` samples.

    That is read only where the size changed, now or before: then the plan's word is not enough, for the checkpoint
    that the plan began with may have been damaged since.
    """
    same = old is not None and old.global_batch_size == size
    if not run.checkpoints():
        return old.begin if old and same and run.adapter.exists() else StreamOffset()
    if old and same and old.begin == StreamOffset():
        return StreamOffset()
    newest, _ = newest_valid(run.path)
    return _begin_at(_read_metadata(newest.folder, newest.metadata), size) if newest else StreamOffset()


def _begin_at(metadata: _Metadata, size: int) -> StreamOffset:
    """Take the arithmetic of the checkpoint's own plan, or from the checkpoint on with another global batch size."""
    return (
        metadata.begin
        if metadata.global_batch_size == size
        else StreamOffset(metadata.step, metadata.samples_consumed)
    )


def refuse_another_identity(
    run: RunDirectory, identity: RunIdentity, allow: Sequence[str], source: Path | None = None
) -> list[Change]:
    """Rows, weights or settings that differ behind the same words, unless allowed, which are returned.

    A run without a step has nothing to lose; what an older version did not record is not compared. `source`: the
    checkpoint of another run to begin with.
    """
    if source is not None:
        recorded = recorded_identity(_metadata_of_source(source).model_dump(exclude_unset=True))
        place, instead = str(source), _OTHER_SOURCE
    else:
        plan = old_plan(run) if _has_begun(run) else None
        recorded = planned_identity(plan) if plan else RunIdentity({})
        place, instead = str(run.path), OTHER_RUN
    changed = content_changes(recorded, identity)
    refuse_changes(changed, allow, place, instead)
    return changed


def planned_identity(plan: Plan) -> RunIdentity:
    """What a plan was made for; of one that an older version made, the rows of training alone."""
    return RunIdentity({**plan.identity, TRAIN_ROWS: plan.dataset_fingerprint})


def refuse_an_end_behind(run: RunDirectory, max_steps: int, source: Path | None = None) -> None:
    """ConfigError when the run, or the checkpoint it is to begin with, has taken more than `max_steps` steps."""
    if source is not None:
        step = _metadata_of_source(source).step
    elif any(int(folder.name.partition("-")[2]) > max_steps for folder in run.checkpoints()):
        newest, _ = newest_valid(run.path)
        step = newest.step if newest else 0
    else:
        return
    if step > max_steps:
        raise ConfigError(
            f"training.max_steps: {source or run.path} is beyond that end already ({max_steps:,} < {step:,} steps); "
            f"raise it or training.num_train_epochs, or {_OTHER_SOURCE if source else OTHER_RUN}"
        )


def _metadata_of_source(source: Path) -> _Metadata:
    if not source.is_dir():
        raise CheckpointError(f"--from: no such folder ({source}); see `samestep checkpoints` of the old run")
    if not (source / MANIFEST).is_file():
        raise CheckpointError(
            f"--from: {source} has no {MANIFEST}, so it is no checkpoint of samestep; "
            "`samestep run --from` takes over what other libraries wrote"
        )
    return _read_metadata(source, read_manifest(source, verify=True)["facts"])


def _read_metadata(folder: Path, metadata: dict[str, Any]) -> _Metadata:
    known = {name: metadata[name] for name in _Metadata.model_fields if name in metadata}
    try:
        return _Metadata.model_validate_json(json.dumps(known))
    except ValidationError as error:
        missing = ", ".join(sorted({str(detail["loc"][0]) for detail in error.errors()}))
        raise CheckpointError(
            f"{folder}: its manifest does not say what a plan needs ({missing}); it is of another version or kind, "
            "use a checkpoint that `samestep run` wrote"
        ) from None


_SETTINGS_DEPEND_ON = (
    ("model", "resident_weights"),
    ("model", "products"),
    ("training", "gradient_checkpointing"),
    ("batch", "micro_batch_tokens"),
    ("batch", "prefix_sharing"),
    ("batch", "global_batch_size"),
    ("lora", "r"),
    ("lora", "target_modules"),
)
"""What the settings of a plan depend on, of what may change between two attempts at a run."""


def plan_to_keep(run: RunDirectory, recipe: Recipe, topology: Topology, fingerprint: str) -> Plan | None:
    """Return the plan of an earlier attempt when its settings hold for this one too: same hardware, data and wishes.

    `fingerprint`: of the dataset. So a run that goes on takes the settings that it was tried with, or that it came down
    to when it ran out of memory.
    """
    old = old_plan(run)
    if old is None or old.dataset_fingerprint != fingerprint:
        return None
    if old.topology != replace(topology, packages_here=True):
        return None
    try:
        recipe_before = load_recipe(run.recipe_file)
    except ConfigError:
        return None
    same = all(
        getattr(getattr(recipe_before, section), key) == getattr(getattr(recipe, section), key)
        for section, key in _SETTINGS_DEPEND_ON
    )
    return old if same else None
