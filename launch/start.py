"""From a request to an exit status on this machine: prepare, plan, write the run directory, launch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from launch.accelerate import Layout, cpu_threads_of, free_port, launch_command
from launch.changes import Change
from launch.children import ChildError, call_module, processes_with, wait_for
from launch.errors import ConfigError, NoSpaceError, RunError
from launch.hardware import CPU_PROCESSES, compute_capability, first_visible_gpu, gpu_memory, gpus_present
from launch.index import base_is_there, cache_root, read_index
from launch.manifest import MANIFEST, newest_valid
from launch.plan import Plan, make_plan
from launch.recipe import Recipe, find_recipe, load_recipe, recipe_fingerprint
from launch.resources import resource
from launch.rules import refuse_topology
from launch.run_directory import (
    Marker,
    RunDirectory,
    clear_markers,
    clear_requests,
    hold_lock,
    lock_holder,
    open_run,
    read_marker,
    refuse_if_running,
    request_stop,
)
from launch.runs import (
    Continuation,
    adopt,
    continue_run,
    old_plan,
    plan_to_keep,
    refuse_an_end_behind,
    refuse_another_dataset,
    refuse_lost_checkpoints,
    started_from_of,
    write_request,
)
from launch.settings import parse_gpu_memory

if TYPE_CHECKING:
    from launch.index import Index

# Of a run: checkpoints of a few adapters; more is for the machine's owner to see to.
NEEDED_BYTES = 100 * 2**20
MARKER_DECIDES = "--marker-decides"  # to a trainer that somebody waits for, who reads the marker
LINGERING_S = 6.0
JOIN_PATIENCE_S = 1800.0  # the first machine may prepare data meanwhile

EVALUATED_MODELS = ("base", "adapter", "shuffled", "merged")


@dataclass(frozen=True)
class Topology:
    """How many processes of which strategy; `gpu_memory`: bytes of the smallest GPU, None where not known."""

    strategy: str
    nodes: int
    gpus_per_node: int
    device: str
    gpu_memory: int | None = None

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Machine:
    """Which of several machines this is, and where the first is found. Defaults: there is only this one."""

    nodes: int = 1
    rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None


@dataclass(frozen=True)
class RunRequest:
    """What `samestep run` was asked for."""

    recipe: str
    overrides: Sequence[str]
    strategy: str | None
    gpus_per_node: int | None
    name: str | None
    runs_dir: Path
    fresh: bool
    allow: Sequence[str] = ()
    source: Path | None = None  # a checkpoint of another run
    topology: Topology | None = None  # of other machines than this one: then all of it is said
    machine: Machine = Machine()
    gpu_memory: str | None = None  # of each GPU, as the command line says it


@dataclass(frozen=True)
class PlannedRun:
    """A request with everything derived; nothing is written yet.

    `changed`: what differs from what was begun before, and is allowed to.
    """

    recipe: Recipe
    plan: Plan
    run: RunDirectory
    continuation: Continuation
    changed: tuple[Change, ...]

    def command(self, machine: Machine) -> list[str]:
        """argv of the launcher on a machine."""
        return run_command(self.plan, self.run, machine)


def choose_topology(strategy: str | None, nodes: int, gpus_per_node: int | None) -> Topology:
    """Fill in what was not said: the GPUs present (2 processes on a CPU), `single` for one, else `ddp`."""
    present = gpus_present()
    count = gpus_per_node if gpus_per_node is not None else (present or CPU_PROCESSES)
    if strategy == "single" and gpus_per_node is None:
        count = 1
    chosen = strategy or ("single" if nodes * count == 1 else "ddp")
    return Topology(chosen, nodes, count, "cuda" if present else "cpu", gpu_memory() if present else None)


def for_gpus_of(topology: Topology, memory: str | None) -> Topology:
    """The topology with GPUs of a memory that the command line says, whatever this machine has. ConfigError."""
    if memory is None:
        return topology
    return replace(topology, device="cuda", gpu_memory=parse_gpu_memory(memory))


def refuse_fsdp_on_cpu(topology: Topology) -> None:
    """ConfigError where accelerate 1.15 would make ddp of fsdp, or runs that know nothing of each other, in silence."""
    if topology.strategy == "fsdp" and topology.device == "cpu":
        raise ConfigError(
            f"--strategy: fsdp needs GPUs ({topology.world_size} CPU processes asked for); use ddp, zero2 or zero3"
        )


def refuse_missing_gpus(topology: Topology) -> None:
    """ConfigError when this machine has fewer GPUs than processes are to be started, or none are."""
    present = gpus_present()
    if topology.gpus_per_node < 1:
        raise ConfigError(f"--gpus-per-node: {topology.gpus_per_node} starts nothing; give at least 1")
    if topology.device == "cuda" and topology.gpus_per_node > present:
        raise ConfigError(
            f"--gpus-per-node: this machine shows fewer GPUs ({present} < {topology.gpus_per_node}); "
            f"ask for at most {present}, or see CUDA_VISIBLE_DEVICES"
        )


def load_index(recipe_file: Path, recipe: Recipe, overrides: Sequence[str]) -> Index:
    """The prepared index; starts `trainer.prepare` when it is missing or stale, or the base model is not there."""
    index = read_index(recipe)
    if index is None or not base_is_there(recipe):
        prepare(recipe_file, overrides)
        index = read_index(recipe)
    if index is None:
        raise RunError(f"{recipe_file}: prepare ended without an index; run `samestep prepare {recipe_file}`")
    return index


def prepare(recipe_file: Path, overrides: Sequence[str], *, vision: bool = False) -> None:
    """Run `trainer.prepare` in a child, so that this process stays without torch; `vision`: its features too."""
    flags = [word for override in overrides for word in ("--set", override)]
    call_module("trainer.prepare", [str(recipe_file), *flags, *(["--vision"] if vision else [])])


@dataclass(frozen=True)
class CheckedRequest:
    """A request that nothing speaks against so far."""

    recipe_file: Path
    recipe: Recipe
    run: RunDirectory
    topology: Topology
    continuation: Continuation


def check_request(request: RunRequest) -> CheckedRequest:
    """Everything that can be refused at once, before data is prepared and without writing. ConfigError."""
    recipe_file = find_recipe(request.recipe)
    recipe = load_recipe(recipe_file, request.overrides)
    run = open_run(request.runs_dir, request.name or recipe.name)
    topology = request.topology or choose_topology(
        request.strategy, request.machine.nodes, request.gpus_per_node
    )
    if request.gpu_memory is not None and topology.device == "cuda":
        topology = for_gpus_of(topology, request.gpu_memory)
    here = compute_capability() if request.topology is None and topology.device == "cuda" else None
    refuse_topology(recipe, topology.strategy, topology.nodes, topology.gpus_per_node, here)
    refuse_fsdp_on_cpu(topology)
    if request.topology is None:
        refuse_missing_gpus(topology)
    refuse_unwritable(run.path.parent)
    refuse_if_running(run)
    source = request.source.expanduser().resolve() if request.source else None
    if request.fresh and source and source.is_relative_to(run.path.resolve()):
        raise ConfigError(
            f"--from: {request.source} lies in the run that --fresh moves aside ({run.path}); choose another --name"
        )
    continuation = continue_run(_begun(request, run), recipe, request.allow, request.source)
    return CheckedRequest(recipe_file, recipe, run, topology, continuation)


def _begun(request: RunRequest, run: RunDirectory) -> RunDirectory:
    """The run that the request goes on with: none of that name with `--fresh`."""
    return RunDirectory(run.path / ".fresh" / run.name) if request.fresh else run


def take_over_foreign(request: RunRequest) -> RunRequest:
    """A `--from` of another library becomes a checkpoint of ours, in the cache, and the request one of that.

    Starts `trainer.takeover` unless that was done for this checkpoint and run. ChildError when it is refused.
    """
    source = request.source.expanduser().resolve() if request.source else None
    if source is not None:
        _refuse_whole_run(source)
    ours = source is not None and any(
        (source / name).is_file() for name in (MANIFEST, "optimizer.safetensors")
    )
    if source is None or not source.is_dir() or ours:
        return request
    recipe_file = find_recipe(request.recipe)
    recipe = load_recipe(recipe_file, request.overrides)
    run = open_run(request.runs_dir, request.name or recipe.name)
    place = cache_root() / "taken-over" / hashlib.sha256(str(source).encode()).hexdigest()[:16]
    begun = Path(started_from_of(run))
    if begun.is_relative_to(place) and run.checkpoints() and not request.fresh:
        return replace(request, source=begun)  # whatever became of the source since
    newest = _newest_change(source)
    key = hashlib.sha256(f"{newest} {recipe_fingerprint(recipe)}".encode()).hexdigest()[:16]
    output = place / key
    if not output.is_dir() or newest_valid(output)[0] is None:
        flags = [word for override in request.overrides for word in ("--set", override)]
        call_module("trainer.takeover", [str(recipe_file), str(source), "--output", str(output), *flags])
    taken, _ = newest_valid(output)
    if taken is None:
        raise RunError(f"{source}: was taken over, but {output} holds no valid checkpoint; try again")
    return replace(request, source=taken.folder)


def _newest_change(folder: Path) -> int:
    """In nanoseconds since 1970. The library that wrote the checkpoint may be taking files away meanwhile."""
    newest = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            newest = max(newest, file.lstat().st_mtime_ns)
    return newest


def _refuse_whole_run(source: Path) -> None:
    """ConfigError for `--from RUN`: read as a bare adapter, it would go on without its moments and its step."""
    folder = source.parent if source.name == "adapter" else source
    run = RunDirectory(folder)
    if not source.is_dir() or not (run.recipe_file.is_file() and run.plan_file.is_file()):
        return
    newest, _ = newest_valid(folder)
    there = f"its newest is {newest.folder}" if newest else "it has none that is valid"
    raise ConfigError(f"--from: {source} is a run, not one of its checkpoints; {there}")


def plan_run(request: RunRequest) -> PlannedRun:
    """Check a request against everything that is known, and derive its plan. Writes to the cache only."""
    checked = check_request(request)
    run, recipe, continuation = checked.run, checked.recipe, checked.continuation
    index = load_index(checked.recipe_file, recipe, request.overrides)
    begun, source = _begun(request, run), continuation.source
    allowed = continuation.allowed if source else request.allow
    other_data = refuse_another_dataset(begun, index.fingerprint, allowed, source)
    topology = checked.topology
    hardware = {name: getattr(topology, name) for name in ("strategy", "nodes", "gpus_per_node", "device")}
    before = plan_to_keep(
        begun, recipe, {**hardware, "gpu_memory": topology.gpu_memory or 0}, index.fingerprint
    )
    plan = plan_of(recipe, index, topology, run.name, continuation, before)
    refuse_an_end_behind(begun, plan.max_steps, source)
    return PlannedRun(recipe, plan, run, continuation, (*continuation.changed, *other_data))


@contextmanager
def claim(planned: PlannedRun, request: RunRequest) -> Iterator[None]:
    """Keep the run's name from a second `samestep run`, which may have come first while data was prepared."""
    planned.run.path.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(planned.run.path.parent, f".{planned.run.name}.lock"):
        if check_request(request).continuation != planned.continuation:
            raise ConfigError(
                f"{planned.run.path}: went on while this was planned; give the same command again"
            )
        yield


def plan_of(
    recipe: Recipe,
    index: Index,
    topology: Topology,
    name: str,
    continuation: Continuation = Continuation(),  # noqa: B008 - frozen
    before: Plan | None = None,
) -> Plan:
    """The plan of a recipe on a topology, going on with what was begun before, with the settings of `before`."""
    return make_plan(
        recipe,
        index,
        strategy=topology.strategy,
        nodes=topology.nodes,
        gpus_per_node=topology.gpus_per_node,
        device=topology.device,
        name=name,
        begin=continuation.begin,
        allowed=continuation.allowed,
        started_from=continuation.started_from,
        gpu_memory=topology.gpu_memory,
        before=before,
    )


def is_done(planned: PlannedRun) -> bool:
    """This run, whose recipe and data may go on, has taken its last step already, and its adapter is there."""
    run, marker = planned.run, read_marker(planned.run)
    done = marker is not None and marker == Marker("DONE", f"step {planned.plan.max_steps}")
    return done and (run.adapter / "adapter_config.json").is_file()


def refuse_unwritable(folder: Path) -> None:
    """ConfigError unless a run can be written below `folder`, which may not exist yet. Writes nothing."""
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: cannot be written; give permission, or choose another --runs-dir")
    free = shutil.disk_usage(place).free
    if free < NEEDED_BYTES:
        raise NoSpaceError(
            f"{folder}: no space left for a run ({free / 2**20:,.0f} MB free, "
            f"{NEEDED_BYTES / 2**20:,.0f} MB needed); make room, or choose another --runs-dir"
        )


def move_aside(run: RunDirectory) -> Path | None:
    """Rename an existing run to <name>.<timestamp>; None when there was none."""
    if not run.path.exists():
        return None
    old = run.path.with_name(f"{run.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
    run.path.rename(old)
    return old


def execute(planned: PlannedRun, machine: Machine = Machine()) -> Marker:
    """Write the run directory, launch, wait, and believe the marker: DONE or STOPPED is success.

    The launcher's status is no evidence: accelerate 1.15 returns 1 after workers that all ended well. A request to
    stop becomes a STOP file, so that no signal has to cross the launcher; a second Ctrl-C ends all at once.
    Returns the marker. Raises ConfigError for REFUSED or when another trainer took the run first, RunError when
    there is no marker, KeyboardInterrupt after that second Ctrl-C.
    """
    run = planned.run
    run.path.mkdir(parents=True, exist_ok=True)
    with hold_lock(run.path):  # a plain `accelerate launch` may have come first
        refuse_lost_checkpoints(run)
        clear_markers(run)
        clear_requests(run)
        write_request(run, planned.recipe, planned.plan)
        if planned.continuation.source is not None:
            adopt(planned.continuation.source, run)
    return launch(planned.plan, run, machine)


def execute_twice(planned: PlannedRun, request: RunRequest) -> Marker:
    """As `execute`; once more, from the newest checkpoint, when a GPU ran out of memory and smaller settings are known.

    With several machines there is no second time: the others would have to be told.
    """
    try:
        return execute(planned, request.machine)
    except RunError:
        smaller = old_plan(planned.run)
        if (
            request.machine.nodes > 1
            or smaller is None
            or smaller.out_of_memory <= planned.plan.out_of_memory
        ):
            raise
    _tell("a GPU ran out of memory; once more, with settings that need less of it")
    return execute(plan_run(replace(request, fresh=False)), request.machine)


def launch(plan: Plan, run: RunDirectory, machine: Machine) -> Marker:
    """Start this machine's processes of a run that is written, wait, and believe the marker. As `execute`."""
    command = run_command(plan, run, machine)
    ended = wait_for(command, child_environment(plan), ask_to_stop(run))
    if not ended.killed:
        wait_for_trainer(run)
    marker = read_marker(run)
    if marker is not None and marker.kind in ("DONE", "STOPPED"):
        return marker
    if ended.killed or lock_holder(run.path) is None:
        clear_requests(run)  # of an attempt that is over and did not answer them
    if ended.killed:
        raise KeyboardInterrupt
    if marker is not None:
        raise ConfigError(marker.text or f"{run.path}: refused without a reason; see the words above")
    if (
        machine.rank == 0
    ):  # on another machine the lock is the first one's, whose trainer may end a little later
        refuse_if_running(run)  # another trainer, to which ours gave way without a marker
    raise RunError(
        f"{run.path}: ended before it was done; see the words above, the same command goes on "
        "from the newest checkpoint"
    )


def join(request: RunRequest) -> Marker:
    """The part of a machine that is not the first: wait until that has written the run, then start processes here.

    What is launched follows the first machine's plan; the ranks compare plans before they begin. Raises as `execute`,
    and ConfigError when the first machine writes nothing.
    """
    recipe = load_recipe(find_recipe(request.recipe), request.overrides)
    run = open_run(request.runs_dir, request.name or recipe.name)
    if not request.fresh and (done := _done_before(run, recipe)):
        return done  # the first machine starts nothing either
    _wait_for_request(run)
    plan = Plan.from_json(run.plan_file.read_text(encoding="utf-8"))
    topology = choose_topology(request.strategy, request.machine.nodes, request.gpus_per_node)
    if (plan.strategy, plan.nodes, plan.gpus_per_node) != (
        topology.strategy,
        topology.nodes,
        topology.gpus_per_node,
    ):
        raise ConfigError(
            f"{run.plan_file}: machine 0 runs {plan.strategy} on {plan.nodes} x {plan.gpus_per_node} processes, here "
            f"{topology.strategy} on {topology.nodes} x {topology.gpus_per_node} were asked for; give the same command"
        )
    refuse_missing_gpus(topology)
    return launch(plan, run, request.machine)


def _done_before(run: RunDirectory, recipe: Recipe) -> Marker | None:
    """The marker of this recipe's run when it is done, as `is_done`; also for a machine that has no data."""
    marker = read_marker(run)
    if marker is None or marker.kind != "DONE" or not (run.adapter / "adapter_config.json").is_file():
        return None
    same = recipe_fingerprint(load_recipe(run.recipe_file)) == recipe_fingerprint(recipe)
    return marker if same else None


def _wait_for_request(run: RunDirectory) -> None:
    """Until the first machine, which holds the run's name, has written what it wants; ConfigError when it does not."""
    if not _is_requested(run):
        _tell(f"waiting for machine 0 to begin {run.path}")
    began = time.monotonic()
    while not _is_requested(run):
        if time.monotonic() - began > JOIN_PATIENCE_S:
            raise ConfigError(
                f"--machine-rank: machine 0 has not begun {run.path} ({JOIN_PATIENCE_S:g} s waited); start the same "
                "command there, and let all machines share --runs-dir"
            )
        time.sleep(0.5)


def _is_requested(run: RunDirectory) -> bool:
    """The name is held, and the recipe, which is written last, is of this attempt and not of an earlier one."""
    lock = f".{run.name}.lock"
    if lock_holder(run.path.parent, lock) is None:
        return False
    try:
        # Whoever takes the lock writes its name there; both times are the shared disk's.
        taken = (run.path.parent / lock).stat().st_mtime_ns
        return run.recipe_file.stat().st_mtime_ns >= taken and run.plan_file.is_file()
    except FileNotFoundError:
        return False


def refuse_machine(machine: Machine) -> None:
    """ConfigError with what is missing or odd about several machines."""
    problems = []
    if not 0 <= machine.rank < max(machine.nodes, 1):
        problems.append(
            f"--machine-rank: {machine.rank} of {machine.nodes} machines; give a number from 0 to "
            f"{max(machine.nodes, 1) - 1}"
        )
    if machine.nodes > 1:
        missing = [
            f"--main-process-{name}"
            for name, value in (("ip", machine.main_process_ip), ("port", machine.main_process_port))
            if value is None
        ]
        if missing:
            problems.append(
                f"{', '.join(missing)}: missing ({machine.nodes} machines); say where machine 0 is found by all"
            )
        port = machine.main_process_port
        if port is not None and not 0 < port < 2**16:  # 0 would be another free port on every machine
            problems.append(
                f"--main-process-port: {port} is none that machines can meet at; give a free one from 1 to 65535"
            )
    if problems:
        raise ConfigError(problems)


def ask_to_stop(run: RunDirectory) -> Callable[[int], None]:
    """What `wait_for` does about a signal: one STOP file, and a word to whoever pressed Ctrl-C."""

    def ask(number: int) -> None:
        request_stop(run, "preempted" if number == signal.SIGTERM else "user")
        _tell("stopping at the next step boundary; Ctrl-C again ends at once")

    return ask


def wait_for_trainer(run: RunDirectory) -> None:
    """A launcher that is killed leaves its trainers: ask them to stop at the next step boundary, wait until they did.

    They are known by their command line: one that still imports holds no lock and does not know that it is alone.
    """
    words, asked, began = [str(run.path), MARKER_DECIDES], False, time.monotonic()
    try:
        while processes_with(words):
            # Data workers have the same command line and notice within 5 s that their trainer died.
            if not asked and time.monotonic() - began > LINGERING_S:
                asked = True
                if read_marker(run) is None:
                    with contextlib.suppress(OSError):
                        request_stop(run, "orphaned")
                _tell(
                    f"{run.path}: the launcher has ended, waiting for its processes; Ctrl-C ends them at once"
                )
            time.sleep(0.2)
    except KeyboardInterrupt:
        for trainer in processes_with(words):
            with contextlib.suppress(psutil.NoSuchProcess):
                trainer.kill()
        raise


def _tell(text: str) -> None:
    """Say what nobody may be there to hear: a terminal that is gone, or a print that this one interrupted."""
    with contextlib.suppress(OSError, RuntimeError):
        print(text, file=sys.stderr, flush=True)


def run_command(plan: Plan, run: RunDirectory, machine: Machine) -> list[str]:
    """argv of a machine's launcher for a run that is written."""
    arguments = ["--run-dir", str(run.path), MARKER_DECIDES]
    return trainer_command(plan, "trainer.train", arguments, machine)


def trainer_command(
    layout: Layout,
    module: str,
    arguments: Sequence[str],
    machine: Machine = Machine(),
) -> list[str]:
    """argv that starts a trainer module on a machine's processes of a layout."""
    return launch_command(
        layout,
        config_file=resource("accelerate_configs", f"{layout.strategy}.yaml"),
        module=module,
        module_args=arguments,
        port=machine.main_process_port or free_port(),
        machine_rank=machine.rank,
        main_process_ip=machine.main_process_ip or "127.0.0.1",
        cpu_threads=cpu_threads_of(layout),
    )


def child_environment(layout: Layout) -> dict[str, str]:
    """The environment of the launcher. One process sees one GPU: Trainer would spread over all it sees."""
    extra = (
        {"CUDA_VISIBLE_DEVICES": first_visible_gpu()}
        if layout.strategy == "single" and layout.device == "cuda"
        else {}
    )
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", **extra}


def find_run(name: str, runs_dir: Path, whole: bool = True) -> RunDirectory:
    """A run by name below `runs_dir`, or by path. ConfigError when there is none.

    `whole`: with its recipe and plan; without, a folder that has a checkpoint will do.
    """
    path = Path(name).expanduser()
    candidates = [runs_dir.expanduser() / name, path] if len(path.parts) == 1 else [path]
    for candidate in candidates:
        run = RunDirectory(candidate.absolute())
        if run.recipe_file.is_file() and run.plan_file.is_file():
            return run
        if not whole and any(run.path.glob("checkpoint-*")):
            return run
    places = ", ".join(str(candidate) for candidate in candidates)
    raise ConfigError(f"{name}: no such run ({places}); give the name or the folder of a run, see --runs-dir")


def refuse_missing_models(run: RunDirectory, models: Sequence[str]) -> None:
    """ConfigError for every model that the run does not have (yet)."""
    problems = []
    if {"adapter", "shuffled"} & {*models} and not (run.adapter / "adapter_config.json").is_file():
        problems.append(f"{run.adapter}: no adapter yet; `samestep run` writes it when the run is done")
    if "merged" in models and not (run.merged / "config.json").is_file():
        problems.append(f"{run.merged}: no merged model yet; make it with `samestep merge {run.path}`")
    if unknown := [model for model in models if model not in EVALUATED_MODELS]:
        problems.append(f"--models: unknown {', '.join(unknown)}; choose of {', '.join(EVALUATED_MODELS)}")
    if problems:
        raise ConfigError(problems)


def evaluate(
    run: RunDirectory, models: Sequence[str], arguments: Sequence[str], gpus_per_node: int | None
) -> None:
    """Start `trainer.evaluation.generate` on replicas. ChildError when it fails."""
    topology = choose_topology(None, 1, gpus_per_node)
    refuse_missing_gpus(topology)
    refuse_missing_models(run, models)
    command = trainer_command(
        topology,
        "trainer.evaluation.generate",
        ["--run-dir", str(run.path), "--models", ",".join(models), *arguments],
    )
    ended = wait_for(command, child_environment(topology))
    if ended.interrupted:
        raise KeyboardInterrupt
    if ended.status:
        raise ChildError("evaluate", ended.status)


@dataclass(frozen=True)
class MergeOptions:
    """What `samestep merge` and `consolidate` pass on; None and empty where nothing was said."""

    base: str | None = None
    dtype: str | None = None
    recipe: str | None = None
    adapter_config: Path | None = None
    lora_alpha: float | None = None
    base_model: str | None = None

    def flags(self, *names: str) -> list[str]:
        """The command line of those named that were given."""
        given = [(name, getattr(self, name)) for name in names]
        return [
            word
            for name, value in given
            if value is not None
            for word in (
                f"--{name.replace('_', '-')}",
                f"{value:g}" if isinstance(value, float) else str(value),
            )
        ]


_OF_THE_ADAPTER = ("adapter_config", "lora_alpha", "base_model")


def merge(
    source: str, output: Path | None, options: MergeOptions, compare: bool | None, runs_dir: Path
) -> bool:
    """Start `trainer.checkpoint.merge`, then the comparison of its result. ChildError when either fails.

    `compare`: None compares inside a run, True compares the merge onto the other base too, False does not compare.
    Returns False when the result could not be compared: an adapter outside a run has no data.
    """
    folder = _find_source(source, runs_dir)
    in_a_run = any(RunDirectory(place).recipe_file.is_file() for place in (folder, folder.parent))
    if compare and not in_a_run:
        raise ConfigError(
            f"--compare: {folder} lies in no run, whose recipe would name the data; leave it out"
        )
    if output is None:
        if not RunDirectory(folder).recipe_file.is_file():
            raise ConfigError(f"--output: missing ({folder} is not a run); give the folder to write")
        output = RunDirectory(folder).merged
        if options.base == "dequantized":
            output = output.with_name(f"{output.name}-dequantized")
    flags = options.flags("base", "dtype", "recipe", *_OF_THE_ADAPTER)
    call_module("trainer.checkpoint.merge", [str(folder), "--output", str(output), *flags])
    if compare is False:
        return True
    if not in_a_run:
        return False
    both = ["--both-bases"] if compare else []
    flags = [*options.flags(*_OF_THE_ADAPTER), *both]
    call_module("trainer.evaluation.compare", ["--source", str(folder), "--merged", str(output), *flags])
    return True


def consolidate(source: str, output: Path, options: MergeOptions, runs_dir: Path) -> None:
    """Start `trainer.checkpoint.consolidate`. ChildError when it fails."""
    folder, flags = _find_source(source, runs_dir), options.flags(*_OF_THE_ADAPTER)
    call_module("trainer.checkpoint.consolidate", [str(folder), "--output", str(output), *flags])


def _find_source(source: str, runs_dir: Path) -> Path:
    """A run by name below `runs_dir`, or a folder or file by path. ConfigError when there is none."""
    named = runs_dir.expanduser() / source
    found = named if len(Path(source).parts) == 1 and named.is_dir() else Path(source).expanduser()
    if not found.exists():
        raise ConfigError(f"{source}: no such run or folder ({named}, {found}); see --runs-dir")
    return found
