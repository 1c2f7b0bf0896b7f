"""One rank finds all vision features and the other none: nobody waits for the other's tower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.distributed.forked import forked_launch
from tests.helpers.distributed.recorded import apart, write_recipe
from trainer import train
from trainer.prepare import main as prepare

SAMPLES = 6 * 8


@pytest.mark.parametrize(
    "strategy",
    ["zero3", pytest.param("ddp", marks=pytest.mark.long), pytest.param("fsdp", marks=pytest.mark.long)],
)
def test_a_rank_without_its_tower_and_one_with_it_take_the_same_steps(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """Less than an epoch, evaluated at the end: to rank 1 no image comes twice."""
    monkeypatch.setenv("SAMESTEP_VISION_CACHE", str(tmp_path / "features"))
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    changes = {"training": {"max_steps": 6}, "evaluation": {"every_steps": 6, "max_samples": 4}}
    off = write_recipe(world, tmp_path / "off.yaml", **changes)
    disk = write_recipe(world, tmp_path / "disk.yaml", data={"vision_cache": "disk"}, **changes)
    assert train.main([str(off), "--runs-dir", str(tmp_path), "--name", "off"]) == 0
    assert prepare([str(disk), "--vision", "--quiet"]) == 0
    arguments = [str(disk), "--runs-dir", str(tmp_path), "--name", "on"]
    done = forked_launch(2, ["tests.helpers.distributed.cached_on_rank_0", *arguments], strategy=strategy)
    assert done.returncode == 0, done.stdout
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert [computed for _, computed in told] == [0, told[1][0]]
    assert sum(needed for needed, _ in told) >= SAMPLES + 4
    loss, weights = apart(tmp_path / "on", tmp_path / "off")
    print(f"{strategy}: losses within {loss:.1e} relative, adapters within {weights:.1e}")
    assert max(loss, weights) <= 1e-6
    assert not (tmp_path / "compiled").exists()  # DeepSpeed would, for a minute, what training does not use
