"""Measurements that need torch, in processes with a deadline: products, copies, an all-reduce."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from launch.doctor.finding import Finding
from launch.doctor.node import nominal_tflops
from launch.launcher_variables import remove_launcher_variables
from launch.local.accelerate_command import free_port
from launch.untrusted_files import parse_json, printable

DEADLINE_S = 50.0
SLOW_SHARE = 0.55
"""Of a card's nominal products: large bf16 products reach 70 to 80 % of it (H100: 742 to 779 of 989 TFLOP/s)."""
APART = 0.85
"""Of the median of the GPUs: one that is slower makes all ranks wait."""


def probe(
    processes: int, environment: Mapping[str, str] | None = None, deadline: float = DEADLINE_S
) -> Iterator[Finding]:
    """Measure with so many processes of this machine, one a GPU. Ends by the deadline, and leaves no process."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="samestep-doctor-") as folder, contextlib.ExitStack() as stack:
        outputs = [stack.enter_context((Path(folder) / f"{rank}").open("w+b")) for rank in range(processes)]
        children = _start(processes, outputs, {**os.environ, **(environment or {})}, deadline)
        try:
            late = [rank for rank, child in enumerate(children) if not _ended(child, began + deadline)]
        finally:
            for child in children:
                child.kill()
                child.wait()
        words = [_text(output) for output in outputs]
    yield from judge(processes, [figures_in(text) for text in words], words, late, deadline)


def _start(
    processes: int, outputs: Sequence[IO[bytes]], environment: dict[str, str], deadline: float
) -> list[subprocess.Popen[bytes]]:
    remove_launcher_variables(environment)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    meeting |= {
        "PROBE_TIMEOUT_S": str(deadline / 2),
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "trainer.probe_node"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**environment, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, output in enumerate(outputs)
    ]


def _ended(child: subprocess.Popen[bytes], deadline: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(max(deadline - time.monotonic(), 0.1))
        return True
    return False


def _text(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read(2**20).decode(errors="replace")


def figures_in(text: str) -> dict[str, Any] | None:
    """The JSON line that a process ends with; None where it did not get so far."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                values = parse_json(line)
                return values if isinstance(values, dict) and "tflops" in values else None
    return None


def judge(
    processes: int,
    figures: Sequence[dict[str, Any] | None],
    words: Sequence[str],
    late: Sequence[int],
    deadline: float,
) -> Iterator[Finding]:
    """What the figures of all processes say; `words`: what each printed, `late`: those that the deadline ended."""
    measured = [each for each in figures if each]
    for rank, each in enumerate(figures):
        if each is None:
            last = next((line for line in reversed(words[rank].splitlines()) if line.strip()), "no words")
            state = f"did not end within {deadline:.0f} s" if rank in late else "failed"
            remedy = (
                "NCCL_DEBUG=INFO says where; NCCL_P2P_DISABLE=1 tells whether GPU to GPU copies hang"
                if rank in late and processes > 1
                else "see the words"
            )
            yield Finding(f"process {rank}", "failed", f"{state} ({printable(last)[:200]})", remedy)
    if not measured:
        return
    speeds = sorted(float(each["tflops"]) for each in measured)
    median = speeds[len(speeds) // 2]
    for each in measured:
        yield _products(each, median)
    rates = [float(each["all_reduce_gb_s"]) for each in measured if "all_reduce_gb_s" in each]
    if len(rates) == processes and processes > 1:
        yield Finding("all-reduce", "ok", f"{processes} processes, {min(rates):.2f} GB/s, sum correct")


def _products(each: dict[str, Any], median: float) -> Finding:
    tflops, gpu = float(each["tflops"]), each.get("gpu")
    name = f"products {each['rank']}"
    text = f"{tflops:,.2f} TFLOP/s, copies {float(each['copy_gb_s']):,.0f} GB/s, results correct"
    if gpu is None:
        return Finding(name, "ok", f"CPU: {text}")
    nominal = nominal_tflops(str(gpu))
    text = f"{printable(str(gpu))}: {text}" + (
        f" ({tflops / nominal:.0%} of the data sheet)" if nominal else ""
    )
    if nominal and tflops < SLOW_SHARE * nominal:
        return Finding(
            name, "failed", text, "the card is slower than its kind: look at clocks, power and other users"
        )
    if tflops < APART * median:
        return Finding(
            name, "warning", text, f"slower than the others ({median:,.0f}): every rank waits for it"
        )
    return Finding(name, "ok", text)
