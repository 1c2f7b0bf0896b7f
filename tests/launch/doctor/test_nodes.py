"""The doctor on several nodes, without Slurm: how they meet, who is to blame, what a table shows."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launch.doctor import links, on_node, on_slurm, shared
from launch.doctor.finding import Finding
from launch.doctor.links import broken_pairs, culprits, judge_links, listen, own_address, unreachable
from launch.doctor.meeting import Meeting, meet
from launch.doctor.reports import findings_of_nodes, print_nodes, short_reason, unfit_nodes
from launch.local.accelerate_command import free_port
from launch.run.lock import hold_lock
from launch.slurm.site import load_site
from tests.helpers.launcher import samestep


def _together(
    nodes: int, act: Callable[[int, Meeting], object], came: set[int] | None = None
) -> dict[int, object]:
    """What `act` returns on each of the nodes that come."""
    port, found = free_port(), {}

    def one(node: int) -> None:
        meeting = meet(node, nodes, "127.0.0.1", port, "token", 5)
        found[node] = act(node, meeting)
        meeting.close()

    threads = [threading.Thread(target=one, args=(node,)) for node in (came or range(nodes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_nodes_tell_each_other_and_one_that_is_silent_is_waited_for_once() -> None:
    def act(node: int, meeting: Meeting) -> list[dict[int, object]]:
        return [meeting.exchange({"round": number, "node": node}, 1) for number in range(2)]

    began = time.monotonic()
    found = _together(4, act, {0, 1, 3})
    assert time.monotonic() - began < 4
    wanted = [{node: {"round": number, "node": node} for node in (0, 1, 3)} for number in range(2)]
    assert found == {0: wanted, 1: wanted, 3: wanted}
    assert meet(2, 1, "", 0, "", 0).exchange("alone", 0) == {2: "alone"}


def test_who_is_no_node_of_the_job_is_not_heard() -> None:
    port = free_port()
    host = meet(0, 2, "", port, "token", 1)
    said = [
        "no json",
        "[]",
        '{"token": "other", "node": 1, "round": 0, "value": 1}',
        '{"token": "token", "node": 7}',
    ]
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall("\n".join([*said, ""]).encode())
        assert host.exchange(0, 0.5) == {0: 0}
    with pytest.raises(OSError, match="in use"):
        meet(0, 2, "", port, "token", 1)
    host.close()
    with pytest.raises(OSError, match="refused"):
        meet(1, 2, "127.0.0.1", port, "token", 0.1)


def test_of_broken_connections_the_node_that_most_miss_is_named() -> None:
    pairs = broken_pairs({0: [2], 1: [2], 2: [0, 1, 3], 3: []})
    assert culprits(pairs, 4) == {2}
    assert culprits(broken_pairs({0: [1]}), 2) == {0, 1}
    assert culprits(broken_pairs({0: [1]}), 4) == set()
    names = {number: f"n{number + 1}" for number in range(4)}
    states = {}
    for missed in ({0: [2], 1: [2], 3: [2]}, {0: [1]}):
        found = [next(judge_links(node, names, missed, "ib0")) for node in names]
        states[len(missed)] = [finding.state for finding in found]
    assert states == {3: ["ok", "ok", "failed", "ok"], 1: ["failed", "failed", "ok", "ok"]}


def test_connections_are_made_from_the_interface_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_address("lo", "cpu") == "127.0.0.1"
    with pytest.raises(ValueError, match="there is no interface ib9 "):
        own_address("ib9", "cuda")
    monkeypatch.setattr(links, "_is_up_and_real", lambda _: False)
    with pytest.raises(ValueError, match="no interface is up"):
        own_address("", "cuda")
    with listen("127.0.0.1", 2) as listener:
        place = listener.getsockname()
        assert unreachable("127.0.0.1", {1: place, 2: ("127.0.0.1", free_port()), 3: ("x", "y")}) == [2, 3]


def test_another_folder_and_locks_of_ones_own_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "_PATIENCE_S", 0.0)
    names = {0: "n1", 1: "n2"}
    folder = tmp_path / "look"
    with pytest.raises(FileNotFoundError):
        shared.write_presence(folder, 1)
    folder.mkdir()
    assert abs(shared.write_presence(folder, 1)) < 5
    (apart,) = shared.judge_shared(folder, 1, names)
    assert (apart.state, "does not show the files of n1" in apart.text) == ("failed", True)
    shared.write_presence(folder, 0)
    own = list(shared.judge_shared(folder, 1, names))
    assert [finding.state for finding in own] == ["ok", "failed"]
    assert "a lock of n1 is not seen here" in own[1].text
    with hold_lock(folder, shared.LOCK):
        assert [finding.state for finding in shared.judge_shared(folder, 1, names)] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("ahead", "state"), [(0.1, "ok"), (10, "warning"), (300, "failed"), (-300, "failed")]
)
def test_a_clock_is_judged_by_the_others_and_by_the_disks(ahead: float, state: str) -> None:
    others = {0: {"lag": 0.0}, 1: {"lag": ahead}}
    clocks = {0: 1000.0, 1: 1000.0 + ahead}
    assert on_node._judge_clock(1, clocks[1], clocks, others).state == state
    assert on_node._judge_clock(0, clocks[0], clocks, others).state == "ok"


def test_of_packages_what_most_nodes_have_is_right_and_of_two_what_the_first_has() -> None:
    def judge(node: int, *versions: str) -> str:
        others = {number: {"versions": {"peft": each}} for number, each in enumerate(versions)}
        return next(on_node._judge_versions(node, others)).state

    assert [judge(node, "2", "1", "1") for node in range(3)] == ["failed", "ok", "ok"]
    assert [judge(node, "2", "1") for node in range(2)] == ["ok", "failed"]


def _line(task: int, **values: object) -> str:
    return f"{task}: {json.dumps(values)}"


def test_a_node_that_did_not_answer_is_named_with_its_last_words() -> None:
    printed = [
        _line(0, check="clock", state="ok", text="0.1 s"),
        _line(0, end=True),
        "1: slurmstepd: error: execve(): /shared/python: No such file or directory",
        "srun: error: n2: task 1: Exited with exit code 2",
        _line(2, check="limits", state="warning", text="few", remedy="ulimit"),
        "2: {half a li",
        _line(9, check="clock", state="failed", text="of no node"),
    ]
    found = findings_of_nodes("\n".join(printed), ["n1", "n2", "n3", "n4"])
    silent = {each.node: each.text for each in found if each.check == "answer"}
    assert silent["n2"] == "did not answer (srun: error: n2: task 1: Exited with exit code 2)"
    assert silent["n3"] == "fell silent after 'limits'"
    assert silent["n4"] == "did not answer"
    assert unfit_nodes(found) == ["n2", "n3", "n4"]
    assert short_reason(found).startswith("n2: answer: did not answer")


def test_without_the_first_node_the_others_are_not_to_blame() -> None:
    printed = (
        _line(1, check="meeting", state="failed", text="n1:1 is not reached", remedy="x")
        + "\n"
        + _line(1, end=True)
    )
    assert unfit_nodes(findings_of_nodes(printed, ["n1", "n2"])) == ["n1"]
    both = f"{_line(0, end=True)}\n{printed}"
    assert unfit_nodes(findings_of_nodes(both, ["n1", "n2"])) == ["n2"]


def test_a_table_has_what_is_right_once_and_what_is_not_for_each_node() -> None:
    found = [Finding("clock", "ok", f"{number}.0 s", node=f"n{number}") for number in (1, 2)]
    found += [Finding("disk", "ok", "same", node="n1"), Finding("disk", "failed", "full", "make room", "n2")]
    console = Console(width=100, record=True, file=io.StringIO())
    print_nodes(console, found, ["n1", "n2"])
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]
    assert [row for row in rows if row] == [
        ["all", "clock", "ok", "n1: 1.0 s", ""],
        ["n1", "disk", "ok", "same", ""],
        ["n2", "disk", "failed", "full", "make room"],
    ]


def test_what_is_wrong_with_a_request_for_nodes_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert samestep("doctor", "--runs-dir", str(tmp_path / "runs"), *words) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        return told

    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--nodes: '0' cannot be" in refused("--nodes", "0")
    assert "--partition: is for nodes of a cluster; add --nodes" in refused("--partition", "gpu")
    assert "--device: 'tpu' is none of cuda, cpu" in refused("--nodes", "2", "--device", "tpu")
    assert "salloc: not found in PATH" in refused("--nodes", "2")
    salloc = tmp_path / "salloc"
    salloc.write_text("#!/bin/sh\necho 'salloc: error: invalid partition specified: nowhere' >&2; exit 1\n")
    salloc.chmod(0o755)
    said = refused("--nodes", "2", "--partition", "nowhere")
    assert "salloc: no nodes (invalid partition specified: nowhere); see `sinfo`" in said
    assert not (tmp_path / "runs").exists()
    sinfo = tmp_path / "sinfo"
    sinfo.write_text("#!/bin/sh\necho 4\n")
    sinfo.chmod(0o755)
    said = refused("--nodes", "2", "--gpus-per-node", "5")
    assert "8 x 5 processes are 40 CPUs of a node, and no node of this cluster has more than 4" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_gives_up_waiting_for_nodes_is_told_why_it_waited_and_leaves_no_job(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    salloc = """trap 'echo cancelled >"$CANCELLED"; exit 1' TERM
echo "salloc: Pending job allocation 41"; while :; do sleep 0.1; done"""
    for name, text in {
        "salloc": salloc,
        "scontrol": 'echo "JobId=$4 JobState=PENDING Reason=ReqNodeNotAvail"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CANCELLED", str(tmp_path / "cancelled"))
    monkeypatch.setattr(on_slurm, "REASON_AFTER_S", 0.5)
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        if "still waiting" in line:
            os.kill(os.getpid(), number)

    site = load_site(None, {"device": "cpu"})
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as ended:
        on_slurm.look_at_nodes(on_slurm.Look(2, 1, tmp_path / "runs"), site, tell)
    assert number == signal.SIGINT or ended.value.code == 128 + number
    assert told == [
        "salloc: Pending job allocation 41",
        "doctor: still waiting for nodes (ReqNodeNotAvail); Ctrl-C gives up and cancels the job",
        "doctor: ended before the nodes had answered; its job is cancelled",
    ]
    assert (tmp_path / "cancelled").exists()
    assert not (tmp_path / "runs").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
