"""`samestep doctor --nodes N`: asks Slurm for nodes, looks at all of them at once, and gives them back."""

from __future__ import annotations

import contextlib
import queue
import re
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch.doctor.finding import Finding
from launch.doctor.reports import findings_of_nodes
from launch.errors import ConfigError, RunError
from launch.resources import resource
from launch.slurm.commands import own_environment, show_job
from launch.slurm.sbatch import allocation_options, doctor_script
from launch.slurm.site import Site
from launch.slurm.submit import job_on_site, refuse_too_many_cpus
from launch.untrusted_files import printable

MINUTES = 5  # of the allocation; it ends as soon as the nodes have answered
PATIENCE_S = 95.0  # from the allocation on; the script ends its step before
REASON_AFTER_S = 10.0  # in the queue, it is said why
JOB_NAME = "samestep-doctor"


@dataclass(frozen=True)
class Look:
    """What to look at, and how. `recipe`: a name or file, empty: none; `quick`: without processes that measure."""

    nodes: int
    gpus_per_node: int
    runs_dir: Path
    recipe: str = ""
    quick: bool = False


def look_at_nodes(look: Look, site: Site, tell: Callable[[str], None]) -> tuple[list[str], list[Finding]]:
    """(the nodes' names, all findings). `tell`: is given what salloc says while the job waits for its nodes.

    A TERM, or a terminal that closes, ends it as a Ctrl-C does: no job stays behind.

    Raises:
        ConfigError: there is no salloc here, or it refuses.
        RunError: the allocation ended before the nodes were known.
    """
    if shutil.which("salloc") is None:
        raise ConfigError(
            "salloc: not found in PATH; run this on the cluster's login node, or leave --nodes out"
        )
    refuse_too_many_cpus(site, look.gpus_per_node)
    with _ended_in_order(), _shared_folder(look.runs_dir) as shared:
        job = job_on_site(
            look.runs_dir / "doctor", JOB_NAME, look.nodes, look.gpus_per_node, site.device, site
        )
        options = ["--token", secrets.token_hex(8), "--shared", str(shared), "--device", site.device]
        options += ["--processes", str(look.gpus_per_node), "--interface", site.network_interface or ""]
        options += [
            "--scratch",
            site.scratch or "",
            "--recipe",
            look.recipe,
            *(["--quick"] if look.quick else []),
        ]
        script = doctor_script(resource("slurm", "doctor.sh").read_text(encoding="utf-8"), job, options)
        command = ["salloc", *allocation_options(job, MINUTES), "bash", "-c", script]
        names, printed = _run(command, tell)
    return names, findings_of_nodes(printed, names)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    heeded = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN  # as under `nohup`
    ]
    before = {number: signal.signal(number, end) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _shared_folder(runs_dir: Path) -> Iterator[Path]:
    """A new folder beside the runs: a node that does not see it has another disk there."""
    created = not runs_dir.exists()
    folder = runs_dir / f".doctor-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--runs-dir: {runs_dir}: {error.strerror}; choose another --runs-dir") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if created:
            with contextlib.suppress(OSError):
                runs_dir.rmdir()


def _run(command: list[str], tell: Callable[[str], None]) -> tuple[list[str], str]:
    """(names of the nodes, what they printed). However it ends, the allocation is given back."""
    salloc = subprocess.Popen(
        command,
        env=own_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a Ctrl-C comes here alone, and ends salloc in good order below
        text=True,
        errors="replace",
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(salloc, lines), daemon=True).start()
    ended = "doctor: ended before the nodes had answered; its job is cancelled"
    try:
        return _follow(lines, tell)
    except (KeyboardInterrupt, SystemExit):
        if not _give_back(salloc):
            ended = (
                f"doctor: ended; salloc gives no answer, so look for its job: squeue --me --name={JOB_NAME}"
            )
        with contextlib.suppress(OSError):  # the terminal is gone
            tell(ended)
        raise
    finally:
        _give_back(salloc)


def _give_back(salloc: subprocess.Popen[str]) -> bool:
    """End the allocation, or the request for it. False: salloc had to be killed, and may have told Slurm nothing."""
    salloc.terminate()
    try:
        salloc.wait(15)
    except subprocess.TimeoutExpired:
        salloc.kill()
        return False
    return True


def _read(salloc: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert salloc.stdout is not None
    for line in salloc.stdout:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _follow(lines: queue.Queue[str | None], tell: Callable[[str], None]) -> tuple[list[str], str]:
    names: list[str] = []
    printed: list[str] = []
    deadline: float | None = time.monotonic() + REASON_AFTER_S
    while True:
        try:
            line = lines.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0.01))
        except queue.Empty:
            if names:
                return names, "\n".join(printed)
            tell(_why_it_waits(printed))
            deadline = None
            continue
        if line is None:
            break
        if line.startswith("nodes: ") and not names:
            names, deadline = line.split()[1:], time.monotonic() + PATIENCE_S
            tell(f"looking at {', '.join(names)}")
            continue
        printed.append(line)
        if not names and not line.startswith("salloc: error:"):  # an error is told at the end
            tell(printable(line))
    if not names:
        said = "; ".join(line.removeprefix("salloc: ").removeprefix("error: ") for line in printed[-3:])
        if any("Granted" in line for line in printed):
            raise RunError(
                f"doctor: the allocation ended before its nodes were known ({printable(said)}); try again"
            )
        raise ConfigError(f"salloc: no nodes ({printable(said)}); see `sinfo` for what you may use")
    return names, "\n".join(printed)


def _why_it_waits(printed: Sequence[str]) -> str:
    """Slurm's word for it, where there is one. Some reasons never end, as with nodes that are down."""
    jobs = [match[1] for line in printed if (match := re.search(r"Pending job allocation (\d+)", line))]
    facts = show_job(jobs[-1]) if jobs else None
    reason = f" ({facts.reason})" if facts and facts.reason != "None" else ""
    return f"doctor: still waiting for nodes{reason}; Ctrl-C gives up and cancels the job"
