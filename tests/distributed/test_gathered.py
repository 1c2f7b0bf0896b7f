"""fsdp and zero3 bring a decoder layer together ahead of its computation, and let it go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.distributed.forked import forked_launch
from tests.helpers.distributed.here import drive_here
from tests.helpers.distributed.recorded import apart, write_recipe

RUNS: dict[str, bool | int] = {"plain-none": False, "plain-second": 2, "fused-second": 2, "kept-none": False}
"""Name of a run -> every how many layers one is computed again."""
STRATEGIES = ("zero3", "fsdp")
LAYERS = 2


@pytest.fixture(scope="module")
def folder(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs under both strategies, and `single`, plain and without recomputation."""
    folder = tmp_path_factory.mktemp("gathered")
    files = {}
    for name, every in (*RUNS.items(), ("single", False)):
        training = {"max_steps": 4, "warmup_steps": 0, "gradient_checkpointing": every}
        file = write_recipe(
            world,
            folder / f"{name}.yaml",
            "nf4",
            training=training,
            batch={"micro_batch_tokens": 200},
            evaluation={"every_steps": 2, "max_samples": 4},
        )
        files[name] = str(file)
    for strategy in STRATEGIES:
        words = [[files[name], "--runs-dir", str(folder), "--name", f"{name}-{strategy}"] for name in RUNS]
        (folder / "requests").write_text(json.dumps(words))
        done = forked_launch(
            2, ["tests.helpers.distributed.gathered", str(folder / "requests")], strategy=strategy
        )
        assert done.returncode == 0, done.stdout
    drive_here([([files["single"], "--runs-dir", str(folder), "--name", "single"], None)])
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", RUNS)
def test_a_step_is_that_of_one_process(folder: Path, name: str, strategy: str) -> None:
    loss, weights = apart(folder / f"{name}-{strategy}", folder / "single")
    print(f"{name}, {strategy}: losses within {loss:.1e} relative, adapters within {weights:.1e}")
    assert loss <= 1e-5
    assert weights <= 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", RUNS)
def test_a_layer_comes_with_one_collective_and_stays_where_the_plan_keeps_it(
    folder: Path, name: str, strategy: str
) -> None:
    seen = json.loads((folder / f"{name}-{strategy}.json").read_text())
    assert [what for what, *_ in seen] == [*["training"] * 4, "evaluation"] * 2  # two micro-batches a step
    assert {fused for *_, fused in seen} == {name.startswith("fused")}
    kept = [0] if name.startswith("kept") else []
    # The last layer stays from its forward to its backward, which comes after no evaluation.
    assert [whole for what, _, whole, _ in seen if what == "training"] == [kept] * 8
    assert [whole for what, _, whole, _ in seen if what == "evaluation"] == [[*kept, LAYERS - 1]] * 2
    gathered = LAYERS - len(kept)
    assert [taken for what, taken, *_ in seen if what == "training"][1:4] == [2 * gathered - 1] * 3
