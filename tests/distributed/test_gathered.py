"""zero3 brings a decoder layer together as a whole, and lets it go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.distributed.forked import forked_launch
from tests.helpers.distributed.here import drive_here
from tests.helpers.distributed.recorded import apart, write_recipe

RUNS: dict[str, bool | int] = {
    "plain-none": False,
    "plain-second": 2,
    "fused-none": False,
    "fused-second": 2,
}
"""Name of a run -> every how many layers one is computed again."""
LAYERS = 2
DTYPES = 2  # of a layer's weights: uint8 and float32


@pytest.fixture(scope="module")
def folder(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs, and `single`, plain and without recomputation."""
    folder = tmp_path_factory.mktemp("gathered")
    requests = []
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
        requests.append([str(file), "--runs-dir", str(folder), "--name", name])
    (folder / "requests").write_text(json.dumps(requests[:-1]))
    done = forked_launch(
        2, ["tests.helpers.distributed.gathered", str(folder / "requests")], strategy="zero3"
    )
    assert done.returncode == 0, done.stdout
    drive_here([(requests[-1], None)])
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_step_is_that_of_one_process(folder: Path, name: str) -> None:
    loss, weights = apart(folder / name, folder / "single")
    print(f"{name}: losses within {loss:.1e} relative, adapters within {weights:.1e}")
    assert loss <= 1e-5
    assert weights <= 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_no_layer_stays_whole_and_each_comes_with_one_collective_a_dtype(folder: Path, name: str) -> None:
    seen = json.loads((folder / f"{name}.json").read_text())
    assert [what for what, *_ in seen] == [*["training"] * 4, "evaluation"] * 2  # two micro-batches a step
    assert {fused for *_, fused in seen} == {name.startswith("fused")}
    assert [whole for *_, whole, _ in seen] == [[]] * len(seen)
    # Once DeepSpeed knows the order, the last layer stays from its forward to its backward.
    assert [taken for what, taken, *_ in seen if what == "training"][-1] == DTYPES * (2 * LAYERS - 1)
