"""Autocast switched off around functions that choose their dtypes themselves."""

from __future__ import annotations

import torch
from torch import Tensor


class AutocastOff:
    """`torch.autocast(device, enabled=False)`, which takes the host longer than a launch; a no-op where it is off.

    Weights that were cast within an enclosing autocast stay in its cache.
    """

    __slots__ = ("_device", "_was_on")

    def __init__(self, x: Tensor) -> None:
        """`x`: a tensor on the device."""
        self._device = x.device.type

    def __enter__(self) -> None:
        self._was_on = torch.is_autocast_enabled(self._device)
        if self._was_on:
            torch.set_autocast_enabled(self._device, False)

    def __exit__(self, *_: object) -> None:
        if self._was_on:
            torch.set_autocast_enabled(self._device, True)
