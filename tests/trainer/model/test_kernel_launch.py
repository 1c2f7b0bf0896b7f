"""Kernels launched as they were compiled: which kernel is taken, and what it is given."""

from __future__ import annotations

import gc
import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from trainer.model import kernel_launch
from trainer.model.kernel_launch import DirectLaunch, specialize


def _kernel(x, size, tokens, factor, block: tl.constexpr, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    """Never compiled: its parameters are read."""


class Compiled(SimpleNamespace):
    """A compiled kernel, which can be referred to weakly."""


class FakeKernel(JITFunction):  # type: ignore[misc]
    """Compiles a kernel whenever it is asked for one, and writes down what is launched, by whom."""

    def __init__(self) -> None:
        super().__init__(_kernel, do_not_specialize=["tokens"])
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.made: list[weakref.ref[Compiled]] = []

    def run(self, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        number = len(self.compiled)
        self.compiled.append((grid, *arguments, named))

        def launch(x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            function, metadata, *hooks = rest[:5]
            self.launched.append(((x, y, z), stream, function, metadata, rest[5:]))
            assert hooks == [None, None, None]

        made = Compiled(run=launch, function=f"function {number}", packed_metadata=number)
        self.made.append(weakref.ref(made))
        return made


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7 + device)
    monkeypatch.setattr(kernel_launch, "driver", SimpleNamespace(active=active))
    return FakeKernel()


def test_arguments_with_one_key_are_compiled_for_alike_by_triton() -> None:
    """Triton's own binder says what it compiles a kernel for."""
    parameters = FakeKernel().params
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(FakeKernel().signature, parameters, backend)
    aligned = torch.zeros(64, dtype=torch.bfloat16)
    tensors = [aligned, aligned[1:], aligned[8:], aligned.float(), aligned.int()]
    numbers = [0, 1, 2, 16, 17, -16, -1, 2**31 - 1, 2**31, 2**32, -(2**31), -(2**31) - 1, 2**63]
    kernels_by_key: dict[Any, Any] = {}
    cases = itertools.product(tensors, [*numbers, None], numbers, [0.5, 1.0, 3, True], [64, 128], [True])
    for case in cases:
        _, key = specialize(parameters, case)
        _, compiled_for, _ = bind(*case)
        assert kernels_by_key.setdefault(tuple(key), compiled_for) == compiled_for
    assert len(kernels_by_key) > 500


def test_the_kernel_of_a_key_is_compiled_once_and_given_addresses(kernel: FakeKernel) -> None:
    launch = DirectLaunch(kernel)
    x = torch.zeros(64)
    launch[4, 2](x, 32, 5, 0.5, 128, wide=True, num_warps=8)
    launch[6,](x[16:], 48, 7, 1.5, 128, wide=True, num_warps=8)
    assert kernel.compiled == [((4, 2), x, 32, 5, 0.5, 128, {"wide": True, "num_warps": 8})]
    assert kernel.launched == [
        ((6, 1, 1), 7, "function 0", 0, (x.data_ptr() + 64, 48, 7, 1.5, 128, True)),
    ]


def test_other_arguments_options_and_constants_take_other_kernels(kernel: FakeKernel) -> None:
    launch = DirectLaunch(kernel)
    x = torch.zeros(64)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, 32, 5, 0.5, 128), {"wide": True, "num_warps": 8}),
        ((x, 32, 5, 0.5, 128), {"wide": True, "num_warps": 4}),
        ((x, 32, 5, 0.5, 128), {"wide": False, "num_warps": 8}),
        ((x, 32, 5, 0.5, 64), {"wide": True, "num_warps": 8}),
        ((x[1:], 32, 5, 0.5, 128), {"wide": True, "num_warps": 8}),
        ((x.half(), 32, 5, 0.5, 128), {"wide": True, "num_warps": 8}),
        ((x, 33, 5, 0.5, 128), {"wide": True, "num_warps": 8}),
        ((x, 1, 5, 0.5, 128), {"wide": True, "num_warps": 8}),
        ((x, 32, 2**40, 0.5, 128), {"wide": True, "num_warps": 8}),
    ]
    for arguments, named in calls * 2:
        launch[1,](*arguments, **named)
    assert len(kernel.compiled) == len(calls)
    assert [function for _, _, function, *_ in kernel.launched] == [
        f"function {n}" for n in range(len(calls))
    ]
    launch[1,](x, 32, 6, 0.5, 128, wide=True, num_warps=8)  # `tokens` is not specialized
    assert len(kernel.compiled) == len(calls)


def test_a_tensor_descriptor_is_passed_on_as_it_is_and_its_tiles_take_kernels_of_their_own(
    kernel: FakeKernel,
) -> None:
    from trainer.model.hopper_tiles import tiles

    launch = DirectLaunch(kernel)
    x = torch.zeros(32, 4, 16, dtype=torch.bfloat16)
    once, again, larger = (tiles(rows, size, [16])[0] for rows, size in ((x, 16), (x[16:], 16), (x, 32)))
    for descriptor in (once, again, larger):
        launch[1,](descriptor, 32, 5, 0.5, 128, wide=True)
    assert [compiled[1] for compiled in kernel.compiled] == [once, larger]
    assert [arguments[0] for *_, arguments in kernel.launched] == [again]


def test_a_variable_by_name_and_an_argument_of_another_kind_are_refused(kernel: FakeKernel) -> None:
    launch = DirectLaunch(kernel)
    with pytest.raises(TypeError, match="factor must be passed by position"):
        launch[1,](torch.zeros(1), 1, 1, factor=0.5, block=64, wide=True)
    with pytest.raises(TypeError, match="size: a kernel takes tensors, numbers and constants"):
        launch[1,](torch.zeros(1), "1", 1, 0.5, 64, True)
    assert not kernel.compiled


def test_a_compiled_kernel_stays_as_long_as_it_may_be_launched(kernel: FakeKernel) -> None:
    """Triton takes it from the GPU with the last reference, and may drop its own."""
    launch = DirectLaunch(kernel)
    launch[1,](torch.zeros(64), 32, 5, 0.5, 128, wide=True)
    gc.collect()
    (compiled,) = kernel.made
    assert compiled() is not None


def test_where_triton_compiles_by_a_tensors_size_too_it_launches_itself(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")  # an AMD GPU
    launch = DirectLaunch(kernel)
    for _ in range(2):
        launch[1,](torch.zeros(64), 32, 5, 0.5, 128, wide=True)
    assert (len(kernel.compiled), kernel.launched) == (2, [])
