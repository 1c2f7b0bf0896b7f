"""`samestep submit`: from a request to a queued job. What can be refused is refused here, before queueing."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.atomic_files import atomic_write
from launch.errors import ConfigError, UnansweredError
from launch.inputs.caches import cache_root, hugging_face_home
from launch.local import planned_run
from launch.local.topology import choose_topology
from launch.planning.auto_settings import parse_gpu_memory
from launch.planning.topology import Topology
from launch.resources import resource
from launch.run.directory import RunDirectory, clear_markers, clear_requests, make_folder, removed_on_failure
from launch.run.lock import hold_lock
from launch.run.request_files import copy_checkpoint, write_request
from launch.slurm import attempts
from launch.slurm.commands import most_cpus, sbatch, show_job
from launch.slurm.output import ENDING, RUNNING, WAITING, seconds_of
from launch.slurm.sbatch import Job, follow_up_script, train_script
from launch.slurm.site import Site

FOLLOW_UPS = ("merge", "evaluate")
SCRIPT = "submit.sbatch"


@dataclass(frozen=True)
class Submission:
    """Everything that will be queued; nothing is written yet. `follow_ups`: file name -> script, in order.

    `other_packages`: whose the job runs with, where they are not this Python's. `cpus`: what of a node it asks for,
    in words. `node_counts`: a job for each, the first as planned; whichever starts first takes the run.
    """

    planned: planned_run.PlannedRun
    request: planned_run.RunRequest
    script: str
    follow_ups: Mapping[str, str]
    other_packages: str = ""
    cpus: str = ""
    node_counts: tuple[int, ...] = ()


def check_follow_ups(then: str) -> list[str]:
    """The words of `--then`, in the order they are done. ConfigError for others."""
    words = [word.strip() for word in then.split(",") if word.strip()]
    if unknown := [word for word in words if word not in FOLLOW_UPS]:
        raise ConfigError(f"--then: unknown {', '.join(unknown)}; choose of {', '.join(FOLLOW_UPS)}")
    return [word for word in FOLLOW_UPS if word in words]


def request_for_site(
    request: planned_run.RunRequest, site: Site, nodes: int, gpus_per_node: int
) -> planned_run.RunRequest:
    """The request for the site's nodes: this machine does not count, nor its packages if another Python runs."""
    here = choose_topology(request.strategy, nodes, gpus_per_node)
    memory = parse_gpu_memory(site.gpu_memory) if site.gpu_memory and site.device == "cuda" else None
    topology = Topology(
        here.strategy, nodes, gpus_per_node, site.device, memory, packages_here=not other_packages(site)
    )
    return replace(request, topology=topology)


def other_packages(site: Site) -> str:
    """Whose packages the job runs with, where they are not this Python's; else empty."""
    if site.container.runtime != "none":
        return f"the container {site.container.image}"
    same = site.python is None or Path(site.python).absolute() == Path(sys.executable)
    return "" if same else str(site.python)


def refuse_short_time(site: Site) -> None:
    """ConfigError when the warning would come as soon as the job starts: it would never take a step."""
    limit = seconds_of(site.time) if site.time else None
    if limit and limit <= site.signal_lead:
        raise ConfigError(
            f"--time: {site.time} is over before the warning time begins ({limit} s <= {site.signal_lead} s); "
            "ask for more time, or lower --signal-lead"
        )


def refuse_too_many_cpus(site: Site, processes: int) -> None:
    """ConfigError when no node of the partition has as many CPUs as the processes of one are to get."""
    most, needed = most_cpus(site.partition), site.cpus_per_process * processes
    if most is None or needed <= most:
        return
    where = f"partition {site.partition}" if site.partition else "this cluster"
    fewer = most // processes
    raise ConfigError(
        f"cpus_per_process: {cpus_in_words(site, processes)}, and no node of {where} has more than {most}; "
        + (f"set it to {fewer} in the site's file (--site)" if fewer else "lower --gpus-per-node")
    )


def cpus_in_words(site: Site, processes: int) -> str:
    """What a node must have for its processes."""
    return f"{site.cpus_per_process} x {processes} processes are {site.cpus_per_process * processes} CPUs of a node"


def refuse_missing_sbatch() -> None:
    """ConfigError on a machine that cannot submit."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch: not found in PATH, so this machine submits nothing; run this on the cluster's login node, "
            "or look at the script with --dry-run"
        )


def plan_submission(
    requests: Sequence[planned_run.RunRequest],
    site: Site,
    then: Sequence[str],
    max_crashes: int,
    doctor: bool = False,
) -> Submission:
    """Plan the run and render its scripts. Writes to the cache only. ConfigError: all that is refused.

    `requests`: one for each number of nodes, for a job each; the others are planned anew by the job that starts first.
    """
    planned, *_ = [planned_run.plan_run(request) for request in requests]
    several = len(requests) > 1
    plan = planned.plan
    job = job_on_site(planned.run.path, plan.name, plan.nodes, plan.gpus_per_node, plan.device, site)
    job = replace(job, max_crashes=max_crashes, doctor=doctor, one_of_several=several)
    follow_ups = {}
    for word in then:
        command = [word, str(planned.run.path)]
        if word == "evaluate":
            command += ["--models", ",".join(["base", "adapter", *(["merged"] if "merge" in then else [])])]
        template = resource("slurm", "merge_eval.sbatch").read_text(encoding="utf-8")
        one = replace(job, name=f"{job.name}-{word}")
        follow_ups[f"{word}.sbatch"] = follow_up_script(template, one, command)
    template = resource("slurm", "train.sbatch").read_text(encoding="utf-8")
    script, cpus = train_script(template, job), cpus_in_words(site, job.gpus_per_node)
    counts = tuple(request.topology.nodes for request in requests if request.topology)
    return Submission(planned, requests[0], script, follow_ups, other_packages(site), cpus, counts)


def job_on_site(run: Path, name: str, nodes: int, gpus_per_node: int, device: str, site: Site) -> Job:
    """Describe a job to a script of sbatch: where it works, with which Python, and what its container sees."""
    contained = site.container.runtime != "none"
    environment = cache_variables()
    mounts = mounts_of(run, {**environment, **site.environment}, site) if contained else []
    return Job(
        name=name,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        device=device,
        run=run,
        work_folder=Path.cwd(),
        python=site.container.python if contained else (site.python or sys.executable),
        site=site,
        mounts=mounts,
        environment=environment,
    )


def cache_variables() -> dict[str, str]:
    """Where this shell has its caches: a job must find the same in a container, and submitted from another shell."""
    own_caches = {
        name: os.environ[name] for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE") if name in os.environ
    }
    return {"SAMESTEP_CACHE": str(cache_root()), "HF_HOME": str(hugging_face_home()), **own_caches}


def mounts_of(run: Path, environment: Mapping[str, str], site: Site) -> list[str]:
    """Folders that a container must see at their place. ConfigError for one that its runtime cannot be told.

    A cache that is not there (nothing came from the hub) is left out: runtimes fail over it. The scratch disk is
    there on the nodes.
    """
    names = ("SAMESTEP_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
    caches = [environment[name] for name in names if Path(environment.get(name, "/nowhere")).is_dir()]
    places = [str(run.parent), str(Path.cwd()), *caches, *([site.scratch] if site.scratch else [])]
    mounts = list(dict.fromkeys(places))
    if odd := [mount for mount in [*mounts, *site.container.mounts] if "," in mount or mount.count(":") > 2]:
        raise ConfigError(
            f"container.mounts: cannot be mounted ({', '.join(odd)}); no commas, HERE:THERE:ro at most"
        )
    if odd := [mount for mount in mounts if ":" in mount]:
        raise ConfigError(
            f"container: a folder with a colon cannot be mounted ({', '.join(odd)}); use another"
        )
    return mounts


def refuse_if_queued(run: RunDirectory) -> None:
    """ConfigError while a job of this run waits or runs: two of them would take turns."""
    book = attempts.read_ledger(run)
    for job in dict.fromkeys(filter(None, (book.job, *book.alternatives))):
        facts = show_job(job)
        if facts is None or facts.state not in (*WAITING, *RUNNING, *ENDING):
            continue
        raise ConfigError(
            f"{run.path}: job {job} of this run is in the queue already ({facts.state.lower()}); "
            f"`samestep status {run.name}` shows it, `scancel {job}` ends it, or choose another --name"
        )


def write_submission(submission: Submission) -> Path:
    """Write the run directory with its scripts; returns that of the training. The caller has claimed the name."""
    planned, run = submission.planned, submission.planned.run
    (run.path / "logs").mkdir(parents=True, exist_ok=True)
    with hold_lock(run.path):
        clear_markers(run)
        clear_requests(run)
        write_request(run, planned.recipe, planned.plan)
        if planned.continuation.source is not None:
            copy_checkpoint(planned.continuation.source, run)
    for name, text in {SCRIPT: submission.script, **submission.follow_ups}.items():
        atomic_write(run.path / name, text)
    return run.path / SCRIPT


def queue_submission(submission: Submission) -> list[tuple[str, str]]:
    """Write and submit all; returns (script, job id) in order. ConfigError with sbatch's own words.

    When the first one is refused, a run directory that was not there before goes again; not where there was no answer.
    """
    run = submission.planned.run
    with removed_on_failure(run, new=make_folder(run)):
        try:
            first = sbatch(write_submission(submission), submission.script)
        except UnansweredError:
            raise
        except ConfigError as error:
            if re.search(r"processors|cpu|node config", str(error), re.IGNORECASE):
                raise ConfigError(f"{error} (cpus_per_process: {submission.cpus})") from None
            raise
    queued = _queue_alternatives(submission, first)
    started = _any_of(queued)
    for name, text in submission.follow_ups.items():
        options = _after(started)
        try:
            queued.append((name, sbatch(run.path / name, text, *options)))
        except ConfigError as error:
            again = f"when there is room: sbatch {' '.join(options)} {run.path / name}"
            raise ConfigError(f"{error}; queued already: {_in_words(queued)}; {again}") from None
        started = f"afterok:{queued[-1][1]}"
    return queued


def _queue_alternatives(submission: Submission, first: str) -> list[tuple[str, str]]:
    """Queue the same script for the other numbers of nodes. Each line of the ledger names all jobs that are queued by
    then: one of them may start before the next is there. ConfigError: one is refused; those before it stay queued."""
    run, counts = submission.planned.run, submission.node_counts
    if len(counts) < 2:
        attempts.write_event(run, "submit", job=first)
        return [(SCRIPT, first)]
    queued: list[tuple[str, str]] = []
    for count in counts:
        try:
            job = sbatch(run.path / SCRIPT, submission.script, f"--nodes={count}") if queued else first
        except ConfigError as error:
            later = _follow_ups_by_hand(submission, queued)
            raise ConfigError(
                f"--nodes: {count}: {error}; queued already: {_in_words(queued)}{later}"
            ) from None
        queued.append((f"{SCRIPT} ({count} node{'s' if count > 1 else ''})", job))
        attempts.write_event(run, "submit", job=job, alternatives=",".join(job for _, job in queued))
    return queued


def _follow_ups_by_hand(submission: Submission, queued: Sequence[tuple[str, str]]) -> str:
    """How to queue what was to follow, in words; empty where nothing was. `ID`: that of the one before it."""
    started, commands = _any_of(queued), []
    for name in submission.follow_ups:
        commands.append(f"sbatch {' '.join(_after(started))} {submission.planned.run.path / name}")
        started = "afterok:ID"
    words = f"; {', '.join(submission.follow_ups)}: not queued, queue by hand: {', then '.join(commands)}"
    return words if commands else ""


def _any_of(queued: Sequence[tuple[str, str]]) -> str:
    """The dependency on a good end of any of these jobs."""
    return "?".join(f"afterok:{job}" for _, job in queued)


def _after(dependency: str) -> list[str]:
    """Without the second the job would wait for ever once the one before has failed."""
    return [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]


def _in_words(queued: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{script} as job {job}" for script, job in queued)
