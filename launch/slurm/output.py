"""What Slurm's commands print."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice, product

from launch.errors import RunError

RUNNING = ("RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING")
ENDING = ("COMPLETING", "STAGE_OUT")
"""States of a job that has its nodes, and of one that gives them back."""
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_MOST_NODES = 65536  # that Slurm can have


@dataclass(frozen=True)
class JobFacts:
    """What `scontrol show job` says of a job.

    `excluded`: nodes that it may not get; `asks_for_nodes`: it names the nodes, or a reservation, that it must get.
    """

    state: str
    reason: str
    restarts: int
    requeueable: bool
    start: str
    excluded: tuple[str, ...] = ()
    asks_for_nodes: bool = False
    heterogeneous: bool = False


@dataclass(frozen=True)
class Nodes:
    """A line of sinfo: nodes of one kind (CPUs, memory, GPUs, features) in one state."""

    kind: str
    state: str
    names: tuple[str, ...]

    @property
    def dead(self) -> bool:
        """Down, failed, or not heard of."""
        return re.match(r"down|fail|.*\*$", self.state) is not None

    @property
    def in_use(self) -> bool:
        """Of those that jobs get, now or when others have ended."""
        return self.state.rstrip("~#-") in ("idle", "mixed", "allocated", "completing", "planned")


@dataclass(frozen=True)
class QueuedJob:
    """A line of squeue."""

    job: str
    state: str
    requeueable: bool


def parse_job_id(printed: str) -> str:
    """The id in the output of `sbatch --parsable`: `12` or `12;cluster`."""
    lines = [line for line in printed.splitlines() if re.fullmatch(r"[0-9]+(;.*)?", line.strip())]
    if not lines:
        raise RunError(f"sbatch: printed no job id ({printed.strip()[:200]!r}); see `squeue --me`")
    return lines[-1].strip().partition(";")[0]


def parse_job(printed: str, job: str) -> JobFacts | None:
    """The facts in the output of `scontrol show job -o JOB`; None when it does not know the job.

    One id may mean several jobs: the last task of an array has the array's own, a heterogeneous job is all its parts.
    """
    lines = [dict(re.findall(r"(?:^|\s)([A-Za-z/:]+)=(\S*)", line)) for line in printed.splitlines()]
    facts = next((line for line in lines if "JobState" in line and job in _ids(line)), None)
    if facts is None:
        return None
    named = [facts.get(name, "(null)") for name in ("ReqNodeList", "Reservation")]
    return JobFacts(
        state=facts["JobState"],
        reason=facts.get("Reason", "None"),
        restarts=int(facts["Restarts"]) if facts.get("Restarts", "").isdigit() else 0,
        requeueable=facts.get("Requeue", "1") != "0",
        start=facts.get("StartTime", "Unknown"),
        excluded=tuple(expand_nodes(facts.get("ExcNodeList", "(null)"))),
        asks_for_nodes=any(value != "(null)" for value in named),
        heterogeneous="HetJobId" in facts,
    )


def _ids(facts: Mapping[str, str]) -> tuple[str, str]:
    return facts.get("JobId", ""), f"{facts.get('ArrayJobId', '')}_{facts.get('ArrayTaskId', '')}"


def parse_queue(printed: str) -> list[QueuedJob]:
    """The jobs in the output of `squeue --noheader --Format=JobArrayID,State,Requeue`."""
    lines = [line.split() for line in printed.splitlines()]
    return [QueuedJob(words[0], words[1], words[2] != "0") for words in lines if len(words) == 3]


def parse_nodes(printed: str) -> list[Nodes]:
    """The nodes in the output of `sinfo --noheader --format='%c,%m,%G,%f|%T|%N'`."""
    lines = [line.rsplit("|", 2) for line in printed.splitlines()]
    return [Nodes(words[0], words[1], tuple(expand_nodes(words[2]))) for words in lines if len(words) == 3]


def expand_nodes(names: str) -> list[str]:
    """The nodes in a list as Slurm writes it: `n[1-3,07],gpu2` are n1, n2, n3, n07, gpu2. None of `(null)`."""
    expanded: list[str] = []
    for name in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", "" if names == "(null)" else names):
        parts = re.split(r"\[([^\]]*)\]", name)  # texts, and between them what was in brackets
        choices = [_numbers(part) if place % 2 else [part] for place, part in enumerate(parts)]
        expanded += ["".join(words) for words in islice(product(*choices), _MOST_NODES)]
    return expanded


def _numbers(ranges: str) -> list[str]:
    numbers: list[str] = []
    for one in ranges.split(","):
        first, _, last = one.partition("-")
        if first.isdigit() and last.isdigit():
            end = min(int(last) + 1, int(first) + _MOST_NODES)
            numbers += [str(number).zfill(len(first)) for number in range(int(first), end)]
        else:
            numbers.append(one)
    return numbers


def seconds_of(time: str) -> int | None:
    """A time of Slurm (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in seconds; None for any other text."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        return None
    days, *parts = match.groups()
    first, second, third = (int(part or 0) for part in parts)
    if days is not None:
        return ((int(days) * 24 + first) * 60 + second) * 60 + third
    return (first * 60 + second) * 60 + third if parts[2] is not None else first * 60 + second
