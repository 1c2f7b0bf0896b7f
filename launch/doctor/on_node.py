"""`python -m launch.doctor.on_node`: one node's part of `samestep doctor --nodes`, which srun starts on all at once.

Prints a line of JSON for each finding, and a last one when it has looked at everything. Slurm brings the lines to
whoever asked: the shared disk may be what is missing. Each line stays below 1,024 bytes, where srun cuts labelled ones.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.doctor.finding import Finding
from launch.doctor.links import judge_links, listen, own_address, unreachable
from launch.doctor.meeting import Meeting, meet
from launch.doctor.node import (
    SLOW_DISK,
    check_disk,
    check_inputs,
    check_machine,
    check_scratch,
    space_needed,
)
from launch.doctor.probe import Across, judge, measure
from launch.doctor.shared import held_by_the_first, judge_shared, write_presence
from launch.errors import SamestepError
from launch.hardware import gpus_present
from launch.local.accelerate_command import free_port
from launch.recipe.loading import find_recipe, load_recipe
from launch.untrusted_files import printable
from launch.versions import PACKAGES as LIBRARIES
from launch.versions import installed_version

BUDGET_S = 58.0  # for everything, by the clock of this process
ARRIVAL_S, ROUND_S = 14.0, 9.0  # until all nodes have come; until all have done what a round needs
ALL_DONE_S = 5.0  # until all have measured: their deadlines are as many seconds apart as their beginnings
PACKAGES = (*LIBRARIES, "datasets", "samestep")
CLOCK_WARNING_S, CLOCK_FAILED_S = 2.0, 30.0
_LONGEST_TEXT = 380


@dataclass
class Words:
    """What this node says, line by line. `doing`: what is being looked at, for whoever finds that it takes too long."""

    node: str
    doing: str = "begin"
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self._write(vars(finding) | {"node": self.node, "text": finding.text[:_LONGEST_TEXT]})

    def end(self) -> None:
        self._write({"node": self.node, "end": True})

    def _write(self, values: Mapping[str, object]) -> None:
        with self._lock:
            sys.stdout.write(json.dumps(values) + "\n")
            sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status, which is 0 whatever was found."""
    options = parse(arguments)
    words = Words(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    began = time.monotonic()
    _end_by(words, began + BUDGET_S)
    try:
        _look(options, words, began)
    except (SamestepError, OSError) as error:
        words.say([Finding(words.doing, "failed", printable(str(error)), "see the words")])
    words.end()
    return 0


def _end_by(words: Words, deadline: float) -> None:
    """A disk that does not answer holds this process in the kernel: a thread says so, and ends all that can end."""

    def watch() -> None:
        time.sleep(max(deadline - time.monotonic(), 0))
        what = Finding(
            words.doing, "failed", f"no answer within {BUDGET_S:.0f} s", "look at this part of the node"
        )
        words.say([what])
        words.end()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _look(options: argparse.Namespace, words: Words, began: float) -> None:
    me, shared = int(os.environ.get("SLURM_NODEID", "0")), Path(options.shared)
    words.doing = "machine"
    words.say(check_machine())
    if options.scratch:
        words.say([check_scratch(Path(options.scratch))])
    words.doing = "runs folder"
    lag = _presence(shared, me, words)
    recipe = None
    if options.recipe and lag is not None:
        words.doing = "data"
        recipe = load_recipe(find_recipe(options.recipe))
        words.say(check_inputs(recipe))
    if lag is not None:
        words.doing = "runs folder"
        words.say(check_disk(shared, space_needed(recipe), SLOW_DISK / options.nodes))
    words.doing = "meeting"
    meeting, across = meet(me, 1, "", 0, "", 0), None
    try:
        meeting = meet(me, options.nodes, options.head, options.port, options.token, ARRIVAL_S)
        across = _compare(options, words, meeting, me, lag)
    except OSError as error:
        words.say([_no_meeting(me, options, error)])
    if not options.quick:
        words.doing = "products"
        _measure(options, words, meeting, across, BUDGET_S - ALL_DONE_S - 2 - (time.monotonic() - began))
    meeting.close()


def _measure(
    options: argparse.Namespace, words: Words, meeting: Meeting, across: Across | None, left: float
) -> None:
    measured = measure(options.processes, _interface(options.interface), left, across)
    try:
        said = meeting.exchange(measured.speeds, ALL_DONE_S)
    except OSError:
        said = {}
    words.say(judge(measured, [speed for speeds in said.values() for speed in speeds]))


def _interface(name: str) -> dict[str, str]:
    return {"NCCL_SOCKET_IFNAME": name, "GLOO_SOCKET_IFNAME": name} if name else {}


def _no_meeting(me: int, options: argparse.Namespace, error: OSError) -> Finding:
    place = f"{options.head}:{options.port}"
    if me == 0:
        return Finding(
            "ports", "failed", f"{place} cannot be used ({error})", "see `ss -lntp` for who listens there"
        )
    remedy = (
        f"the processes of a run meet there: look at name, route and firewall between here and {options.head}"
    )
    return Finding("meeting", "failed", f"{place} is not reached ({error})", remedy)


def _presence(shared: Path, me: int, words: Words) -> float | None:
    try:
        return write_presence(shared, me)
    except OSError as error:
        words.say(
            [
                Finding(
                    "shared disk",
                    "failed",
                    f"{shared.parent}: {'not there' if not shared.exists() else error.strerror}",
                    "mount the shared disk on this node, or choose another --runs-dir",
                )
            ]
        )
        return None


# what takes all nodes ---------------------------------------------------------------------------


def _compare(
    options: argparse.Namespace, words: Words, meeting: Meeting, me: int, lag: float | None
) -> Across | None:
    """The rounds in which the nodes tell each other what they see; where their processes can meet, if they can."""
    words.doing = "network"
    listener, address = None, ""
    broken = None
    try:
        device = options.device or ("cuda" if gpus_present() else "cpu")
        address = own_address(options.interface, device)
        listener = listen(address, options.nodes)
    except (ValueError, OSError) as error:
        remedy = "choose another `network_interface` in the site's file, or look at this node's network"
        broken = Finding("network", "failed", str(error), remedy)
    with held_by_the_first(Path(options.shared), me if lag is not None else -1):
        place = listener.getsockname()[:2] if listener else None
        hello = {"name": words.node, "versions": _versions(), "place": place, "lag": lag, "port": free_port()}
        others = meeting.exchange(hello, ARRIVAL_S)
        now = time.time()
        clocks = meeting.exchange(now, ROUND_S)
        if options.nodes > 1:
            words.say(_judge_versions(me, others))
        words.say([_judge_clock(me, now, clocks, others)])
        sharing = {node: each["name"] for node, each in others.items() if each["lag"] is not None}
        if lag is not None and options.nodes > 1:
            words.say(judge_shared(Path(options.shared), me, sharing))
        places = {node: each["place"] for node, each in others.items() if each["place"] and node != me}
        missed = unreachable(address, places) if listener else []
        reached = meeting.exchange({"missed": missed, "broken": broken is not None}, 2 * ROUND_S)
    if listener:
        listener.close()
    names = {node: each["name"] for node, each in others.items()}
    bad = {node for node, each in reached.items() if each["broken"]}
    if broken:
        words.say([broken])
    elif options.nodes > 1:
        words.say(
            judge_links(
                me, names, {node: each["missed"] for node, each in reached.items()}, options.interface
            )
        )
    whole = len(reached) == options.nodes and not bad and not any(each["missed"] for each in reached.values())
    if not whole or options.nodes == 1:
        return None
    return Across(options.head, others[0]["port"], me * options.processes, options.nodes * options.processes)


def _versions() -> dict[str, str]:
    python = {"Python": ".".join(map(str, sys.version_info[:3]))}
    return python | {package: installed_version(package, "missing") for package in PACKAGES}


def _judge_versions(me: int, others: Mapping[int, Mapping[str, Any]]) -> Iterator[Finding]:
    """This node's packages against those that most nodes have; of two nodes, those of the first."""
    mine = others[me]["versions"]
    problems = []
    for package, installed in mine.items():
        all_of_it = [each["versions"].get(package) for each in others.values()]
        of_first = others.get(0, others[me])["versions"].get(package)
        usual = max(all_of_it, key=lambda one: (all_of_it.count(one), one == of_first))
        if installed != usual:
            problems.append(f"{package} {installed}, and {usual} on the others")
    if problems:
        remedy = "one environment for all nodes: on the shared disk, or one container"
        yield Finding("same versions", "failed", "; ".join(problems), remedy)
    else:
        yield Finding("same versions", "ok", f"as on the other {len(others) - 1} nodes")


def _judge_clock(
    me: int, now: float, clocks: Mapping[int, float], others: Mapping[int, Mapping[str, Any]]
) -> Finding:
    """This node's clock against those of the nodes and of their disks, read at one moment."""
    times = [*clocks.values()]
    lags = {node: each["lag"] for node, each in others.items() if each["lag"] is not None}
    times += [clocks[node] - lag for node, lag in lags.items() if node in clocks]
    apart = now - statistics.median_low(times)
    text = f"{abs(apart):,.1f} s {'ahead' if apart > 0 else 'behind'}"
    if abs(apart) < CLOCK_WARNING_S:
        return Finding("clock", "ok", text)
    remedy = "let chrony or ntpd set this node's clock: dates of files and logs, and certificates, go by it"
    return Finding("clock", "failed" if abs(apart) >= CLOCK_FAILED_S else "warning", text, remedy)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, as slurm's scripts give it."""
    parser = argparse.ArgumentParser(prog="python -m launch.doctor.on_node", description=__doc__)
    parser.add_argument("--nodes", type=int, required=True, help="of the job")
    parser.add_argument("--head", required=True, help="the name of the first node")
    parser.add_argument("--port", type=int, required=True, help="where the run's processes will meet")
    parser.add_argument("--token", required=True, help="of this look at the nodes")
    parser.add_argument(
        "--shared", required=True, help="a new folder beside the runs, which all nodes should see"
    )
    parser.add_argument("--processes", type=int, default=1, help="of a node")
    parser.add_argument("--device", choices=["", "cuda", "cpu"], default="", help="default: what is here")
    parser.add_argument("--interface", default="")
    parser.add_argument("--scratch", default="")
    parser.add_argument("--recipe", default="")
    parser.add_argument("--quick", action="store_true", help="do not measure")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
