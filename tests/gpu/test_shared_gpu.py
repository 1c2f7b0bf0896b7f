"""Two ranks on one GPU over gloo, and ZeRO with one: the strategies where CPUs would hide a fault."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.launching import accelerate_launch
from tests.helpers.distributed.drive import FIXED, TRIED
from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import (
    GPU_TOLERANCES,
    apart,
    assert_came_down,
    run_of,
    write_recipe,
    write_recipes_of_dtypes,
    write_tried_recipe,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LAYOUTS = (("single", 1), ("ddp", 2), ("fsdp", 2), ("zero2", 1), ("zero3", 1))


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<dtype>-<strategy>`, NF4, 8 steps with dropout; `tried-<strategy>`, `fixed-<strategy>`, bfloat16, 2 steps."""
    folder = tmp_path_factory.mktemp("shared")
    recipes = write_recipes_of_dtypes(world, folder)
    tried = write_tried_recipe(world, folder / "tried.yaml", "bfloat16")
    for strategy, processes in LAYOUTS:
        requests = [
            ([str(recipe), "--runs-dir", str(folder), "--name", f"{dtype}-{strategy}"], None)
            for dtype, recipe in recipes.items()
        ]
        requests += [
            ([str(tried), "--runs-dir", str(folder), "--name", f"{name}-{strategy}"], None)
            for name in (TRIED, FIXED)
        ]
        drive(processes, requests, folder, strategy=strategy)
    return folder


@pytest.mark.parametrize(("strategy", "processes"), LAYOUTS[1:])
@pytest.mark.parametrize("dtype", GPU_TOLERANCES)
def test_a_strategy_takes_the_steps_of_one_process(
    runs: Path, dtype: str, strategy: str, processes: int
) -> None:
    plan = run_of(runs / f"{dtype}-{strategy}").plan
    assert (plan.strategy, plan.world_size, plan.device) == (strategy, processes, "cuda")
    loss, weights = apart(runs / f"{dtype}-{strategy}", runs / f"{dtype}-single")
    print(f"{dtype}, {strategy} x {processes}: losses within {loss:.1e}, adapters within {weights:.1e}")
    assert loss <= GPU_TOLERANCES[dtype]


@pytest.mark.parametrize("strategy", [strategy for strategy, _ in LAYOUTS])
def test_settings_come_down_in_a_trial_that_leaves_no_trace(runs: Path, strategy: str) -> None:
    tried, fixed = (runs / f"{name}-{strategy}" for name in (TRIED, FIXED))
    assert_came_down(tried, fixed)
    loss, weights = apart(tried, fixed)
    print(f"{strategy}: losses within {loss:.1e}, adapters within {weights:.1e}")
    assert loss <= GPU_TOLERANCES["bfloat16"]


def test_bytes_that_sharding_changes_are_noticed_before_a_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 storage in a bfloat16 model: FSDP2 copies a layer as numbers, and rewrites what looks like NaN.

    (A layer of several dtypes it copies as bytes.)
    """
    monkeypatch.setenv("PLANTED_STORAGE", "bfloat16")
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    (file,) = base.glob("*.safetensors")
    weights = load_file(file)
    (name,) = [name for name in weights if name.endswith("layers.0.self_attn.q_proj.weight")]
    weights[name].fill_(0.02)  # all of them the largest of their block: nothing but bytes 0xFF
    save_file(weights, file, {"format": "pt"})
    recipe = write_recipe(
        world,
        tmp_path / "recipe.yaml",
        "nf4",
        model={"name_or_path": str(base), "dtype": "bfloat16"},
        quantization={"bnb_4bit_compute_dtype": "bfloat16"},
    )
    requests = tmp_path / "requests.json"
    requests.write_text(f'[[["{recipe}", "--runs-dir", "{tmp_path}", "--name", "run"], null]]')
    ended = accelerate_launch(2, ["tests.helpers.distributed.drive", str(requests)], strategy="fsdp")
    assert ended.returncode != 0
    assert re.search(
        r"sharding changed the packed 4-bit bytes of decoder layer \d+ \(\d+ of \d+", ended.stdout
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
