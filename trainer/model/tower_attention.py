"""The vision tower's attention through the kernel that is fastest on the GPU at hand, for its heads of 80 channels.

Which one that is, is measured once for a card and the versions of PyTorch and Triton, on images of a chart's size, and
remembered in the cache folder (`kernels/`). The numbers differ in their rounding alone. With
`training.deterministic` nothing is measured: PyTorch's own kernel computes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from launch.atomic_files import atomic_write
from launch.inputs.caches import cache_root
from launch.untrusted_files import read_json
from trainer.data.packing import cumulative
from trainer.model.attention import Segments, varlen
from trainer.model.attention_kernel import attend_images
from trainer.model.chosen_kernels import record_kernel

Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float], Tensor]
"""q, k and v [P, heads, width] of all images, where each begins and ends, the scale: the output like q."""

_LENGTHS = (2304,) * 6 + (2300, 1988, 316, 4)  # patches of images as large as charts, and of odd ones
_CALLS, _ROUNDS = 8, 3  # of a measurement

logger = logging.getLogger("trainer")


def _pytorch(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    return varlen(q, k, v, segments, causal=False, scale=scale)


def _own(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    return attend_images(q, k, v, segments.cu_seqlens, segments.lengths, scale)


def _on_hopper(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, queries: int) -> Tensor:
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        raise NotImplementedError  # its compiler may end the process there
    # A Triton without Gluon has no such module: another kernel then computes.
    from trainer.model.hopper_tower_attention import attend_images_on_hopper

    return attend_images_on_hopper(q, k, v, segments.cu_seqlens, segments.lengths, scale, queries)


KERNELS: dict[str, Kernel] = {
    "PyTorch's varlen_attn": _pytorch,
    "samestep's Triton kernel": _own,
    "samestep's kernel for Hopper": partial(_on_hopper, queries=128),
    "samestep's kernel for Hopper, smaller tiles": partial(_on_hopper, queries=64),
}
DEFAULT = "PyTorch's varlen_attn"
_PART = "vision tower"


def attend_tower(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """Attend every image's patches to each other through the kernel for this GPU, which is chosen at the first call."""
    heads, width = q.shape[1:]
    return KERNELS[kernel_for(q.device, q.dtype, heads, width)](q, k, v, segments, scale)


@cache
def kernel_for(device: torch.device, dtype: torch.dtype, heads: int, width: int) -> str:
    """Return the name of the fastest kernel, from the file of an earlier process or measured now."""
    if torch.are_deterministic_algorithms_enabled():
        record_kernel(_PART, DEFAULT)
        return DEFAULT
    facts = {
        "card": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "heads": f"{heads} x {width} {dtype}",
    }
    with _one_at_a_time(_file(facts)):
        known = _remembered(facts)
        if known is None:
            known = _measured(device, dtype, heads, width)
            _remember(facts, known)
    fastest = min(known, key=lambda name: known[name])
    words = ", ".join(f"{name} {milliseconds:.2f} ms" for name, milliseconds in known.items())
    logger.info(
        f"vision tower: attention by {fastest} ({words} for {sum(_LENGTHS):,} patches on {facts['card']})"
    )
    record_kernel(_PART, fastest)
    return fastest


def _file(facts: Mapping[str, str]) -> Path:
    words = "-".join(facts.values())
    return cache_root() / "kernels" / ("".join(c if c.isalnum() else "-" for c in words) + ".json")


@contextlib.contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Let one process of the machine measure, and the others read what it wrote: ranks take the same kernel.

    Two measurements differ by their noise, and other kernels round otherwise. The lock is let go when its process ends.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # a cache folder without room or locks: each measures for itself
            file.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context(file.with_suffix(".lock").open("a")), fcntl.LOCK_EX)
        yield


def _remembered(facts: Mapping[str, str]) -> dict[str, float] | None:
    """Milliseconds by kernel that an earlier process measured; None without a file that says so of all kernels.

    Versions that measured single calls, with the host's work for each in them, wrote no `calls`.
    """
    try:
        measured = read_json(_file(facts))
        times = measured["milliseconds"]
        if DEFAULT in times and measured["kernels"] == list(KERNELS) and measured["calls"] == _CALLS:
            return {name: float(value) for name, value in times.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    return None


def _remember(facts: Mapping[str, str], times: Mapping[str, float]) -> None:
    """Not to be able to costs the next process a measurement."""
    file = _file(facts)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        measured = {"kernels": list(KERNELS), "calls": _CALLS, "milliseconds": dict(times)}
        atomic_write(file, json.dumps({**facts, **measured}, indent=1))


@torch.no_grad()
def _measured(device: torch.device, dtype: torch.dtype, heads: int, width: int) -> dict[str, float]:
    """Milliseconds of PyTorch's kernel, and of each other that runs here and gives its numbers."""
    segments, scale = Segments(cumulative(_LENGTHS).to(device), _LENGTHS), width**-0.5
    draw = torch.Generator(device).manual_seed(0)  # not the training's
    shape = 3, sum(_LENGTHS), heads, width
    q, k, v = torch.randn(shape, generator=draw, dtype=dtype, device=device).unbind()
    expected = _pytorch(q, k, v, segments, scale).float()
    times: dict[str, float] = {}
    for name, kernel in KERNELS.items():
        try:
            apart = (kernel(q, k, v, segments, scale).float() - expected).norm() / expected.norm()
            fits = float(apart) < 1e-2
        except NotImplementedError:
            continue  # it is for other cards, which needs no word
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # after the latter no kernel computes any more
        except Exception as error:  # of a compiler that does not know the card, say
            logger.info(f"vision tower: {name} does not run here ({type(error).__name__})")
            fits = False
        if fits:
            times[name] = _milliseconds(partial(kernel, q, k, v, segments, scale))
    return times


def _milliseconds(run: Callable[[], Any]) -> float:
    """The median of a few rounds of calls, of each call.

    The host is ahead of the GPU, as it is in a step: how long it takes to launch a kernel (six descriptors of tiles for
    Hopper's) is not in it.
    """
    rounds = []
    for _ in range(_ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        run()  # the GPU has this to do while the host launches the first call that counts
        begin.record()
        for _ in range(_CALLS):
            run()
        end.record()
        end.synchronize()
        rounds.append(begin.elapsed_time(end) / _CALLS)
    return statistics.median(rounds)
