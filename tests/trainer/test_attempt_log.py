"""The log of an attempt in the run's folder."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from launch.run import local_log
from launch.run.directory import RunDirectory
from trainer import attempt_log
from trainer.attempt_log import AttemptLog, LineFilter, open_attempt_log
from trainer.progress_bars import ShortenedText

KILLED = """
import os, signal, sys
from launch.run.directory import RunDirectory
from pathlib import Path
from trainer.attempt_log import open_attempt_log
from trainer.logging_setup import setup_logging
import logging
setup_logging()
print("before the run is taken")
open_attempt_log(RunDirectory(Path(sys.argv[1])), "local-1.log", True)
logging.getLogger("trainer").info("a step")
print("\\r 10%|", end="", file=sys.stderr)
print("\\r100%|████|", file=sys.stderr)
print("\\x1b[31mred\\x1b[0m", file=sys.stderr)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_loses_no_line_and_bars_and_colours_are_left_out(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    first, step, red = (tmp_path / "logs" / "local-1.log").read_text().splitlines()
    assert (first, step.partition(" ")[2], red) == ("before the run is taken", "a step", "red")
    assert b"before the run is taken" in done.stdout  # and on the terminal as before


def test_what_is_printed_beside_a_live_bar_is_kept(tmp_path: Path) -> None:
    log = AttemptLog()
    log.open(tmp_path / "logs" / "local-1.log")
    lines = LineFilter(log)
    lines.feed(b"\r\x1b[2Ka warning\n\x1b[2Kstep \xe2\x94\x81\xe2\x94\x81 3/8")
    lines.feed(b"\r\x1b[2Kanother\n\x1b[2Kstep \xe2\x94\x81\xe2\x94\x81 8/8\n")
    assert (tmp_path / "logs" / "local-1.log").read_text() == "a warning\nanother\n"


def test_a_log_is_bounded_and_old_ones_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_log, "MAX_LOG_BYTES", 2**20)
    log = AttemptLog()
    log.open(tmp_path / "logs" / "local-1.log")
    for _ in range(3 * 2**10):
        log.add_line(b"x" * 1023 + b"\n")
    kept = (tmp_path / "logs" / "local-1.log").read_bytes()
    assert len(kept) <= 2**20 + 100
    assert kept.splitlines()[-1] == b"(no more than 1 MB are kept)"
    run = RunDirectory(tmp_path)
    for number in range(30):
        (tmp_path / "logs" / f"local-0{number:02}.log").touch()
    monkeypatch.setattr(attempt_log, "LOG", AttemptLog())
    open_attempt_log(run, "local-2.log", True)
    assert len(local_log.local_logs(run)) == local_log.KEPT_LOGS
    assert (tmp_path / "logs" / "local-2.log").is_file()


def test_a_narrow_bar_shows_counts_and_times_whole() -> None:
    console = Console(width=60, force_terminal=True, color_system=None)
    columns = (ShortenedText(), BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=console)
    bars.add_task("loss 0.1234 grad_norm 0.5 learning_rate 0.0002 tokens 123456", total=1700, completed=1234)
    with console.capture() as capture:
        console.print(bars.get_renderable())
    (line,) = capture.get().splitlines()
    assert "1234/1700" in line
    assert "0:00:00" in line
    assert "…" in line
