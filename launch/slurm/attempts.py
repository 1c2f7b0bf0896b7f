"""The ledger of a run on a cluster: every attempt of every job, how it ended, and when to stop trying.

`ledger.jsonl` in the run directory, one line for each event, added and never changed: `submit`, `start`, `end`, and
`unstarted` for an attempt that ended before it could begin. An attempt without an `end` is under way, or its node
died; the next attempt closes it. A submission may be several jobs, of which one at a time has the run.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, get_args

from launch.atomic_files import naming
from launch.checkpoints.manifest import MANIFEST
from launch.run.directory import RunDirectory, read_marker
from launch.slurm.output import JobFacts
from launch.untrusted_files import TABLE, UNREADABLE, open_plain, parse_json, read_bytes, read_text, reason_of

How = Literal["done", "stopped", "refused", "preempted", "time", "crashed", "node_fail", "standby"]
RESTARTED: tuple[How, ...] = ("preempted", "time", "crashed", "node_fail")
"""Ends after which the job is queued again, counted apart. `standby`: it is, too, and has done nothing: another job of
the same submission has the run."""
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("job", "log", "nodes", "how", "reason", "failed_nodes", "alternatives"), str),
    **dict.fromkeys(("restart", "first_step", "last_step", "max_crashes"), int),
    **dict.fromkeys(("began", "ended"), (int, float)),
}
_JOB = re.compile(r"[0-9][0-9_+]{0,40}")
_JOBS = re.compile(r"([0-9][0-9_+]{0,40}(,|$)){0,100}")
MAX_CRASHES = 3
"""Attempts in a row that save no step, after which a job is given up: the default of --max-crashes."""
DOCTOR = "doctor: "
"""How the reason of an attempt begins that the doctor has kept from training."""
_NODE_FAILURES = 2  # as many times as crashes: bad luck, unless it is the run that brings its nodes down
_A_DAY = 8  # as many times as crashes, of a run that gets forward between them; 24 by default
_DAY_S = 86400.0


@dataclass(frozen=True)
class Attempt:
    """One start of a job. Steps are those of the newest published checkpoint; `how` is None without an end.

    `failed_nodes`: those of its nodes that were dead when it ended, with commas.
    """

    job: str
    restart: int
    began: float
    first_step: int
    log: str = ""
    nodes: str = ""
    how: How | None = None
    reason: str = ""
    last_step: int = 0
    ended: float = 0.0
    failed_nodes: str = ""
    max_crashes: int = MAX_CRASHES

    @property
    def saved(self) -> bool:
        """It brought the run forward."""
        return self.last_step > self.first_step

    @property
    def is_unfit(self) -> bool:
        """The doctor has kept it from training, and the job is not queued again. Jobs on other nodes may be."""
        return self.how == "refused" and self.reason.startswith(DOCTOR)


@dataclass(frozen=True)
class Ledger:
    """What the file says. `alternatives`: the jobs of the newest submission, where it was several; `ended_last`: of the
    newest line that ends an attempt (that order holds where the clocks of nodes differ)."""

    submitted: tuple[str, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    alternatives: tuple[str, ...] = ()
    ended_last: Attempt | None = None

    @property
    def open(self) -> Attempt | None:
        """The newest attempt without an end. Another job may have been turned away since."""
        return next((attempt for attempt in reversed(self.attempts) if attempt.how is None), None)

    @property
    def last(self) -> Attempt | None:
        """The attempt under way, or else the one that ended last: it may have begun before one that was turned away."""
        return self.open or self.ended_last

    @property
    def job(self) -> str | None:
        """The job that belongs to the run now, queued, running or gone; of several that wait, the first."""
        newest = self.alternatives or self.submitted[-1:]
        begun = {attempt.job for attempt in self.attempts if attempt.how != "standby"}
        if newest and not begun & {*newest}:
            return newest[0]
        return self.last.job if self.last else None

    def others_of(self, job: str) -> tuple[str, ...]:
        """The other jobs of the newest submission, if this is one of it."""
        others = tuple(other for other in self.alternatives if other != job)
        return others if len(others) < len(self.alternatives) else ()

    def attempts_of(self, job: str, before: int) -> list[Attempt]:
        """Attempts of one job, restarts 0 to `before` - 1. What is not written down saved no step: the disk was full,
        or it was over before it could begin."""
        known = {attempt.restart: attempt for attempt in self.attempts if attempt.job == job}
        attempts: list[Attempt] = []
        for restart in range(before):
            step = attempts[-1].last_step if attempts else 0
            unknown = Attempt(job, restart, 0.0, step, how="crashed", reason="left no word", last_step=step)
            attempts.append(known.get(restart, unknown))
        return attempts

    def restarts(self) -> dict[How, int]:
        """How often attempts ended so that another was needed, by kind."""
        counted = Counter(attempt.how for attempt in self.attempts)
        return {how: counted[how] for how in RESTARTED}


def ledger_file(run: RunDirectory) -> Path:
    return run.path / "ledger.jsonl"


def attempt_file(run: RunDirectory) -> Path:
    """`JOB.RESTART` of the attempt that has the run. The script of one that was given up, on a node that was out of
    reach and came back, must not stop its successor."""
    return run.path / ".attempt"


def attempt_of_now(run: RunDirectory) -> str | None:
    """JOB.RESTART of the attempt that has the run; None where that is not known."""
    try:
        return read_text(attempt_file(run)).strip() or None
    except UNREADABLE:
        return None


def read_ledger(run: RunDirectory) -> Ledger:
    """Every event of the file; a line that a kill or a full disk cut short is passed over."""
    try:
        lines = read_bytes(ledger_file(run), TABLE).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return Ledger()
    submitted: list[str] = []
    alternatives: tuple[str, ...] = ()
    attempts: list[Attempt] = []
    ended_last: int | None = None
    for event in filter(None, map(_parse, lines)):
        kind = event.pop("event")
        if kind == "submit":
            submitted.append(str(event["job"]))
            alternatives = tuple(filter(None, str(event.get("alternatives", "")).split(",")))
            continue
        if kind in ("start", "unstarted"):
            attempts.append(Attempt(**event))
            place: int | None = len(attempts) - 1
        elif (place := _attempt_of(attempts, event)) is not None:
            attempts[place] = Attempt(**{**vars(attempts[place]), **event})
        if place is not None and attempts[place].how not in (None, "standby"):
            ended_last = place
    newest = None if ended_last is None else attempts[ended_last]
    return Ledger(tuple(submitted), tuple(attempts), alternatives, newest)


def _attempt_of(attempts: Sequence[Attempt], event: Mapping[str, Any]) -> int | None:
    """Which open attempt an end belongs to: two jobs of one run may overlap."""
    for place, attempt in reversed(list(enumerate(attempts))):
        ours = event.get("job", attempt.job) == attempt.job
        if attempt.how is None and ours and event.get("restart", attempt.restart) == attempt.restart:
            return place
    return None


def _parse(line: str) -> dict[str, Any] | None:
    try:
        event = parse_json(line)
    except ValueError:
        return None
    known = {"event", "alternatives", *Attempt.__dataclass_fields__}
    if not isinstance(event, dict) or not {"event"} <= event.keys() <= known:
        return None
    begun = {"job", "restart", "began", "first_step"}
    if "alternatives" in event and event["event"] != "submit":
        return None
    needed = {"submit": {"job"}, "start": begun, "unstarted": {*begun, "how"}, "end": {"how"}}
    kind = event["event"]
    if not isinstance(kind, str) or kind not in needed or not needed[kind] <= event.keys():
        return None
    fits = all(isinstance(event[name], kinds) for name, kinds in _TYPES.items() if name in event)
    fits = fits and all(math.isfinite(value) for value in event.values() if isinstance(value, float))
    fits = (
        fits and _JOB.fullmatch(event.get("job", "0")) is not None
    )  # it becomes an argument, and a file's name
    fits = fits and _JOBS.fullmatch(event.get("alternatives", "")) is not None
    return event if fits and event.get("how", "done") in get_args(How) else None


def write_event(run: RunDirectory, event: str, **facts: Any) -> None:
    """Add one line, on its way to the disk when this returns."""
    line = json.dumps({"event": event, **facts}) + "\n"
    with naming(ledger_file(run)), _open_to_add(ledger_file(run)) as file:
        if file.tell() and not _ends_a_line(file.name):
            line = "\n" + line  # a line that was cut short stays alone
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _open_to_add(file: Path) -> BinaryIO:
    """OSError for a link: who may write to the folder could have laid down one to a file of ours."""
    return open(file, "ab+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def _ends_a_line(name: str) -> bool:
    with open_plain(name) as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def newest_step(run: RunDirectory) -> int:
    """Of the newest published checkpoint, without reading it; 0 without one."""
    published = [folder for folder in run.checkpoints() if (folder / MANIFEST).is_file()]
    return int(published[-1].name.rpartition("-")[2]) if published else 0


# how an attempt ended -----------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """How an attempt ended, and why. `failed_nodes`: as of an `Attempt`."""

    how: How
    reason: str = ""
    failed_nodes: str = ""


def how_it_ended(run: RunDirectory, asked: str = "", down: Sequence[str] = ()) -> End:
    """From the marker. Without one it crashed, unless it was asked to stop and nothing else happened to it.

    `asked`: what Slurm asked the job's script for (`preempted`, `time`, or nothing); a dead node is followed by that,
    too. `down`: nodes of the job that are dead.
    """
    try:
        marker = read_marker(run)
    except UNREADABLE as error:
        return End("crashed", f"its marker cannot be read ({reason_of(error)})")
    if marker is None:
        if down:
            return End("node_fail", f"node failure: {', '.join(down)}")
        if asked in ("preempted", "time"):
            return End(
                cast(How, asked), "killed before the checkpoint was written; see grace_seconds, signal_lead"
            )
        return End("crashed", "ended without a marker; see the log")
    if marker.kind == "DONE":
        return End("done", marker.text)
    if marker.kind == "REFUSED":
        return End("refused", marker.text)
    word = re.split(r"\W", marker.text, maxsplit=1)[0]
    if word in ("preempted", "time"):
        return End(cast(How, word), marker.text)
    return End("crashed" if word == "orphaned" else "stopped", marker.text)


def with_job(end: End, job: JobFacts | None, restart: int) -> tuple[End, bool]:
    """What the job's state adds: (end, whether Slurm has queued the job again by itself).

    A TERM means several things, and Slurm 22.05 tells them apart only here: it counts a restart as soon as it requeues,
    names the time limit as reason, and otherwise a job that is completing was cancelled.
    """
    if job is None or end.how not in RESTARTED:
        return end, False
    if job.restarts > restart:
        return end, True
    if job.reason == "TimeLimit" or job.state == "TIMEOUT":
        return End("time" if end.how == "preempted" else end.how, end.reason), False
    # (What crashed may not be queued again when it may never be: that is no scancel.)
    crashed = end.how in ("crashed", "node_fail")
    if job.state in ("COMPLETING", "CANCELLED") and (job.requeueable or not crashed):
        return End("stopped", f"scancel: {end.reason}"), False
    return end, False


# when to stop trying ------------------------------------------------------------------------


def reason_to_give_up(attempts: Sequence[Attempt], max_crashes: int) -> str | None:
    """Why the last job is not to be queued again; None while it may be. A new submission counts anew.

    An attempt that saves a step begins the count anew. Dead nodes are counted apart: a node is no fault of the run's,
    until it is one node after another. And a run that crashes all day gets forward too slowly to be left alone.
    """
    if not attempts:
        return None
    own = [each for each in attempts if each.job == attempts[-1].job and each.how != "standby"]
    if not own:
        return None
    last = own[-1]
    idle = [*takewhile(lambda attempt: not attempt.saved and attempt.how in RESTARTED, own[::-1])][::-1]
    dead = sum(attempt.how == "node_fail" for attempt in idle)
    if len(idle) - dead >= max_crashes or dead >= _NODE_FAILURES * max_crashes:
        kinds = ", ".join(str(attempt.how) for attempt in idle)
        return (
            f"no step was saved in {len(idle)} attempts in a row ({kinds}; at step {last.last_step}); "
            "see the log, then submit again"
        )
    bad = [attempt for attempt in own if attempt.how in ("crashed", "node_fail")]
    newest = max(attempt.ended for attempt in own)
    today = sum(attempt.ended > newest - _DAY_S for attempt in bad)
    if bad and bad[-1] is last and today >= _A_DAY * max_crashes:
        return f"crashed {today} times within a day (now at step {last.last_step}); see the log, then submit again"
    return None


def counted(restarts: Mapping[How, int]) -> str:
    """In words: `preempted 2, time 0, crashed 1`."""
    return ", ".join(f"{how} {count}" for how, count in restarts.items())
