"""Creates a rank's CUDA context while its libraries are imported.

The driver needs a second or two for it, in which nothing of Python's is locked; PyTorch then finds the context there:
it is the device's primary one, of which a process has one.
"""

from __future__ import annotations

import ctypes
from collections.abc import MutableMapping
from threading import Thread

from launch.launcher_variables import EARLY_CONTEXT, is_launched


def begin_context(environment: MutableMapping[str, str]) -> Thread | None:
    """Begin in a thread, in a rank whose launcher said that it will use its GPU; its children are not told.

    What fails here, PyTorch meets again and says.
    """
    if not is_launched(environment) or environment.pop(EARLY_CONTEXT, "") != "1":
        return None
    rank = environment.get("LOCAL_RANK", "0")
    if not rank.isdecimal():
        return None
    thread = Thread(target=_create, args=(int(rank),), name="early-context", daemon=True)
    thread.start()
    return thread


def _create(number: int) -> None:
    """Retain the primary context of a device, numbered among those that this process sees."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")  # whose functions are called without the interpreter's lock
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), number) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
