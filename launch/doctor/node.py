"""Checks of this machine that need no torch: libraries, GPUs as the driver sees them, memory, limits, disk, caches."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from launch.doctor.finding import Finding, State
from launch.errors import SamestepError
from launch.hardware import SHARED_MEMORY, gpus_present
from launch.inputs.caches import base_is_there, cache_root
from launch.inputs.dataset_index import read_index
from launch.inputs.families import read_shape
from launch.local.planned_run import NEEDED_BYTES
from launch.planning.memory import trained_parameters
from launch.planning.memory_load import Kernels, load_of
from launch.recipe.schema import Recipe
from launch.run.lock import hold_lock
from launch.units import gib
from launch.untrusted_files import printable

SHARED_MEMORY_NEEDED = 2**30  # bytes; micro-batches of data workers lie there until their rank has read them
FILES_NEEDED = 4096  # descriptors: every worker holds files, pipes and shared memory of its batches
DISK_PROBE = 64 * 2**20  # bytes written to measure the disk
DISK_PATIENCE_S = 5.0  # a slow disk has shown by then what it is
SLOW_DISK = 50e6  # bytes a second; a checkpoint of a 7B run is 50 to 200 MB
SPACE_NEEDED = 2 * 2**30  # bytes: checkpoints of a 7B run with their rotation
SCRATCH_NEEDED = 2**30  # bytes, of a node's own disk
BYTES_OF_A_WEIGHT = 12  # in a checkpoint: fp32, and the two moments of AdamW
HOT = 85  # degrees Celsius
_QUERY = (
    "index", "name", "driver_version", "memory.used", "memory.total", "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown", "mig.mode.current",
)  # fmt: skip


def check_node(runs_dir: Path, recipe: Recipe | None = None) -> Iterator[Finding]:
    """Every check, one after another. `recipe`: also looks whether its base and its prepared data are here."""
    yield from check_machine()
    yield from check_disk(runs_dir, space_needed(recipe))
    if recipe is not None:
        yield from check_inputs(recipe)


def check_machine() -> Iterator[Finding]:
    """What concerns no file of a run."""
    yield _versions()
    yield from _gpus()
    yield _shared_memory()
    yield _limits()


def space_needed(recipe: Recipe | None) -> int:
    """Bytes of a recipe's checkpoints, with their rotation and one that is being written; of a 7B run without one."""
    if recipe is None:
        return SPACE_NEEDED
    shape = read_shape(recipe)
    if isinstance(shape, str):  # its config is not here, which another check says
        return SPACE_NEEDED
    weights = trained_parameters(load_of(recipe, shape, "single", 1, Kernels()))
    return max((recipe.checkpoint.keep + 2) * weights * BYTES_OF_A_WEIGHT, NEEDED_BYTES)


def _versions() -> Finding:
    """The installed packages against what samestep's metadata asks for."""
    problems = []
    try:
        requirements = requires("samestep") or []
    except PackageNotFoundError:
        return Finding(
            "libraries", "warning", "samestep runs from a folder and is not installed", "make install"
        )
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            problems.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            problems.append(f"{requirement.name} {installed}, needed {requirement.specifier}")
    if problems:
        return Finding(
            "libraries", "failed", "; ".join(problems), "install with -c constraints.txt, see README"
        )
    return Finding(
        "libraries",
        "ok",
        f"torch {version('torch')}, transformers {version('transformers')}, trl {version('trl')}",
    )


def _gpus() -> Iterator[Finding]:
    count = gpus_present()
    if not count:
        yield Finding("GPUs", "ok", "none; runs use the CPU")
        return
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield Finding(
            "GPUs",
            "warning",
            f"{count}; nvidia-smi is missing, their health is not known",
            "install the driver's tools",
        )
        return
    command = [tool, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding(
            "GPUs",
            "failed",
            f"nvidia-smi does not answer ({error})",
            "the driver hangs: drain the node, reset or reboot it",
        )
        return
    lines = [line for line in listed.stdout.splitlines() if line.count(",") == len(_QUERY) - 1]
    if listed.returncode or not lines:
        words = printable(
            (listed.stderr or listed.stdout).strip().splitlines()[-1:][0]
            if (listed.stderr or listed.stdout).strip()
            else "no words"
        )
        yield Finding(
            "GPUs",
            "failed",
            f"nvidia-smi ends with {listed.returncode} ({words})",
            "look at the driver: dmesg | grep -i nvrm",
        )
        return
    for line in lines:
        yield gpu_finding(dict(zip(_QUERY, (word.strip() for word in line.split(",")), strict=True)))


def gpu_finding(values: dict[str, str]) -> Finding:
    """One GPU as nvidia-smi describes it (`_QUERY`); values may be `[N/A]`."""
    name = f"GPU {values['index']}"
    used, total, heat = values["memory.used"], values["memory.total"], values["temperature.gpu"]
    text = f"{values['name']}, driver {values['driver_version']}, {used} of {total} MiB used, {heat} C"
    errors = values["ecc.errors.uncorrected.volatile.total"]
    if errors.isdigit() and int(errors):
        return Finding(
            name, "failed", f"{text}; {errors} uncorrected memory errors", "drain the node and reset the GPU"
        )
    slowed = [key for key in _QUERY if key.startswith("clocks_throttle") and values[key] == "Active"]
    if slowed:
        return Finding(
            name,
            "failed",
            f"{text}; its clocks are held down by the hardware",
            "look at cooling and power; choose another node",
        )
    if heat.isdigit() and int(heat) >= HOT:
        return Finding(name, "warning", f"{text}; hot", "look at cooling")
    if used.isdigit() and total.isdigit() and int(used) > 0.1 * int(total):
        return Finding(
            name,
            "warning",
            f"{text}; another process uses it",
            "see nvidia-smi; the memory plan counts on a free GPU",
        )
    return Finding(name, "ok", text)


def _shared_memory() -> Finding:
    usage = shutil.disk_usage(SHARED_MEMORY)
    text = f"{gib(usage.free)} free in {SHARED_MEMORY}"
    if usage.free < SHARED_MEMORY_NEEDED:
        return Finding(
            "shared memory",
            "warning",
            text,
            "batches come through pipes, which is slower; Docker: --shm-size 8g",
        )
    return Finding("shared memory", "ok", text)


def _limits() -> Finding:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    text = f"{files:,} open files, locked memory {_limit(locked)}, file size {_limit(size)}"
    if files < FILES_NEEDED:
        return Finding("limits", "warning", text, f"ulimit -n {FILES_NEEDED}")
    if size != resource.RLIM_INFINITY:
        return Finding("limits", "warning", text, "ulimit -f unlimited: a checkpoint's file may be larger")
    return Finding("limits", "ok", text)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else gib(value)


def check_disk(runs_dir: Path, needed: int, slow: float = SLOW_DISK) -> Iterator[Finding]:
    """Write, sync and lock where the runs are. Leaves nothing. `needed`: bytes; `slow`: bytes a second."""
    place = runs_dir
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield Finding("runs folder", "failed", f"{runs_dir}: cannot be written", "choose another --runs-dir")
        return
    free = shutil.disk_usage(place).free
    probe = place / f".samestep-doctor-{os.getpid()}"
    try:
        speed = _write(probe)
        text = f"{place}: {gib(free)} free, written and synced at {speed / 1e6:,.0f} MB/s"
        if free < needed:
            yield Finding(
                "runs folder", "failed", text, f"make room: the checkpoints of a run need {gib(needed)}"
            )
        elif speed < slow:
            yield Finding(
                "runs folder",
                "warning",
                text,
                "saves take long; choose a faster file system, or raise checkpoint.every_steps",
            )
        else:
            yield Finding("runs folder", "ok", text)
    except OSError as error:
        yield Finding(
            "runs folder", "failed", f"{place}: {error.strerror}", "make room, or choose another --runs-dir"
        )
    finally:
        probe.unlink(missing_ok=True)
    lock = f".samestep-doctor-{os.getpid()}.lock"
    try:
        with hold_lock(place, lock):
            yield Finding("locks", "ok", f"{place}: files can be locked")
    except SamestepError as error:
        yield Finding(
            "locks", "failed", printable(str(error)), "choose a --runs-dir on a file system with locks"
        )
    finally:
        (place / lock).unlink(missing_ok=True)


def check_scratch(folder: Path) -> Finding:
    """The node's own disk for temporary files: there, writable, with room."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    remedy = "remove what others have left, or choose another folder: `scratch` in the site's file"
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding("scratch", "failed", f"{folder}: cannot be written", remedy)
    free = shutil.disk_usage(place).free
    state: State = "failed" if free < SCRATCH_NEEDED else "ok"
    return Finding("scratch", state, f"{place}: {gib(free)} free", remedy if state == "failed" else "")


def _write(file: Path) -> float:
    """Bytes a second at which `DISK_PROBE` random bytes come to the disk, or as many as do in a few seconds."""
    piece = os.urandom(2**20)
    written, began = 0, time.perf_counter()
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        while written < DISK_PROBE and time.perf_counter() - began < DISK_PATIENCE_S:
            written += os.write(descriptor, piece)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return written / max(time.perf_counter() - began, 1e-9)


def check_inputs(recipe: Recipe) -> Iterator[Finding]:
    """Whether a job without a network would find everything."""
    prepare = f"samestep prepare {recipe.name}"
    here = base_is_there(recipe)
    yield Finding(
        "base model",
        "ok" if here else "failed",
        f"{recipe.model.name_or_path} is {'' if here else 'not '}on this machine",
        "" if here else prepare,
    )
    index = read_index(recipe)
    if index is None:
        yield Finding("data", "failed", f"{recipe.data.dataset} is not prepared in {cache_root()}", prepare)
    else:
        yield Finding(
            "data", "ok", f"{recipe.data.dataset} is prepared, {len(index.splits['train']):,} samples"
        )


@dataclass(frozen=True)
class Nominal:
    """What a card's data sheet says: dense bf16 products in 10**12 FLOP/s, memory in 10**9 bytes a second."""

    tflops: float
    memory_gb_s: float


def nominal(gpu: str) -> Nominal | None:
    """The figures of a card's data sheet; None for one that is not listed, a part of one (MIG) and laptops' smaller
    ones, which have the names of cards."""
    if "MIG" in gpu or "Laptop" in gpu:
        return None
    return next((Nominal(*figures) for name, *figures in _NOMINAL if re.search(name, gpu)), None)


_NOMINAL = (
    (r"GH200", 989.0, 4000.0), (r"H200", 989.0, 4800.0), (r"H100.*PCIe", 756.0, 2039.0), (r"H100 NVL", 835.0, 3938.0),
    (r"H100", 989.0, 3352.0), (r"A100.*80GB", 312.0, 1935.0), (r"A100", 312.0, 1555.0), (r"B200", 2250.0, 7700.0),
    (r"L40S", 362.0, 864.0), (r"\bL40\b", 181.0, 864.0), (r"\bL4\b", 121.0, 300.0), (r"A10G\b", 70.0, 600.0),
    (r"A10\b", 125.0, 600.0), (r"A40", 150.0, 696.0), (r"RTX 6000 Ada", 364.0, 960.0), (r"RTX A6000", 155.0, 768.0),
    (r"RTX 5090", 210.0, 1792.0), (r"RTX 4090", 165.0, 1008.0), (r"RTX 3090", 71.0, 936.0),
)  # fmt: skip
