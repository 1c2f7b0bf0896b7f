"""A sharded checkpoint: who writes what, what comes back, and what is said when a part cannot be written or read."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from launch.checkpoints.manifest import SHARDS, read_manifest
from launch.checkpoints.publish import partial_folder, publish, sync_and_hash
from launch.checkpoints.scan import newest_valid
from launch.errors import CheckpointError, ConfigError, RunError
from launch.recipe.loading import recipe_from_dict
from launch.run.directory import RunDirectory
from launch.run.request_files import copy_checkpoint
from tests.conftest import recipe_values
from tests.helpers.adapters import random_adapter
from tests.helpers.checkpoints import change_one_bit, halve
from tests.helpers.merging import merge
from trainer.checkpoint.saver import SHARDED_FROM_BYTES, checkpoint_form, load_checkpoint
from trainer.engine.replicated import Replicated
from trainer.export.consolidate import consolidate
from trainer.formats.detect import import_checkpoint, read_sharded
from trainer.formats.portable import save_adapter, save_adapter_config
from trainer.formats.sharded import DcpRankState, InMemoryCheckpointEngine, ZeroRankState, partition_by_size
from trainer.import_checkpoint import refuse_what_we_do_not_train
from trainer.model.lora import trainable_parameters


@dataclass(frozen=True)
class Trained:
    """A tiny model with an adapter, and an engine whose optimizer has taken a step."""

    model: PeftModel
    engine: Replicated


@pytest.fixture(scope="module")
def trained(world: Path) -> Trained:
    model = random_adapter(recipe_from_dict(recipe_values(world)))
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-3)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    optimizer.step()
    engine = Replicated(parameters)
    engine.attach(model, optimizer)
    return Trained(model, engine)


def _publish(trained: Trained, run: Path, step: int = 7) -> Path:
    """As one process saves it."""
    aside = partial_folder(run, step)
    (aside / SHARDS).mkdir(parents=True)
    names = trained.engine.rank_state(step).write(aside / SHARDS, None)
    known = sync_and_hash(aside, [f"{SHARDS}/{name}" for name in names])
    save_adapter_config(trained.model, aside)
    publish(aside, run / f"checkpoint-{step}", {"step": step, "form": "sharded"}, known=known)
    return run / f"checkpoint-{step}"


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """The kernel lets no file grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# who writes what -------------------------------------------------------------------------


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 1000), max_size=30), st.integers(1, 9))
def test_every_tensor_is_written_by_one_rank_and_none_writes_much_more_than_another(
    sizes: dict[str, int], ranks: int
) -> None:
    parts = partition_by_size(sizes, ranks)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
    assert parts == partition_by_size(dict(reversed(list(sizes.items()))), ranks)  # alike on all ranks


def test_auto_is_sharded_from_one_gigabyte_of_weights_and_moments_on() -> None:
    assert checkpoint_form("auto", SHARDED_FROM_BYTES // 12) == "portable"
    assert checkpoint_form("auto", SHARDED_FROM_BYTES // 12 + 1) == "sharded"
    assert checkpoint_form("portable", SHARDED_FROM_BYTES) == "portable"
    assert checkpoint_form("sharded", 1) == "sharded"


# what comes back -------------------------------------------------------------------------


def test_the_state_comes_back_to_the_bit_and_makes_an_adapter(trained: Trained, tmp_path: Path) -> None:
    checkpoint = _publish(trained, tmp_path)
    state = trained.engine.full_state()
    assert state is not None
    found = import_checkpoint(checkpoint)
    assert found.form == "sharded checkpoint of samestep (torch DCP, 1 files)"
    assert (found.source, found.step, found.lost) == (checkpoint, 7, ())
    assert found.optimizer_state.keys() == state.optimizer.keys()
    assert all(torch.equal(found.optimizer_state[name], tensor) for name, tensor in state.optimizer.items())
    save_adapter(trained.model, tmp_path / "meant")
    consolidate(checkpoint, tmp_path / "adapter")
    written, meant = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "meant")
    )
    assert written.keys() == meant.keys()
    assert all(torch.equal(written[name], meant[name]) for name in meant)
    configs = [
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (checkpoint, tmp_path / "meant")
    ]
    assert configs[0] == configs[1]


def test_a_model_takes_the_adapter_and_gets_the_moments(
    trained: Trained, world: Path, tmp_path: Path
) -> None:
    checkpoint = _publish(trained, tmp_path)
    shapes = {name: parameter.shape for name, parameter in trained.engine.parameters.items()}
    other = random_adapter(recipe_from_dict(recipe_values(world)))
    optimizer_state = load_checkpoint(other, shapes, checkpoint)
    assert optimizer_state is not None
    for name, parameter in trainable_parameters(other).items():
        assert torch.equal(parameter, trained.engine.parameters[name])
    with pytest.raises(CheckpointError, match="holds other parameters than the model trains"):
        load_checkpoint(other, dict(list(shapes.items())[1:]), checkpoint)


def test_what_deepspeed_would_write_is_copied_before_the_next_step(tmp_path: Path) -> None:
    kept, weight = InMemoryCheckpointEngine(), torch.ones(3)
    kept.save({"module": {}, "param_shapes": [{"w": torch.Size([3])}]}, "./step/model.pt")
    kept.save({"groups": [weight], "count": 2}, "./step/optimizer.pt")
    weight.zero_()
    assert kept.files["step/model.pt"] == {"module": {}, "param_shapes": [{"w": torch.Size([3])}]}
    names = ZeroRankState({**kept.files, "latest": "step"}).write(tmp_path, None)
    assert set(names) == {"step/model.pt", "step/optimizer.pt", "latest"}
    assert torch.load(tmp_path / "step" / "optimizer.pt")["groups"][0].tolist() == [1, 1, 1]
    assert (tmp_path / "latest").read_text() == "step"


def test_it_merges_and_begins_another_run_like_a_portable_one(
    trained: Trained, world: Path, tmp_path: Path
) -> None:
    checkpoint, base = _publish(trained, tmp_path), str(world / "base")
    save_adapter(trained.model, tmp_path / "adapter")
    for source in (checkpoint, tmp_path / "adapter"):
        merge(source, tmp_path / "merged" / source.name, base_model=base)
    one, other = (load_file(file) for file in sorted((tmp_path / "merged").glob("*/model.safetensors")))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    run = RunDirectory(tmp_path / "other")
    run.path.mkdir()
    copy_checkpoint(checkpoint, run)
    assert read_manifest(run.checkpoint(7), verify=True)["facts"]["copied_from"] == str(checkpoint)
    copy, original = (read_sharded(folder) for folder in (run.checkpoint(7), checkpoint))
    assert copy is not None
    assert original is not None
    assert all(
        torch.equal(copy.optimizer_state[name], tensor) for name, tensor in original.optimizer_state.items()
    )


# what goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dcp", "zero"])
def test_a_disk_that_is_full_is_named_with_the_file(trained: Trained, tmp_path: Path, kind: str) -> None:
    zero = ZeroRankState({"step/optimizer.pt": {"groups": [torch.ones(100_000)]}})
    part: DcpRankState | ZeroRankState = zero if kind == "zero" else trained.engine.rank_state(7)
    with little_room(5_000), pytest.raises(RunError, match="File too large; make room") as refused:
        part.write(tmp_path, None)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("kind", ["dcp", "zero"])
def test_what_the_disk_makes_of_a_part_is_found_before_it_is_published(
    trained: Trained, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(content: Any, *args: Any, **kwargs: Any) -> None:
        real_save(
            {"groups": [torch.zeros(9)]} if kind == "zero" else torch.zeros_like(content), *args, **kwargs
        )

    real_save = torch.save
    monkeypatch.setattr(torch, "save", save)
    part = (
        ZeroRankState({"optimizer.pt": {"groups": [torch.ones(9)]}})
        if kind == "zero"
        else trained.engine.rank_state(7)
    )
    with pytest.raises(RunError, match="tensors were not written as they are; the disk is damaged"):
        part.write(tmp_path, None)


@pytest.mark.parametrize("harm", [change_one_bit, halve, Path.unlink])
def test_a_damaged_or_missing_part_is_named_and_the_older_checkpoint_counts(
    trained: Trained, tmp_path: Path, harm: Any
) -> None:
    older, newest = _publish(trained, tmp_path, 5), _publish(trained, tmp_path, 7)
    harm(newest / SHARDS / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"shards/__0_0\.distcp: (has another|is missing)"):
        import_checkpoint(newest)
    found, passed_over = newest_valid(tmp_path)
    assert found is not None
    assert found.folder == older
    assert "shards/__0_0.distcp" in passed_over[0].problems[0]


def test_a_part_that_nobody_verified_is_refused_in_words(trained: Trained, tmp_path: Path) -> None:
    checkpoint = _publish(trained, tmp_path)
    file = checkpoint / SHARDS / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_sharded(checkpoint)


def test_a_part_on_another_machines_own_disk_is_not_published(tmp_path: Path) -> None:
    aside = partial_folder(tmp_path, 7)
    aside.mkdir()
    known = {"shards/__1_0.distcp": {"bytes": 1000, "sha256": "0" * 64}}
    with pytest.raises(CheckpointError, match="put the run directory on a disk that all nodes share"):
        publish(aside, tmp_path / "checkpoint-7", {"step": 7}, known=known)
    assert newest_valid(tmp_path)[0] is None


def test_what_the_ranks_told_of_their_files_is_what_is_verified(trained: Trained, tmp_path: Path) -> None:
    files = read_manifest(_publish(trained, tmp_path), verify=True)["files"]
    assert set(files) == {"adapter_config.json", "shards/.metadata", "shards/__0_0.distcp"}


def test_a_checkpoint_of_ours_is_not_taken_over_as_a_foreign_one(
    trained: Trained, world: Path, tmp_path: Path
) -> None:
    found = import_checkpoint(_publish(trained, tmp_path))
    with pytest.raises((CheckpointError, ConfigError), match="is a checkpoint of samestep"):
        refuse_what_we_do_not_train(recipe_from_dict(recipe_values(world)), found)
