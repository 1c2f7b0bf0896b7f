"""Nodes that failed under a run: which are dead, and which the next attempt is to do without."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from launch.slurm.attempts import Attempt
from launch.slurm.output import JobFacts, Nodes

REMEMBERED_S = 86400.0


def dead_nodes(nodes: Sequence[Nodes], used: Collection[str]) -> list[str]:
    """Those of the nodes of a job that are dead or out of reach."""
    return sorted({name for group in nodes if group.dead for name in group.names} & {*used})


def nodes_to_exclude(
    attempts: Sequence[Attempt], job: JobFacts, nodes: Sequence[Nodes], used: Sequence[str]
) -> list[str]:
    """The nodes that the job's next attempt may not get: those it was submitted without, and those that failed lately.

    A node that is down Slurm leaves out itself; one that comes back for a moment, again and again, it does not.
    `nodes`: of the job's partition; `used`: those that it had.
    """
    ever = {name for attempt in attempts for name in attempt.failed_nodes.split(",")}
    theirs = {name for name in job.excluded if name not in ever}
    if job.asks_for_nodes:
        return sorted(theirs)
    since = time.time() - REMEMBERED_S
    failed = [name for one in attempts if one.ended > since for name in one.failed_nodes.split(",") if name]
    # As many others as it needs must be left, of the kinds that it had: only of these is it known that they fit.
    kinds = {group.kind for group in nodes if {*group.names} & {*used}}
    fit = {name for group in nodes if group.in_use and group.kind in kinds for name in group.names} - theirs
    known = {name for group in nodes for name in group.names}
    left_out: set[str] = set()
    for name in failed[::-1]:  # the newest failure first
        if name in known and len(fit - left_out - {name}) >= len(used):
            left_out.add(name)
    return sorted(theirs | left_out)
