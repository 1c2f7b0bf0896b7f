"""Small worlds the tests share: a random tiny Qwen2-VL, a mini dataset of ChartQA's schema, a recipe for both."""

from __future__ import annotations

import gc
import io
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
HAS_GPU = Path("/proc/driver/nvidia/version").exists()
if not HAS_GPU:
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # Triton reads it when it is imported: kernels run on the CPU
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts `make test &` so, and every child would be deaf to the tests' Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # `nohup make test`: the tests outlive their terminal still, and their children hear when one of theirs closes.
    signal.signal(signal.SIGHUP, lambda *_: None)

UNFREEZE = gc.unfreeze


def pytest_collection_finish() -> None:
    """Let Python's collector leave out what was imported, and what a training froze, which keeps its tiny models.

    In a process of many trainings each would look through a million objects, for as long as the training takes.
    """
    if not HAS_GPU:
        gc.collect()
        gc.freeze()
        gc.unfreeze = lambda: None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: one more than there are cores, as tests of launches wait for a third of their time."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`: the longest files first."""
    from tests.helpers.scheduling import LongestFirst

    return LongestFirst(config, log) if config.getvalue("dist") == "loadfile" else None


SPLIT_SIZES = {"train": 60, "val": 10, "test": 12}


def chart_png(seed: int) -> bytes:
    """A small bar chart, one of a dozen sizes."""
    draw = random.Random(seed)
    width, height = draw.choice([56, 84, 112, 140]), draw.choice([56, 84, 112])
    image = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(image)
    for bar in range(4):
        box = (bar * width // 4 + 2, draw.randint(4, height - 8), (bar + 1) * width // 4 - 2, height - 2)
        canvas.rectangle(box, fill=(draw.randint(0, 255), draw.randint(0, 255), draw.randint(0, 255)))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def chart_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of ChartQA's schema, of unequal length."""
    draw = random.Random(seed)
    return [
        {
            "image": {"bytes": chart_png(seed * 1000 + number), "path": None},
            "query": f"How high is bar {number} of {count}" + "?" * draw.randint(1, 9),
            "label": [str(draw.randint(0, 99))],
            "human_or_machine": number % 2,
        }
        for number in range(count)
    ]


def write_charts(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    """Parquet files `<split>-00000.parquet`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, split_rows in rows.items():
        pq.write_table(pa.Table.from_pylist(split_rows), folder / f"{split}-00000.parquet")
    return folder


def write_world(folder: Path) -> None:
    """The `charts/` and the `base/` of a small world."""
    from trainer.embedded.tiny_model import random_tiny

    rows = {split: chart_rows(count, seed) for seed, (split, count) in enumerate(SPLIT_SIZES.items())}
    write_charts(folder / "charts", rows)
    random_tiny(folder / "base")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `charts/`, `base/` and `cache/`, the last one being samestep's cache for the whole session."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    before = os.environ.get("SAMESTEP_CACHE")
    os.environ["SAMESTEP_CACHE"] = str(folder / "cache")
    yield folder
    if before is None:
        del os.environ["SAMESTEP_CACHE"]
    else:
        os.environ["SAMESTEP_CACHE"] = before


@pytest.fixture(scope="session")
def foreign(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of three steps by plain library code, each beside the `truth` of its processes' memory."""
    from tests.helpers.foreign.launching import write_foreign_checkpoints

    folder = tmp_path_factory.mktemp("foreign")
    write_foreign_checkpoints(world / "base", folder)
    return folder


def recipe_values(world: Path) -> dict[str, Any]:
    """A recipe on the small world: fp32, no quantization, global batch 8, 6 steps."""
    return {
        "name": "small",
        "model": {"name_or_path": str(world / "base"), "dtype": "float32"},
        "quantization": {"load_in_4bit": False, "bnb_4bit_compute_dtype": "float32"},
        "data": {"dataset": str(world / "charts"), "system_message": "Answer with a single word or number."},
        "batch": {"global_batch_size": 8},
        "training": {
            "max_steps": 6,
            "learning_rate": 2e-3,
            "logging_steps": 1,
            "gradient_checkpointing": False,
        },
        "checkpoint": {"every_steps": 3},
        "evaluation": {"every_steps": 3},
        "tracking": {"report_to": "none"},
    }
