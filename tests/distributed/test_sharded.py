"""Sharded checkpoints of real launches: a full disk, a kill in a save, another strategy on another world size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.checkpoints.scan import scan_checkpoints
from launch.monitor.checkpoint_table import table_rows
from tests.helpers.distributed.forked import forked_launch
from tests.helpers.distributed.launching import drive, published_steps
from tests.helpers.distributed.recorded import apart, assert_the_same_to_the_byte, run_of, write_recipe
from trainer.export.consolidate import consolidate
from trainer.formats.detect import import_checkpoint


@dataclass(frozen=True)
class Launched:
    """Where the runs lie, and what the launch that broke them said."""

    folder: Path
    said: str
    steps_of_killed: list[int]


@pytest.fixture(scope="module")
def launched(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """zero3 on 2 processes, where saves go wrong; then the run that was killed goes on with fsdp on 3."""
    folder = tmp_path_factory.mktemp("sharded")
    checkpoint = {"every_steps": 2, "keep": 9, "format": "sharded"}
    recipe = write_recipe(world, folder / "recipe.yaml", "nf4", checkpoint=checkpoint)
    arguments = [str(recipe), "--runs-dir", str(folder)]
    broken = forked_launch(2, ["tests.helpers.distributed.break_saves", *arguments], strategy="zero3")
    steps = published_steps(folder / "killed")
    assert broken.returncode != 0, broken.stdout
    drive(3, [([*arguments, "--name", "killed"], None)], folder, strategy="fsdp")
    return Launched(folder, broken.stdout, steps)


def test_a_rank_without_room_stops_all_with_its_reason_and_leaves_nothing_published(
    launched: Launched,
) -> None:
    for rank in range(2):
        words = f"rank {rank} ended with: rank 1: {launched.folder}/full/checkpoint-4.partial/shards/global_step4/"
        assert launched.said.count(words) == 1, launched.said
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt: File too large; make room" in launched.said


def test_the_same_command_goes_on_from_its_shards_to_the_same_bytes(launched: Launched) -> None:
    assert "resuming at step 2 of 8" in launched.said
    assert_the_same_to_the_byte(launched.folder / "full", launched.folder / "straight")
    found = [row[:4] + row[6:] for row in table_rows(scan_checkpoints(launched.folder / "full"), now=0)]
    assert found == [(str(step), "sharded", "2", "zero3", "valid") for step in (2, 4, 6, 8)]


def test_a_kill_in_a_save_costs_that_save_alone_and_another_strategy_takes_the_same_steps(
    launched: Launched,
) -> None:
    assert launched.steps_of_killed == [2]
    killed = launched.folder / "killed"
    loss, weights = apart(killed, launched.folder / "straight")
    print(f"zero3 on 2 -> fsdp on 3: losses within {loss:.1e}, adapters within {weights:.1e}")
    assert loss <= 1e-6
    assert weights <= 1e-6
    layouts = {
        step: [run_of(killed).facts(step)[key] for key in ("strategy", "world_size")] for step in (2, 4)
    }
    assert layouts == {2: ["zero3", 2], 4: ["fsdp", 3]}


def test_every_rank_writes_a_part_and_together_they_are_the_adapter(
    launched: Launched, tmp_path: Path
) -> None:
    sizes = {}
    for name, form in (("straight", "DeepSpeed ZeRO-3 of 2 ranks"), ("killed", "torch DCP, 3 files")):
        last = launched.folder / name / "checkpoint-8"
        found = import_checkpoint(last)
        assert found.form == f"sharded checkpoint of samestep ({form})"
        assert (found.step, found.lost) == (8, ())
        consolidate(last, tmp_path / name)
        written = load_file(tmp_path / name / "adapter_model.safetensors")
        final = load_file(launched.folder / name / "adapter" / "adapter_model.safetensors")
        assert written.keys() == final.keys()
        assert all(torch.equal(written[key], final[key]) for key in final)
        pattern = "__*.distcp" if name == "killed" else "*/*_optim_states.pt"
        sizes[name] = [file.stat().st_size for file in (last / "shards").glob(pattern)]
    print(f"bytes of each rank's part: {sizes}")
    assert len(sizes["straight"]) == 2
    assert len(sizes["killed"]) == 3
    assert all(max(each) < 1.5 * min(each) for each in sizes.values())
