"""What is made of a run that has trained: evaluated, merged, consolidated; each by a child of the trainer's side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from launch.atomic_files import refuse_readonly
from launch.console import echo
from launch.errors import CheckpointError, ConfigError
from launch.local.launcher import child_environment, trainer_command
from launch.local.topology import choose_topology, refuse_what_is_not_here
from launch.run.damaged_adapter import adapter_damage
from launch.run.directory import RunDirectory
from launch.run.evaluation_target import Target, missing_models
from launch.run.merge_options import MergeOptions
from launch.run.merged_model import COMPARISON, is_merged_already, made_anew
from launch.run.output_folder import refuse_place
from launch.strategies import default_strategy
from launch.subprocesses import ChildError, call_module, wait_for


def start_evaluate(
    target: Target, models: Sequence[str], arguments: Sequence[str], gpus_per_node: int | None
) -> None:
    """Start `trainer.evaluation.generate` on replicas. ChildError when it fails."""
    processes = choose_topology(None, 1, gpus_per_node)
    topology = replace(processes, strategy=default_strategy(processes.world_size).name)
    refuse_what_is_not_here(topology)
    run = target.run
    if problems := missing_models(run, models, target.checkpoint, target.adapter):
        raise ConfigError(problems)
    with _folder_of(run):
        refuse_readonly(run.path, "the evaluation")
        command = trainer_command(
            topology,
            "trainer.evaluation.generate",
            [*target.flags(), "--models", ",".join(models), *arguments],
        )
        ended = wait_for(command, child_environment(topology))
    if ended.interrupted:
        echo(
            f"{run.path}: the evaluation was interrupted; the same command goes on with the answers so far",
            to_stderr=True,
        )
        raise KeyboardInterrupt
    if ended.status:
        raise ChildError("evaluate", ended.status)


@contextmanager
def _folder_of(run: RunDirectory) -> Iterator[None]:
    """Make the folder of a run that has not begun; it goes again if nothing was written to it."""
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # something is in it
            run.path.rmdir()


_OF_THE_ADAPTER = ("adapter_config", "lora_alpha", "base_model")


def start_merge(
    source: str, output: Path | None, options: MergeOptions, compare: bool | None, runs_dir: Path
) -> bool:
    """Start `trainer.export.merge`, then the comparison of its result. ChildError when either fails.

    `compare`: None compares inside a run, True compares the merge onto the other base too, False does not compare.
    Returns False when the result could not be compared: an adapter outside a run has no data.
    """
    folder = _find_source(source, runs_dir)
    in_a_run = any(RunDirectory(place).recipe_file.is_file() for place in (folder, folder.parent))
    if compare and not in_a_run:
        raise ConfigError(
            f"--compare: {folder} lies in no run, whose recipe would name the data; leave it out"
        )
    _refuse_damaged_adapter(folder)
    if output is None:
        if not RunDirectory(folder).recipe_file.is_file():
            raise ConfigError(f"--output: missing ({folder} is not a run); give the folder to write")
        run = RunDirectory(folder)
        output = run.merged_dequantized if options.base == "dequantized" else run.merged
    allowed = [word for part in options.allow for word in ("--allow", part)]
    flags = [*options.flags("base", "dtype", "recipe", *_OF_THE_ADAPTER), *allowed]
    if not options.flags(*_OF_THE_ADAPTER) and _is_merged_already(folder, output, options):
        compared = (output / COMPARISON).is_file() or not in_a_run
        if compare is False or (compare is None and compared):
            echo(f"{output}: merged already, of this adapter; --compare sets it beside its base")
            return True
        echo(f"{output}: merged already, of this adapter; now it is compared with base + adapter")
    else:
        with _out_of_the_way(folder, output):
            refuse_place(output)
            call_module("trainer.export.merge", [str(folder), "--output", str(output), *flags])
    if compare is False:
        return True
    if not in_a_run:
        return False
    both = ["--both-bases"] if compare else []
    flags = [*options.flags(*_OF_THE_ADAPTER), *both, *allowed]
    call_module("trainer.evaluation.compare", ["--source", str(folder), "--merged", str(output), *flags])
    return True


def _refuse_damaged_adapter(source: Path) -> None:
    """CheckpointError where `source` is a run, or its `adapter/`, that is damaged."""
    for run in (RunDirectory(source), RunDirectory(source.absolute().parent)):
        is_meant = run.path == source or run.adapter == source.absolute()
        if is_meant and run.recipe_file.is_file() and (damage := adapter_damage(run)):
            raise CheckpointError(damage)


def _is_merged_already(source: Path, output: Path, options: MergeOptions) -> bool:
    run = RunDirectory(source)
    adapter = run.adapter if run.recipe_file.is_file() else source
    return is_merged_already(adapter, output, options.base or "original", options.dtype)


@contextmanager
def _out_of_the_way(source: Path, output: Path) -> Iterator[None]:
    """What a run's own folder for merges holds of another adapter gets another name; nothing else is touched."""
    run = RunDirectory(source)
    if output.absolute() not in (run.merged.absolute(), run.merged_dequantized.absolute()):
        yield
        return
    with made_anew(run, output) as old:
        yield
    if old is not None and old.exists():
        echo(f"{output}: was of another adapter; that one is now {old}")


def start_consolidate(source: str, output: Path, options: MergeOptions, runs_dir: Path) -> None:
    """Start `trainer.export.consolidate`. ChildError when it fails."""
    folder, flags = _find_source(source, runs_dir), options.flags(*_OF_THE_ADAPTER)
    _refuse_damaged_adapter(folder)
    refuse_place(output)
    call_module("trainer.export.consolidate", [str(folder), "--output", str(output), *flags])


def _find_source(source: str, runs_dir: Path) -> Path:
    """A run by name below `runs_dir`, or a folder or file by path. ConfigError when there is none."""
    named = runs_dir.expanduser() / source
    folder = named if len(Path(source).parts) == 1 and named.is_dir() else Path(source).expanduser()
    if not folder.exists():
        raise ConfigError(f"{source}: no such run or folder ({named}, {folder}); see --runs-dir")
    return folder
