"""Sizes and durations in words.

Our own because `rich.filesize` (15) counts in powers of 1000 alone: GPU memory is in GiB.
"""

from __future__ import annotations

GIB = 2**30


def megabytes(size: int) -> str:
    """Bytes in units of 2**20: small ones with three digits behind the point."""
    value = size / 2**20
    return f"{value:,.1f}" if value >= 1 else f"{value:.3f}"


def age(seconds: float) -> str:
    """A time in a unit that leaves few digits. The clock of another machine may be ahead: never below 0."""
    for unit, length, least in (("days", 86400, 2 * 86400), ("h", 3600, 3600), ("min", 60, 60)):
        if seconds >= least:
            return f"{int(seconds // length)} {unit}"
    return f"{max(int(seconds), 0)} s"


def decimal_size(size: int) -> str:
    """Bytes as disks and memory are sold, in powers of ten: `0.3 GB`, `12.0 MB`."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def gib(count: int | float) -> str:
    """Bytes for a reader; less than a tenth of a GiB in MiB."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.0f} MiB"
