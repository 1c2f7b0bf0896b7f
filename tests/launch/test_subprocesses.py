"""Real child processes: each request to stop arrives once, and whatever happens to the parent, it waits."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from launch.subprocesses import ChildError, Ended, call_module, processes_with, wait_for

# Waits for the child program sys.argv[1]; each request becomes a line of the file `asked`.
PARENT = """
import json, os, sys
from launch.subprocesses import wait_for
def ask(number):
    with open("asked", "a") as file: print(int(number), file=file)
    if "PLACE_IS_GONE" in os.environ: raise FileNotFoundError(2, "gone", "runs/x")
whom = None if "NOBODY_ASKS" in os.environ else ask
ended = wait_for([sys.executable, "-c", sys.argv[1]], ask_to_stop=whom)
print("the last word", flush=True)
print("and one of complaint", file=sys.stderr, flush=True)
with open("ended", "w") as file: json.dump([ended.status, ended.interrupted, ended.killed], file)
sys.exit(11)
"""
# Writes a line to `heard` for each signal; ends with status 5 when there is a file `end`.
CHILD = """
import os, signal, time
def hear(number, _):
    with open("heard", "a") as file: print(int(number), file=file)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, hear)
open("started", "w").close()
while not os.path.exists("end"): time.sleep(0.02)
raise SystemExit(5)
"""
# As torchrun does it: its child is in a session of its own, and has a child there. All are deaf.
FAMILY = """
import os, signal, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: open("started", "w").close()
time.sleep(120)
"""
# The child and its child have another one in a session of its own every few milliseconds.
FERTILE = """
import os, signal, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
if os.fork() == 0: os.setsid()
for _ in range(200):
    if os.fork() == 0:
        os.setsid(); open("started", "w").close(); time.sleep(120)
    time.sleep(0.004)
time.sleep(120)
"""


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def numbers(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def command_of(child: str) -> list[str]:
    return [sys.executable, "-c", PARENT, child]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **more}


@contextmanager
def parent_of(child: str, folder: Path, *before: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """The parent in a session of its own, once its child says that it has started. Nothing outlives the block."""
    process = subprocess.Popen(
        [*before, *command_of(child)],
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until((folder / "started").exists)
        yield process
    finally:
        for left in processes_with([child]):
            left.kill()
        process.wait()


def end_of(process: subprocess.Popen[bytes], folder: Path) -> list[object]:
    """Let the child end; status, interrupted, killed."""
    (folder / "end").touch()
    assert process.wait(timeout=20) == 11
    ended: list[object] = json.loads((folder / "ended").read_text())
    return ended


# without anybody to ask: the signal itself goes to the group


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("to_all", [True, False], ids=["terminal", "kill"])
def test_a_stop_reaches_child_and_grandchild_once_and_the_parent_waits(
    number: signal.Signals, to_all: bool, tmp_path: Path
) -> None:
    child = (
        "import os, signal, sys, time\n"
        "def end(*_):\n"
        "    open(f'signal-{os.getpid()}', 'a').write('x'); stop.append(1)\n"
        "stop = []\n"
        "for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(n, end)\n"
        "grandchild = os.fork()\n"
        "open(f'started-{os.getpid()}', 'w').close()\n"
        "while not stop: time.sleep(0.02)\n"
        "time.sleep(0.5); open(f'ended-{os.getpid()}', 'w').close()\n"
        "if grandchild: os.waitpid(grandchild, 0)\n"
    )
    process = subprocess.Popen(
        command_of(child), cwd=tmp_path, env=environment(NOBODY_ASKS="1"), start_new_session=True
    )
    until(lambda: len(list(tmp_path.glob("started-*"))) == 2)
    (os.killpg if to_all else os.kill)(process.pid, number)
    assert end_of(process, tmp_path) == [0, number == signal.SIGINT, False]
    assert len(list(tmp_path.glob("ended-*"))) == 2
    assert [file.read_text() for file in tmp_path.glob("signal-*")] == ["x", "x"]


def test_the_third_ctrl_c_kills_where_nobody_can_be_asked(tmp_path: Path) -> None:
    with parent_of(CHILD, tmp_path, NOBODY_ASKS="1") as process:
        for count in (1, 2):
            process.send_signal(signal.SIGINT)
            until(lambda count=count: len(numbers(tmp_path / "heard")) == count)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 11
    assert json.loads((tmp_path / "ended").read_text()) == [-signal.SIGKILL, True, True]


def test_a_child_that_ends_is_not_waited_for() -> None:
    assert wait_for([sys.executable, "-c", "raise SystemExit(7)"]) == Ended(7, False, False)


@pytest.mark.parametrize(
    ("status", "returned", "words"),
    [
        *(
            (status, returned, rf"did not finish \(exit status {status}\)")
            for status, returned in ((1, 1), (2, 2), (3, 1))
        ),
        (-9, 1, "was ended by SIGKILL, most likely for want of memory; the same command begins again"),
        (-11, 1, "was ended by SIGSEGV; the same command"),
        (-40, 1, "was ended by signal 40; the same command"),
    ],
)
def test_a_module_that_refuses_is_told_from_one_that_fails(
    status: int, returned: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probe.py").write_text(
        "import os, sys\nstatus = int(sys.argv[1])\n"
        "os.kill(os.getpid(), -status) if status < 0 else sys.exit(status)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ChildError, match=f"probe: {words}") as raised:
        call_module("probe", [str(status)])
    assert raised.value.exit_status == returned


# with somebody to ask: a request, and no signal crosses the launcher


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("to_all", [True, False], ids=["terminal", "kill"])
def test_a_signal_becomes_one_request_and_the_child_is_left_alone(
    number: signal.Signals, to_all: bool, tmp_path: Path
) -> None:
    with parent_of(CHILD, tmp_path) as process:
        (os.killpg if to_all else os.kill)(process.pid, number)
        until((tmp_path / "asked").exists)
        time.sleep(0.3)
        assert process.poll() is None
        assert end_of(process, tmp_path) == [5, number == signal.SIGINT, False]
    assert numbers(tmp_path / "asked") == [number]
    assert not (tmp_path / "heard").exists()


def test_a_scheduler_that_asks_twice_kills_nothing(tmp_path: Path) -> None:
    with parent_of(CHILD, tmp_path) as process:
        for count, number in enumerate([signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM], 1):
            process.send_signal(number)
            until(lambda count=count: len(numbers(tmp_path / "asked")) == count)
        assert end_of(process, tmp_path) == [5, True, False]
    assert not (tmp_path / "heard").exists()


@pytest.mark.parametrize("family", [FAMILY, FERTILE], ids=["settled", "growing"])
def test_the_second_ctrl_c_kills_all_descendants_in_whatever_session_they_are(
    family: str, tmp_path: Path
) -> None:
    with parent_of(family, tmp_path) as process:
        assert len(processes_with([family])) >= 3
        process.send_signal(signal.SIGINT)
        until((tmp_path / "asked").exists)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 11
        until(lambda: all(left.status() == psutil.STATUS_ZOMBIE for left in processes_with([family])))
    assert json.loads((tmp_path / "ended").read_text()) == [-signal.SIGKILL, True, True]
    assert numbers(tmp_path / "asked") == [signal.SIGINT]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_signal_itself_is_passed_on_when_the_place_to_ask_is_gone(
    number: signal.Signals, tmp_path: Path
) -> None:
    with parent_of(CHILD, tmp_path, PLACE_IS_GONE="1") as process:
        process.send_signal(number)
        until((tmp_path / "heard").exists)
        assert end_of(process, tmp_path) == [5, number == signal.SIGINT, False]
    assert numbers(tmp_path / "heard") == [number]


@pytest.mark.parametrize(("count", "asked", "killed"), [(1, 1, False), (2, 0, True)])
def test_what_arrives_before_there_is_a_child_counts_as_well_and_once(
    count: int, asked: int, killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[int] = []

    class StartsLate(subprocess.Popen[bytes]):
        def __init__(self, *arguments: object, **options: object) -> None:
            for _ in range(count):
                os.kill(os.getpid(), signal.SIGINT)
            super().__init__(*arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr("launch.subprocesses.subprocess.Popen", StartsLate)
    before = signal.getsignal(signal.SIGINT)
    program = f"import time; time.sleep({60 if killed else 0}); raise SystemExit(5)"
    ended = wait_for([sys.executable, "-c", program], ask_to_stop=requests.append)
    assert ended == Ended(-signal.SIGKILL if killed else 5, True, killed)
    assert requests == [signal.SIGINT] * asked
    assert signal.getsignal(signal.SIGINT) is before


# terminals


def test_a_terminal_that_closes_asks_to_stop_and_takes_nothing_down(tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, command_of(CHILD), environment())
    try:
        until((tmp_path / "started").exists)
        os.close(terminal)
        until((tmp_path / "asked").exists)
        (tmp_path / "end").touch()
        until((tmp_path / "ended").exists)
        _, status = os.waitpid(pid, 0)
    finally:
        for left in processes_with([CHILD]):
            left.kill()
    assert os.waitstatus_to_exitcode(status) == 11  # all its last words found a place to go
    assert json.loads((tmp_path / "ended").read_text()) == [5, False, False]
    assert numbers(tmp_path / "asked") == [signal.SIGHUP]
    assert not (tmp_path / "heard").exists()


def test_nohup_stays_nohup(tmp_path: Path) -> None:
    with parent_of(CHILD, tmp_path, "nohup") as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert end_of(process, tmp_path) == [5, False, False]
    assert not (tmp_path / "asked").exists()
    assert not (tmp_path / "heard").exists()


def test_a_process_is_known_by_whole_words_of_its_command_line_while_it_lives() -> None:
    words = ["--run-dir", f"/runs/{os.getpid()}-x"]
    program = "import time; print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, *words, "more"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert [found.pid for found in processes_with(words)] == [process.pid]
        assert processes_with([words[0], words[1][:-1]]) == []
    finally:
        process.kill()
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    assert processes_with(words) == []
    process.wait()


@pytest.mark.parametrize(
    "begin", ["import trainer", "import trainer.logging_setup; trainer.logging_setup.setup_logging()"]
)
def test_an_interrupt_at_any_moment_of_a_command_shows_no_traceback(begin: str) -> None:
    program = f"{begin}\nimport os, signal\nos.kill(os.getpid(), signal.SIGINT)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGINT
    assert "Traceback" not in ended.stderr
    failed = subprocess.run([sys.executable, "-c", f"{begin}\n1 / 0"], capture_output=True, text=True)
    assert "ZeroDivisionError" in failed.stderr


def test_a_command_keeps_its_docstrings_whatever_python_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    call_module("timeit", ["-n", "1", "-r", "1", "import sys; print('level', sys.flags.optimize)"])
    assert "level 0" in capfd.readouterr().out


def test_a_module_of_the_current_folder_is_not_taken_for_one_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("launch.py", "typer.py"):
        (tmp_path / name).write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    call_module("launch.cli.main", ["schema"])
    assert '"title": "Recipe"' in capfd.readouterr().out
    become = "from launch.subprocesses import become_module as b; b('launch.cli.main', ['schema'])"
    ended = subprocess.run([sys.executable, "-P", "-c", become], capture_output=True, text=True, check=False)
    assert (ended.returncode, '"title": "Recipe"' in ended.stdout) == (0, True)
