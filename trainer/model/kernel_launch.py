"""Triton kernels launched without the work that Triton (3.6 to 3.8) does on the host in every launch.

`kernel[grid](...)` binds the arguments to a dictionary, writes the options into a string, looks the compiled
kernel up by both and calls hooks: more than the launch itself takes, hundreds of times a step. With few samples a GPU
that is what the GPU waits for. Here the compiled kernel is looked up by what Triton compiles it for, and launched as it
is; what is not there yet goes through Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_ALIGNMENT = 16
"""Triton compiles other kernels for addresses and whole numbers that it divides, and for the number 1."""

_Launch = Callable[[tuple[int, ...], int, Sequence[Any]], None]


class DirectLaunch:
    """The decorator above `triton.jit` of a kernel; it is launched as before: `kernel[grid](arguments, num_warps=4)`.

    Its tensors must be on the current GPU: from the second launch on the kernel is given their addresses. By name are
    passed Triton's options, and constants of the kernel behind all that is passed by position. Triton's launch hooks
    (Proton) hear of the first launch of each compiled kernel alone.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        # Triton's interpreter compiles nothing. For AMD it also compiles by how large a tensor is (`tt.pointer_range`).
        compiles = isinstance(kernel, JITFunction) and torch.version.hip is None
        self._parameters = kernel.params if compiles else []
        self._launches: dict[tuple[Any, ...], _Launch] = {}
        self._compiled: list[Any] = []  # Triton takes a kernel from the GPU with the last reference to it

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return the launch of the kernel over a grid of programs."""
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        if not self._parameters:
            self._kernel[grid](*arguments, **named)
            return
        device = driver.active.get_current_device()
        values, specialization = specialize(self._parameters, arguments)
        key = (device, *named.items(), *specialization)
        launch = self._launches.get(key)
        if launch is not None:
            launch(grid, driver.active.get_current_stream(device), values)
            return
        behind = self._parameters[len(arguments) :]
        if variables := [each.name for each in behind if not each.is_constexpr]:
            raise TypeError(f"{self._kernel.__name__}: {', '.join(variables)} must be passed by position")
        compiled = self._kernel[grid](*arguments, **named)
        self._compiled.append(compiled)
        self._launches[key] = _launch_of(compiled, [named.get(each.name) for each in behind])


def _launch_of(compiled: Any, constants: Sequence[Any]) -> _Launch:
    """The launch of a kernel that Triton has compiled and loaded. `constants`: of its last parameters."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch(grid: tuple[int, ...], stream: int, values: Sequence[Any]) -> None:
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, stream, function, metadata, None, None, None, *values, *constants)

    return launch


def specialize(parameters: Sequence[Any], arguments: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the arguments as a compiled kernel takes them, and what of them Triton compiles a kernel for.

    `parameters`: Triton's own, of the kernel. Arguments with different kernels differ in it; that those with the same
    kernel do not is of no weight, they are looked up twice.

    Raises:
        TypeError: an argument is neither a tensor nor a number nor a constant.
    """
    values = list(arguments)
    specialization = []
    for number, (parameter, value) in enumerate(zip(parameters, arguments, strict=False)):
        kind = type(value)
        if parameter.is_constexpr or value is None:
            specialization.append(value)
        elif kind is int:
            specialization.append(_of_number(value, not parameter.do_not_specialize))
        elif kind is float or kind is bool:
            specialization.append(kind)
        elif isinstance(value, Tensor):
            values[number] = address = value.data_ptr()
            specialization.append(value.dtype if address % _ALIGNMENT == 0 else (value.dtype, "unaligned"))
        elif layout := getattr(value, "layout", None):  # Gluon's tensor descriptor; Triton takes it as it is
            specialization.append((value.base.dtype, *value.block_shape, layout, value.padding))
        else:
            raise TypeError(f"{parameter.name}: a kernel takes tensors, numbers and constants, not a {kind}")
    return values, specialization


def _of_number(value: int, specialized: bool) -> str:
    """What Triton compiles a kernel for in a whole number: its width, that it is 1, that the alignment divides it."""
    width = "32" if -(2**31) <= value < 2**31 else "64" if value < 2**63 else "unsigned 64"
    if not specialized:
        return width
    return width + (" one" if value == 1 else " aligned" if value % _ALIGNMENT == 0 else "")


def cdiv(size: int, tile: int) -> int:
    """Return how many tiles cover a size. `triton.cdiv` of Triton 3.6 takes far longer: it can run in a kernel too."""
    return -(-size // tile)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is not below a number above 0; see `cdiv`."""
    return 1 << (number - 1).bit_length()
