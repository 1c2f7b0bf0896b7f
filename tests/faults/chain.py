"""One chain: a run that is started, struck and started again by the same command until it is done, then compared."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from launch.run.directory import RunDirectory, read_marker
from tests.faults.attempt import Attempt, run_command, send
from tests.faults.damage import damage, valid_steps
from tests.faults.disks import fill, plain_folder, small_disk
from tests.faults.drawing import LAYOUTS, Chain, Fault, Layout
from tests.faults.outcomes import Limits, Outcome, Result
from tests.helpers.distributed.recorded import apart, assert_the_same_to_the_byte, metrics_of

STEPS, EVERY = 80, 2
TOLERANCE = 1e-6
_SIGNALS = {
    "kill -9 of": signal.SIGKILL,
    "SIGTERM to": signal.SIGTERM,
    "SIGINT to": signal.SIGINT,
    "SIGHUP to": signal.SIGHUP,
}


@dataclass(frozen=True)
class Place:
    """Where a campaign works: the recipe, a cache to copy, and the undisturbed runs by layout."""

    folder: Path
    recipe: Path
    cache: Path

    def straight(self, layout: Layout) -> Path:
        """The undisturbed run."""
        return self.folder / "straight" / f"{layout.strategy}-{layout.processes}"


class CampaignEndedError(Exception):
    """Whoever started the campaign ends it; the chain under way does not count."""


class _StuckError(Exception):
    """The chain cannot go on."""


def play(chain: Chain, place: Place, limits: Limits, stop: Event) -> Result:
    """Begin the run, let every fault meet it, let it end, compare. Keeps the folder of a chain that had trouble."""
    folder = place.folder / f"chain-{chain.number:03d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    needs_disk = any(fault.action == "full disk" for fault in chain.faults)
    began = time.monotonic()
    with small_disk(folder / "runs") if needs_disk else plain_folder(folder / "runs"):
        player = _Player(chain, place, folder, limits, stop)
        try:
            player.play()
        finally:
            player.end()
            if needs_disk and player.result.lost:
                shutil.copytree(player.run.path, folder / "lost", dirs_exist_ok=True)
    player.result.seconds = time.monotonic() - began
    if not player.result.lost and not any(outcome.trouble for outcome in player.result.outcomes):
        shutil.rmtree(folder)
    return player.result


class _Player:
    """The state of a chain under way."""

    def __init__(self, chain: Chain, place: Place, folder: Path, limits: Limits, stop: Event) -> None:
        self.chain, self.place, self.folder, self.limits, self.stop = chain, place, folder, limits, stop
        self.run = RunDirectory(folder / "runs" / "run")
        self.cache = folder / "cache"
        shutil.copytree(place.cache, self.cache)
        self.layout, self.moved = chain.layout, False
        self.condition = ""
        self.attempt: Attempt | None = None
        self.attempts = 0
        self.pending: list[Outcome] = []
        self.result = Result(chain.number, str(chain.layout))

    def play(self) -> None:
        """All faults, the end, the comparison."""
        try:
            for fault in self.chain.faults:
                if self._is_done():
                    self.result.missed += 1
                elif fault.phase == "between":
                    self._between(fault)
                else:
                    self._strike(fault)
            self._finish()
        except _StuckError as trouble:
            self.result.verdict = f"given up: {trouble}"
            self.result.lost = not any(outcome.trouble for outcome in self.result.outcomes)
            return
        self._compare()

    def end(self) -> None:
        """Leave no process."""
        if self.attempt:
            self.attempt.end()

    def _is_done(self) -> bool:
        marker = None if self._running() else self._marker()
        return marker == f"DONE step {STEPS}" and self.run.adapter.is_dir()

    def _marker(self) -> str:
        try:
            marker = read_marker(self.run)
        except (OSError, ValueError):  # one of our own, of random bytes
            return ""
        return f"{marker.kind} {marker.text}" if marker else ""

    def _running(self) -> bool:
        return self.attempt is not None and not self.attempt.ended()

    def _start(self) -> Attempt:
        """The same command again: all that a user does."""
        if self.attempt is not None and not self.attempt.ended():
            return self.attempt
        self.attempts += 1
        command = run_command(
            self.place.recipe,
            self.run.path.parent,
            self.run.name,
            self.layout.strategy,
            self.layout.processes,
        )
        log = self.folder / f"attempt-{self.attempts:02d}.log"
        mark = f"{os.getpid()}-{self.chain.number}"
        self.before = valid_steps(self.run)
        self.attempt = Attempt(command, self.run, mark, log, self.cache, self.condition)
        return self.attempt

    def _look(self) -> None:
        """Of the attempt under way: it goes on from where it can, and the faults before it are survived."""
        assert self.attempt is not None
        if self.stop.is_set():
            raise CampaignEndedError
        if self.pending and self.attempt.stepped():
            resumed = re.search(r"resuming at step (\d+)", self.attempt.log.read_text(errors="replace"))
            reached, expected = int(resumed[1]) if resumed else 0, max(self.before, default=0)
            for outcome in self.pending:
                outcome.went_on = outcome.went_on or time.time() - self.attempt.began
                if reached < expected:
                    outcome.trouble = f"lost: went on at step {reached}, checkpoint-{expected} was whole"
            self.pending.clear()

    def _blame(self, trouble: str) -> None:
        """The latest fault. Those before it are still to be seen survived."""
        if not self.result.outcomes:
            raise _StuckError(f"undisturbed: {trouble}")
        for outcome in self.result.outcomes[-1:]:
            outcome.trouble = outcome.trouble or trouble
        self.pending = [outcome for outcome in self.pending if not outcome.trouble]

    def _wait(self, done: Any, starts: int = 2) -> bool:
        """Until `done(attempt)`; False when the run was done before. An attempt that fails by itself is repeated once.

        Raises _StuckError when the same command again does not help.
        """
        for _ in range(starts):
            attempt = self._start()
            while not attempt.ended():
                self._look()
                if done(attempt):
                    return True
                if time.time() - attempt.began > self.limits.start and not attempt.stepped():
                    attempt.end()
                    self._blame(f"hung: no step within {self.limits.start:.0f} s of a start")
                    break
                if time.time() - attempt.began > 2 * self.limits.start:
                    attempt.end()
                    self._blame("hung: took steps, and then no more")
                    break
                time.sleep(0.002 if attempt.stepped() else 0.02)
            else:
                self._look()
                if self._is_done():
                    self._close_pending(attempt)
                    return False
                if self.condition.startswith("files"):  # it cannot save: that is what was wanted
                    return False
                if self._marker().startswith("STOPPED"):
                    continue  # an announced stop that came late
                self._blame(f"by hand: the same command failed ({_last_words(attempt.log)})")
        raise _StuckError("the same command did not go on")

    def _close_pending(self, attempt: Attempt) -> None:
        for outcome in self.pending:
            outcome.went_on = outcome.went_on or time.time() - attempt.began
        self.pending.clear()

    def _strike(self, fault: Fault) -> None:
        """While an attempt runs."""
        born: list[float] = []

        def is_time(attempt: Attempt) -> bool:
            if not born and fault.phase in ("start", "importing", "meeting"):
                if not attempt.born(fault):
                    return False
                born.append(time.time())
            return attempt.reached(fault, born[0] if born else 0) and bool(attempt.victims(fault))

        if not self._wait(is_time):
            self.result.missed += 1
            return
        attempt = self._start()
        outcome = Outcome(str(fault), fault.kind)
        self.result.outcomes.append(outcome)
        struck = time.monotonic()
        goes_on = self._hit(fault, attempt)
        if goes_on is None:
            self.result.outcomes.pop()
            self.result.missed += 1
            return
        self.pending.append(outcome)
        if goes_on:
            return
        while not attempt.ended():
            if time.monotonic() - struck > self.limits.end:
                names = ", ".join(attempt.names())
                outcome.trouble = f"hung: {self.limits.end:.0f} s later still there: {names}"
                self.pending.remove(outcome)
                attempt.end()
            time.sleep(0.02)
        outcome.ended = time.monotonic() - struck
        self._free_disk()
        self._judge_stop(fault, outcome)
        if self._is_done():
            self._close_pending(attempt)

    def _hit(self, fault: Fault, attempt: Attempt) -> bool | None:
        """Returns whether the attempt is to go on by itself; None when its victims have just ended."""
        victims = attempt.victims(fault)
        if fault.action == "full disk":
            fill(self.run.path.parent, int(fault.share * 30_000))
            return False
        if fault.action.startswith("SIGSTOP"):
            if not send(victims, signal.SIGSTOP):
                return None
            time.sleep(fault.seconds)
            thaw = fault.action.startswith("SIGSTOP and SIGCONT")
            send(victims, signal.SIGCONT if thaw else signal.SIGKILL)
            return thaw
        return False if send(victims, _SIGNALS[fault.action]) else None

    def _judge_stop(self, fault: Fault, outcome: Outcome) -> None:
        """An announced stop between steps loses none of them."""
        if fault.phase != "steps" or fault.target != "top" or not fault.action.endswith(" to"):
            return
        if self._marker().startswith("STOPPED"):
            taken, saved = metrics_of(self.run.path)[-1]["step"], max(valid_steps(self.run), default=0)
            if taken > saved:
                outcome.trouble = f"lost: stopped after step {taken}, saved was {saved}"

    def _between(self, fault: Fault) -> None:
        """While nothing runs: what is under way is killed first, which counts as no fault."""
        damages = fault.action.startswith("damaged")
        if damages and not self._wait(lambda _: len(valid_steps(self.run)) >= 2):
            self.result.missed += 1
            return
        self.end()
        outcome = Outcome(str(fault), fault.kind)
        self.result.outcomes.append(outcome)
        if damages:
            damage(fault.target, self.run, self.cache, fault.share)
        elif fault.action == "move":
            layouts = [layout for layout in LAYOUTS if layout != self.layout]
            wanted = [layout for layout in layouts if str(layout) == fault.target]
            self.layout, self.moved = (wanted or layouts)[0], True
            outcome.fault = outcome.kind = f"move to {self.layout}"
        else:
            self._under(fault, outcome)
            return
        self.pending.append(outcome)
        self._wait(lambda attempt: attempt.stepped())

    def _under(self, fault: Fault, outcome: Outcome) -> None:
        """One attempt under a condition: it takes steps, or fails where it cannot save."""
        self.condition = fault.action
        self.pending.append(outcome)
        fails = fault.action.startswith("files")
        try:
            self._wait(lambda attempt: not fails and attempt.steps_taken() >= fault.ahead, starts=1)
        except _StuckError:
            if not outcome.trouble:
                raise
        self.condition = ""  # has its trouble, and the rest of the chain a run without it
        if fails and self._is_done():  # it never came to save anything
            self.result.outcomes.pop()
            self.result.missed += 1
        elif fails:
            assert self.attempt is not None
            outcome.ended = time.time() - self.attempt.began
            outcome.went_on = None
            self.pending = [outcome]

    def _finish(self) -> None:
        """Without a fault, to the end."""
        if not self._is_done():
            self._wait(lambda _: False, starts=3)
        if not self._is_done():
            raise _StuckError("did not end")

    def _compare(self) -> None:
        try:
            if self.moved:
                loss, weights = apart(self.run.path, self.place.straight(LAYOUTS[0]))
                self.result.verdict = f"moved: losses within {loss:.1e}, adapter within {weights:.1e}"
                self.result.lost = max(loss, weights) > TOLERANCE
            else:
                assert_the_same_to_the_byte(self.run.path, self.place.straight(self.chain.layout))
                self.result.verdict = "the same to the byte"
        except (AssertionError, OSError, ValueError) as error:
            self.result.verdict, self.result.lost = f"another run: {str(error)[:300]}", True

    def _free_disk(self) -> None:
        (self.run.path.parent / "filler").unlink(missing_ok=True)


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "without a word"
