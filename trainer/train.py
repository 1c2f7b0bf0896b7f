"""`python -m trainer.train RECIPE` or `--run-dir RUN`: trains a recipe to its adapter, from wherever it got to.

Started by `accelerate launch`, by hand or by `samestep run`; one process per GPU. With `--run-dir` the plan in the
run directory is law; with a recipe it is made anew from what was launched, and every rank checks that it is the same.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.logging import get_logger

from launch.errors import ConfigError, GpuMemoryError, RunError, SamestepError
from launch.inputs.dataset_index import Index
from launch.launcher_variables import refuse_odd_launch
from launch.option_values import for_argparse, place
from launch.run.directory import RunDirectory, read_marker
from launch.run.lock import lock_holder
from trainer import WATCHDOG
from trainer.attempt import (
    AttemptResult,
    acquire_run,
    remember_attempt_speed,
    write_exit_marker,
    write_exit_reason,
    write_smaller_plan,
)
from trainer.attempt_log import log_name, open_attempt_log
from trainer.checkpoint.resume import (
    evaluation_is_missing,
    has_ended_early,
    is_over,
    remove_later_metrics,
    resume_point,
)
from trainer.data.loader import ignore_dead_workers, lost_worker
from trainer.distributed.collectives import (
    broadcast_from_main,
    destroy_process_group,
    end_process,
    lost_contact,
    out_of_memory,
    report_error,
    run_on_all_ranks,
    run_on_main,
    to_user_error,
)
from trainer.distributed.process_group import check_same_plan, init_process_group, smallest_gpu
from trainer.distributed.stop_requests import StopRequests, handle_early_stops, handle_stop_requests
from trainer.identity import agree_on_identity
from trainer.logging_setup import print_error, setup_logging
from trainer.loop.build import build, close
from trainer.loop.final_adapter import save_final_adapter
from trainer.loop.hub_upload import upload_final
from trainer.loop.oom_trial import fit_to_memory
from trainer.loop.preparation import load_resumed_adapter
from trainer.loop.step_record import StepRecord
from trainer.loop.trainer import PlannedTrainer
from trainer.setup import prepare_first, read_task, requested_recipe
from trainer.startup_timer import StartupTimer
from trainer.task import Task

logger = get_logger("trainer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(arguments)
    setup_logging()
    timer = StartupTimer.of_this_process()
    try:
        refuse_odd_launch(os.environ)
    except ConfigError as error:
        return print_error(error)  # nobody else says it: who is the first process is among what is odd
    if options.marker_decides:
        handle_early_stops(RunDirectory(options.run_dir))
    try:
        index = prepare_first(options)
        timer.record("data")
        state = init_process_group()
        timer.record("processes")
        finished = train_once(options, index, state, WATCHDOG.parent, timer)
        is_main = state.is_main_process
    except KeyboardInterrupt:  # before the run was taken: there is nothing to stop in good order
        return 130
    except SamestepError as error:
        return end_badly(error, options)
    except RuntimeError as error:
        if (lost := lost_contact(error) or lost_worker(error)) is None:
            raise
        ignore_dead_workers()
        return end_badly(lost, options)
    except OSError as error:  # a line of the figures that found no room, say: on this rank alone
        return end_badly(to_user_error(error), options)
    destroy_process_group()
    if finished is not None and is_main and finished.recipe.hub.push:
        upload_final(
            finished.run, finished.recipe
        )  # nobody waits for this rank any more, and the run is done
    return 0


def end_badly(error: SamestepError, options: argparse.Namespace) -> int:
    """Say why. Returns the exit status.

    torchrun answers every status but 0 with a traceback over the message. Where the marker decides, a refusal that
    is written there and known to all ranks ends with 0; anything else must not, or the other ranks would wait.
    """
    first = os.environ.get("RANK", "0") == "0" and (error.agreed or not dist.is_initialized())
    if options.marker_decides and first and lock_holder(options.run_dir) is None:
        # Nobody took the run: what is refused so early must not look like a crash either. Before the ranks part: the
        # others look for it then.
        write_exit_reason(RunDirectory(options.run_dir), error)
    status = report_error(error)
    marked = (
        options.marker_decides and error.agreed and read_marker(RunDirectory(options.run_dir)) is not None
    )
    return 0 if marked else status


def train_once(
    options: argparse.Namespace,
    index: Index,
    state: PartialState,
    launcher: int | None,
    timer: StartupTimer | None = None,
) -> Task | None:
    """From the request to the marker, inside an existing process group; `launcher`: the process id of who waits.

    `timer`: of what came before, if anybody counted it. Returns the task when this attempt has finished the run.

    Raises:
        SamestepError: on all ranks together; the marker says so where the run directory could be taken.
    """
    timer = timer or StartupTimer(time.time())
    memory = smallest_gpu(state.device)
    recipe = run_on_all_ranks(lambda: requested_recipe(options))
    identity = agree_on_identity(recipe, index)
    task = run_on_all_ranks(lambda: read_task(options, index, identity, state, memory))
    check_same_plan(task, state)
    if broadcast_from_main(lambda: is_over(task)):
        logger.info(f"{task.run.path}: done already, adapter in {task.run.adapter}; nothing to change")
        return None
    with ExitStack() as held:
        new = broadcast_from_main(lambda: acquire_run(task, held, options.marker_decides))
        open_attempt_log(task.run, broadcast_from_main(log_name), state.is_main_process)
        requests = held.enter_context(handle_stop_requests(task.run, state.process_index, launcher))
        try:
            result = train(task, state, requests, timer)
        except torch.OutOfMemoryError as error:  # where others wait for this rank: the launcher will end them
            write_smaller_plan(task)
            raise out_of_memory(error) from None
        except SamestepError as error:
            if state.is_main_process:
                write_exit_reason(task.run, error, new and not options.marker_decides)
                if isinstance(error, GpuMemoryError):
                    write_smaller_plan(task)
            raise
        run_on_main(lambda: write_exit_marker(task, result))
    return None if result.stop else task


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 "
        "-m trainer.train recipes/embedded.yaml",
    )
    parser.add_argument("recipe", nargs="?", help="a recipe file; the plan is made from what was launched")
    parser.add_argument(
        "--run-dir",
        type=for_argparse(place("--run-dir")),
        help="a run directory that `samestep run` wrote; its plan is law",
    )
    parser.add_argument(
        "--marker-decides", action="store_true", help=argparse.SUPPRESS
    )  # `samestep run` reads it
    parser.add_argument("--name", help="name of the run (default: the recipe's)")
    parser.add_argument(
        "--runs-dir",
        type=for_argparse(place("--runs-dir")),
        default=Path("runs"),
        help="where runs lie (default: runs)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe value"
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="KEY", help="go on although this value differs"
    )
    parser.add_argument(
        "--from",
        type=for_argparse(place("--from")),
        dest="source",
        metavar="CHECKPOINT",
        help="begin with a checkpoint of another run",
    )
    options = parser.parse_args(arguments)
    if (options.recipe is None) == (options.run_dir is None):
        parser.error("give a recipe, or --run-dir")
    if options.run_dir is not None and (options.set or options.allow or options.source):
        parser.error("--set, --allow and --from belong to a recipe; the run directory holds its own plan")
    return options


def train(task: Task, state: PartialState, requests: StopRequests, timer: StartupTimer) -> AttemptResult:
    """Load, resume, train, write the adapter; or stop at a step boundary when all ranks agreed to."""
    checkpoint = broadcast_from_main(
        lambda: resume_point(task)
    )  # a node may see an older state of a shared disk
    step = checkpoint.step if checkpoint else 0
    requests.begins_at = f"at step {step} of {task.plan.max_steps}"
    run_on_main(lambda: remove_later_metrics(task.run, step))
    if reason := requests.agree().stop:
        return AttemptResult(step, reason)
    evaluation_missing = broadcast_from_main(lambda: evaluation_is_missing(task, step))
    timer.record("plan")
    trainer = build(task, state, requests, step, timer)
    try:
        run_on_all_ranks(trainer.begin_reading)
        fit_to_memory(trainer)
        timer.record("trial")
        if reason := requests.agree().stop:
            return AttemptResult(step, reason)
        take_steps(trainer, timer, str(checkpoint.folder) if checkpoint else None, evaluation_missing)
    finally:
        close(trainer)  # while the run is still locked and signals are requests
    run_on_all_ranks(requests.raise_failure)
    run_on_main(lambda: remember_attempt_speed(trainer.task, step))
    reached, stop = trainer.state.global_step, trainer.agreed_requests.stop
    if stop and (reached < task.plan.max_steps or trainer.evaluation_interrupted):
        return AttemptResult(reached, stop)
    if reached != task.plan.max_steps and not trainer.ended_early:
        raise RunError(
            f"transformers: its Trainer ended at step {reached} of {task.plan.max_steps} without being asked to; "
            "install the versions of constraints.txt and run again"
        )
    save_final_adapter(trainer)
    return AttemptResult(reached)


def take_steps(
    trainer: PlannedTrainer, timer: StartupTimer, checkpoint: str | None, evaluation_missing: bool
) -> None:
    """Train from the checkpoint to the last step, beginning with an evaluation that a stop interrupted."""
    step, max_steps = trainer.resumed_at, trainer.plan.max_steps
    if checkpoint:
        logger.info(f"resuming at step {step} of {max_steps}")
        load_resumed_adapter(trainer, checkpoint)
    if evaluation_missing:
        trainer.evaluate()
        timer.record("evaluation")
    trainer.ended_early = broadcast_from_main(lambda: has_ended_early(trainer.task, step))
    if step < max_steps and not trainer.agreed_requests.stop and not trainer.ended_early:
        trainer.record = StepRecord.of_run(trainer.run_directory, trainer.args.process_index)
        with trainer.garbage:
            trainer.train(resume_from_checkpoint=checkpoint)


if __name__ == "__main__":
    end_process(main())
