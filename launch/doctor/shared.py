"""Whether all nodes of a job have one disk for the run: the same files, locks that all respect, one time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from launch.doctor.finding import Finding
from launch.errors import SamestepError
from launch.run.lock import hold_lock, lock_holder

LOCK = "lock"
_PATIENCE_S = 5.0  # until a node's file is seen everywhere; NFS asks its server anew after 3 s


def write_presence(folder: Path, node: int) -> float:
    """Leave a file that says that this node sees the folder; seconds that its disk's clock is behind this node's.

    On NFS the time of a file is the server's. OSError: the folder is not there, or cannot be written.
    """
    file = folder / f"node-{node}"
    with file.open("x") as opened:
        opened.write("here\n")
        opened.flush()
        os.fsync(opened.fileno())
    return time.time() - file.stat().st_mtime


def unseen(folder: Path, nodes: Mapping[int, str]) -> list[str]:
    """The names of nodes whose files are not here within some seconds."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        # A change of our own makes NFS forget what it remembers of the folder.
        with contextlib.suppress(OSError):
            poke = folder / f".poke-{os.getpid()}-{os.uname().nodename}"
            poke.touch()
            poke.unlink()
        missing = [name for node, name in nodes.items() if not (folder / f"node-{node}").exists()]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.2)


@contextmanager
def held_by_the_first(folder: Path, node: int) -> Iterator[None]:
    """Node 0 holds a lock meanwhile, where it can; whether the folder takes locks is found out elsewhere."""
    with contextlib.ExitStack() as stack:
        if node == 0:
            with contextlib.suppress(SamestepError, OSError):
                stack.enter_context(hold_lock(folder, LOCK))
        yield


def judge_shared(folder: Path, node: int, nodes: Mapping[int, str]) -> Iterator[Finding]:
    """Of a node that has written its file: whether it sees the others', and the lock of the first one."""
    missing = unseen(folder, nodes)
    if missing:
        yield Finding(
            "shared disk",
            "failed",
            f"{folder.parent}: does not show the files of {', '.join(missing)}",
            "this folder is not the others'; mount the shared disk on this node, or choose another --runs-dir",
        )
        return
    yield Finding("shared disk", "ok", f"{folder.parent}: shows the files of all {len(nodes)} nodes")
    if node == 0 or 0 not in nodes:
        return
    try:
        holder = lock_holder(folder, LOCK)
    except (SamestepError, OSError) as error:
        yield Finding("shared locks", "failed", str(error), "choose a --runs-dir on a file system with locks")
        return
    if holder is None:
        yield Finding(
            "shared locks",
            "failed",
            f"{folder.parent}: a lock of {nodes[0]} is not seen here, so two jobs could train one run",
            "locks are this node's own: mount NFS without `nolock` and `local_lock`, Lustre with `-o flock`",
        )
    else:
        yield Finding("shared locks", "ok", f"{folder.parent}: sees the lock of {nodes[0]}")
