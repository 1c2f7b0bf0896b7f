"""Measurements that need torch, in processes with a deadline: products, copies, an all-reduce."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from launch.doctor.finding import Finding
from launch.doctor.node import nominal
from launch.hardware import gpus_present
from launch.launcher_variables import remove_launcher_variables
from launch.local.accelerate_command import free_port
from launch.subprocesses import PYTHON_VARIABLES
from launch.untrusted_files import parse_json, printable

DEADLINE_S = 50.0
RETRY_S = 22.0  # of it, where there are GPUs: an all-reduce that did not end is tried again without their own copies
SLOW_SHARE = 0.55
"""Of a card's data sheet: large bf16 products reach 70 to 80 % of it (H100: 742 to 779 of 989 TFLOP/s)."""
APART = 0.85
"""Of the median of the GPUs: one that is slower makes all ranks wait."""


@dataclass(frozen=True)
class Across:
    """Where the processes of all nodes meet: an address and port of the first node; this node's first rank."""

    head: str
    port: int
    first_rank: int
    world_size: int


@dataclass(frozen=True)
class Measured:
    """What the processes of this machine have shown, each in its place.

    `figures`: of those that measured anything; `words`: what each printed; `late`: those that the deadline ended;
    `without_p2p`: the all-reduce came to an end only without copies from GPU to GPU; `across`: all nodes were to meet.
    """

    figures: Sequence[dict[str, Any] | None]
    words: Sequence[str]
    late: Sequence[int]
    deadline: float
    without_p2p: bool = False
    across: bool = False

    @property
    def speeds(self) -> list[float]:
        """10**12 FLOP/s of each process that measured them."""
        return [float(each["tflops"]) for each in self.figures if each]


def measure(
    processes: int,
    environment: Mapping[str, str] | None = None,
    deadline: float = DEADLINE_S,
    across: Across | None = None,
) -> Measured:
    """Measure with so many processes of this machine, one a GPU. Ends by the deadline, and leaves no process."""
    several_gpus = processes > 1 and gpus_present() > 1
    first = deadline - RETRY_S if several_gpus and deadline > 1.5 * RETRY_S else deadline
    measured = _measure(processes, {**(environment or {})}, first, across)
    stuck = all(measured.figures) and any("all_reduce_gb_s" not in (each or {}) for each in measured.figures)
    if not several_gpus or not stuck or first == deadline:
        return measured
    again = _measure(processes, {**(environment or {}), "NCCL_P2P_DISABLE": "1"}, deadline - first, None)
    return replace(measured, without_p2p=all("all_reduce_gb_s" in (each or {}) for each in again.figures))


def _measure(
    processes: int, environment: Mapping[str, str], deadline: float, across: Across | None
) -> Measured:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="samestep-doctor-") as folder, contextlib.ExitStack() as stack:
        outputs = [stack.enter_context((Path(folder) / f"{rank}").open("w+b")) for rank in range(processes)]
        children = _start(processes, outputs, {**os.environ, **environment}, deadline, across)
        try:
            late = [rank for rank, child in enumerate(children) if not _ended(child, began + deadline)]
        finally:
            for child in children:
                child.kill()
                child.wait()
        words = [_text(output) for output in outputs]
    return Measured([figures_in(text) for text in words], words, late, deadline, across=across is not None)


def _start(
    processes: int,
    outputs: Sequence[IO[bytes]],
    environment: dict[str, str],
    deadline: float,
    across: Across | None,
) -> list[subprocess.Popen[bytes]]:
    remove_launcher_variables(environment)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    meeting |= {
        "PROBE_TIMEOUT_S": str(deadline / 2),
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"),
    }
    if across:
        meeting |= {"PROBE_HEAD": across.head, "PROBE_PORT": str(across.port)}
        meeting |= {"PROBE_FIRST_RANK": str(across.first_rank), "PROBE_WORLD_SIZE": str(across.world_size)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "trainer.probe_node"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**environment, **meeting, **PYTHON_VARIABLES, "RANK": str(rank), "LOCAL_RANK": str(rank)},
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


def judge(measured: Measured, speeds: Sequence[float] = ()) -> Iterator[Finding]:
    """What the figures of all processes say; `speeds`: of all nodes' processes, where there are others."""
    figures, processes = measured.figures, len(measured.figures)
    for rank, each in enumerate(figures):
        if each is None:
            yield _failure(f"process {rank}", measured, rank)
    every = sorted(speeds or measured.speeds)
    for each in filter(None, figures):
        yield _products(each, every[len(every) // 2])
    for check, key, expected in (
        ("all-reduce", "all_reduce_gb_s", processes > 1),
        ("all-reduce of all nodes", "across_gb_s", measured.across),
    ):
        if expected and all(figures):
            yield _all_reduce(check, key, measured)


def _all_reduce(check: str, key: str, measured: Measured) -> Finding:
    rates = [float(each[key]) for each in measured.figures if each and key in each]
    count = len(measured.figures)
    if len(rates) == count:
        text = f"{count} processes{' of this node' if measured.across else ''}, {min(rates):.2f} GB/s, sum correct"
        return Finding(check, "ok", text)
    if measured.without_p2p and key == "all_reduce_gb_s":
        remedy = "PCIe access control (ACS) or an IOMMU is in the way: tell the administrator, and set it until then"
        text = "does not end with copies from GPU to GPU; it does with NCCL_P2P_DISABLE=1"
        return Finding(check, "failed", text, remedy)
    rank = next(rank for rank, each in enumerate(measured.figures) if each is not None and key not in each)
    return _failure(check, measured, rank)


def _failure(check: str, measured: Measured, rank: int) -> Finding:
    """A process that ended too early, or did not end, with its last words."""
    lines = [line for line in measured.words[rank].splitlines() if line.strip() and not line.startswith("{")]
    last, late = printable(lines[-1])[:200] if lines else "no words", rank in measured.late
    state = f"did not end within {measured.deadline:.0f} s" if late else "failed"
    several = len(measured.figures) > 1 or measured.across
    remedy = (
        "NCCL_DEBUG=INFO says where; NCCL_P2P_DISABLE=1 tells whether GPU to GPU copies hang"
        if late and several
        else "see the words"
    )
    return Finding(check, "failed", f"{state} ({last})", remedy)


def _products(each: dict[str, Any], median: float) -> Finding:
    tflops, copies, gpu = float(each["tflops"]), float(each["copy_gb_s"]), each.get("gpu")
    name, text = (
        f"products {each['rank']}",
        f"{tflops:,.2f} TFLOP/s, copies {copies:,.0f} GB/s, results correct",
    )
    if gpu is None:
        return Finding(name, "ok", f"CPU: {text}")
    text, sheet = f"{printable(str(gpu))}, CUDA {printable(str(each.get('cuda')))}: {text}", nominal(str(gpu))
    if sheet:
        shares = tflops / sheet.tflops, copies / sheet.memory_gb_s
        text += f" ({shares[0]:.0%} and {shares[1]:.0%} of the data sheet)"
        if min(shares) < SLOW_SHARE:
            what = "card" if shares[0] < SLOW_SHARE else "card's memory"
            remedy = f"the {what} is slower than its kind: look at clocks, power and other users"
            return Finding(name, "failed", text, remedy)
    if tflops < APART * median:
        return Finding(
            name, "warning", text, f"slower than the others ({median:,.0f}): every rank waits for it"
        )
    return Finding(name, "ok", text)
