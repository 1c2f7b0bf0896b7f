"""Small checkpoints the tests share: how they are written, harmed and looked at."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.checkpoints.publish import partial_folder, publish
from launch.checkpoints.scan import newest_valid

ADAPTER, STATES = "adapter.safetensors", "rank states/0.json"


def write_aside(run_dir: Path, step: int) -> Path:
    """A checkpoint of 1,000 + 12 bytes (11 below step 10, 13 from 100) that is complete and not published."""
    aside = partial_folder(run_dir, step)
    (aside / "rank states").mkdir(parents=True)
    (aside / ADAPTER).write_bytes(bytes([step % 256]) * 1000)
    (aside / STATES).write_text(f'{{"step": {step}}}')
    return aside


def published(run_dir: Path, *steps: int) -> Path:
    """Publish these steps; the folder of the last one."""
    for step in steps:
        final = run_dir / f"checkpoint-{step}"
        publish(write_aside(run_dir, step), final, {"step": step})
    return final


def newest_step(run_dir: Path) -> int | None:
    """Where a run would go on."""
    newest, _ = newest_valid(run_dir)
    return newest.step if newest else None


def names(run_dir: Path) -> set[str]:
    """Everything in a folder."""
    return {path.name for path in run_dir.iterdir()}


def change_one_bit(path: Path) -> None:
    """Damage that only the content shows."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    """What a copy leaves that was cut off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root reads everything: lay that down where the tests run as root. Only relative paths work inside."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
