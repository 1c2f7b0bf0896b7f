"""`python -m trainer.train RECIPE` or `--run-dir RUN`: trains a recipe to its adapter, from wherever it got to.

Started by `accelerate launch`, by hand or by `samestep run`; one process per GPU. With `--run-dir` the plan in the
run directory is law; with a recipe it is made anew from what was launched, and every rank checks that it is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.logging import get_logger
from peft import PeftModel
from torch import nn
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from launch.changes import consequences, tie_contents
from launch.errors import CheckpointError, ConfigError, GpuMemoryError, RunError, SamestepError
from launch.index import Index, read_index
from launch.launch_config import launched_config, launched_strategy
from launch.plan import Plan, make_plan
from launch.recipe import Recipe, find_recipe, load_recipe
from launch.replan import plan_on, plan_with_less
from launch.resources import resource
from launch.rules import refuse_config, refuse_unfit_machine
from launch.run_directory import (
    RunDirectory,
    StopReason,
    clear_markers,
    clear_requests,
    hold_lock,
    lock_holder,
    open_run,
    read_marker,
    write_marker,
)
from launch.runs import (
    adopt,
    continue_run,
    keep_plan,
    plan_to_keep,
    refuse_an_end_behind,
    refuse_another_dataset,
    write_request,
)
from launch.settings import recomputation
from trainer import LAUNCHER
from trainer.agreement import (
    end_process,
    from_rank_0,
    gather,
    in_words,
    leave_processes,
    lost_contact,
    on_rank_0,
    out_of_memory,
    say_once,
    together,
)
from trainer.data.collate import Encoder
from trainer.features.identity import facts_of, kind_of
from trainer.features.store import FeatureCache, describe, open_cache, remove_unused
from trainer.first_step import FirstStep
from trainer.model.base import DTYPES, add_lora, load_base
from trainer.model.sharding import close_sharding, mesh_of, shard_layer
from trainer.preemption import Watch, watching
from trainer.prepare import prepare
from trainer.pretrained import base_identity, load_processor
from trainer.probe import settle
from trainer.resume import evaluation_is_missing, forget_after, resume_point
from trainer.sft import PlannedTrainer, build_trainer
from trainer.sharding_guards import LayerFacts, check_sharding, layer_facts
from trainer.speech import speak_plainly
from trainer.task import Task

logger = get_logger("trainer")
PATIENCE = timedelta(hours=1)  # nodes that read a large base at unequal speed wait for each other


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(arguments)
    speak_plainly()
    clock = FirstStep.of_this_process()
    try:
        index = prepare_first(options)
        clock.passed("data")
        state = start_processes()
        clock.passed("processes")
        train_once(options, index, state, LAUNCHER, clock)
    except KeyboardInterrupt:  # before the run was taken: there is nothing to stop in good order
        return 130
    except SamestepError as error:
        return end_badly(error, options)
    except RuntimeError as error:
        if (lost := lost_contact(error)) is None:
            raise
        return end_badly(lost, options)
    except OSError as error:  # a line of the figures that found no room, say: on this rank alone
        return end_badly(in_words(error), options)
    leave_processes()
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
        leave_reason(RunDirectory(options.run_dir), error)
    status = say_once(error)
    told = options.marker_decides and error.agreed and read_marker(RunDirectory(options.run_dir)) is not None
    return 0 if told else status


def train_once(
    options: argparse.Namespace,
    index: Index,
    state: PartialState,
    launcher: int,
    clock: FirstStep | None = None,
) -> None:
    """From the request to the marker, inside an existing process group; `launcher`: the parent's process id.

    `clock`: of what came before, if anybody counted it.

    Raises:
        SamestepError: on all ranks together; the marker says so where the run directory could be taken.
    """
    clock = clock or FirstStep(time.time())
    memory = smallest_gpu(state.device)
    task = together(lambda: read_task(options, index, state, memory))
    announce(task, state)
    with ExitStack() as held:
        on_rank_0(lambda: take_run(task, held, options.marker_decides))
        watch = held.enter_context(watching(task.run, state.process_index, launcher))
        try:
            ended = train(task, state, watch, clock)
        except torch.OutOfMemoryError as error:  # where others wait for this rank: the launcher will end them
            leave_smaller_plan(task)
            raise out_of_memory(error) from None
        except SamestepError as error:
            if state.is_main_process:
                leave_reason(task.run, error)
                if isinstance(error, GpuMemoryError):
                    leave_smaller_plan(task)
            raise
        on_rank_0(lambda: leave_marker(task, ended))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 "
        "-m trainer.train recipes/embedded.yaml",
    )
    parser.add_argument("recipe", nargs="?", help="a recipe file; the plan is made from what was launched")
    parser.add_argument(
        "--run-dir", type=Path, help="a run directory that `samestep run` wrote; its plan is law"
    )
    parser.add_argument(
        "--marker-decides", action="store_true", help=argparse.SUPPRESS
    )  # `samestep run` reads it
    parser.add_argument("--name", help="name of the run (default: the recipe's)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs lie (default: runs)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe value"
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="KEY", help="go on although this value differs"
    )
    parser.add_argument(
        "--from",
        type=Path,
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


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe that was asked for."""
    if options.run_dir is not None:
        return load_recipe(RunDirectory(options.run_dir).recipe_file)
    return load_recipe(find_recipe(options.recipe), options.set)


def prepare_first(options: argparse.Namespace) -> Index:
    """The index, made if missing: before the process group exists, so that no watchdog counts the minutes."""
    recipe = recipe_of(options)
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    return read_index(recipe) or prepare(recipe, quiet=not first)


def start_processes() -> PartialState:
    """Join the process group that the launcher asked for: NCCL on GPUs, gloo on CPUs."""
    find_deepspeed_config()
    if torch.cuda.is_available():
        return PartialState(timeout=PATIENCE)
    if (
        uses_deepspeed()
    ):  # with `cpu=True` accelerate 1.15 would forget DeepSpeed, and without a backend the others
        return PartialState(backend="gloo", timeout=PATIENCE)
    return PartialState(cpu=True, timeout=PATIENCE)


def uses_deepspeed() -> bool:
    """The launcher's config says so."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def find_deepspeed_config() -> None:
    """Where a shipped accelerate config names a shipped DeepSpeed file, that is found from every folder."""
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if name in ("ds_configs/zero2.json", "ds_configs/zero3.json") and not Path(name).is_file():
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(resource("ds_configs", Path(name).name))


def smallest_gpu(device: torch.device) -> int | None:
    """Bytes of the smallest GPU of all ranks, None on CPUs. A collective."""
    mine = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    found = [memory for memory in gather(mine) if memory is not None]
    return min(found, default=None)


def read_task(options: argparse.Namespace, index: Index, state: PartialState, gpu_memory: int | None) -> Task:
    """Recipe, plan and run directory; a plain launch plans here.

    Raises:
        ConfigError: the plan does not fit what was launched, or the run belongs to another recipe.
    """
    recipe, config = recipe_of(options), launched_config(os.environ)
    if options.run_dir is not None:
        run = RunDirectory(options.run_dir.absolute())
        plan = Plan.from_json(run.plan_file.read_text())
        if index.fingerprint != plan.dataset_fingerprint:
            raise ConfigError(
                f"{run.plan_file}: was made for other data (fingerprint {plan.dataset_fingerprint[:12]}, here "
                f"{index.fingerprint[:12]}); run the same `samestep run` again to plan anew"
            )
        refuse_config(recipe, plan.strategy, plan.nodes, config)
        if gpu_memory is not None and not plan.gpu_memory:  # planned on a machine that did not know it
            plan = plan_on(recipe, index, plan, gpu_memory)
        return make_task(recipe, plan, index, run)
    run = open_run(options.runs_dir, options.name or recipe.name)
    continuation = continue_run(run, recipe, options.allow, options.source)
    source = continuation.source
    allowed = continuation.allowed if source else options.allow
    other_data = refuse_another_dataset(run, index.fingerprint, allowed, source)
    for consequence in consequences([*continuation.changed, *other_data]):
        logger.warning(f"allowed: {consequence}")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    hardware: dict[str, Any] = {
        "strategy": launched_strategy(config, "LOCAL_RANK" in os.environ),
        "nodes": max(1, state.num_processes // local),
        "gpus_per_node": local,
        "device": state.device.type,
    }
    plan = make_plan(
        recipe,
        index,
        **hardware,
        before=plan_to_keep(run, recipe, {**hardware, "gpu_memory": gpu_memory or 0}, index.fingerprint),
        name=run.name,
        begin=continuation.begin,
        allowed=continuation.allowed,
        started_from=continuation.started_from,
        config=config,
        gpu_memory=gpu_memory,
    )
    refuse_an_end_behind(run, plan.max_steps, source)
    return make_task(recipe, plan, index, run, source)


def make_task(
    recipe: Recipe, plan: Plan, index: Index, run: RunDirectory, source: Path | None = None
) -> Task:
    """With what is allowed about data and base tied to those of now."""
    base = base_identity(recipe)
    contents = {"data.content": index.fingerprint, "model.content": base}
    return Task(recipe, replace(plan, allowed=tie_contents(plan.allowed, contents)), index, run, base, source)


def announce(task: Task, state: PartialState) -> None:
    """Say first what runs, and make sure that every rank runs the same.

    Raises:
        ConfigError: a rank's packages or GPU are too old for the plan.
        RunError: the launched strategy or world is not the plan's, or a rank made another plan or has another base.
    """
    plan, launched = task.plan, launched_strategy(launched_config(os.environ), "LOCAL_RANK" in os.environ)
    logger.info(f"strategy {plan.strategy}, world size {state.num_processes}, run {task.run.path}")

    def check() -> None:
        if state.device.type != plan.device:
            raise RunError(
                f"rank {state.process_index}: torch works on {state.device.type}, the plan is for {plan.device}; "
                "torch and the GPU driver do not fit each other, or the GPU is hidden (CUDA_VISIBLE_DEVICES)"
            )
        # A plan that was made elsewhere knows neither these packages nor these GPUs.
        refuse_unfit_machine(task.recipe, plan.strategy, capability_of(state.device))
        if state.num_processes != plan.world_size:
            raise RunError(
                f"--num_processes: the launcher started {state.num_processes} processes, the plan is for "
                f"{plan.world_size}; start as many, or let `samestep run` start them"
            )
        if launched != plan.strategy:
            raise RunError(
                f"--config_file: it launches {launched}, the plan is for {plan.strategy}; take accelerate_configs/"
                f"{plan.strategy}.yaml, or let `samestep run` start the processes"
            )

    together(check)
    everyone = gather((plan.digest(), task.base))
    odd = [rank for rank, told in enumerate(everyone) if told != everyone[0]]

    def compare() -> None:
        if odd:
            what = "plan" if everyone[odd[0]][0] != everyone[0][0] else "base model"
            raise RunError(
                f"its {what} differs from rank {odd[0]}'s ({len(odd)} ranks differ); the nodes see other data, "
                "models, recipes or library versions; share HF_HOME and SAMESTEP_CACHE, or make them alike"
            )

    on_rank_0(compare)


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a GPU; None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def take_run(task: Task, held: ExitStack, waited_for: bool = False) -> None:
    """Rank 0: lock the run for this process's lifetime and write what it is about to do.

    `waited_for`: `samestep run` has cleared away what was asked of earlier attempts.
    """
    task.run.path.mkdir(parents=True, exist_ok=True)
    held.enter_context(hold_lock(task.run.path))
    clear_markers(task.run)
    if not waited_for:
        forget_old_stop(task.run)
    write_request(task.run, task.recipe, task.plan)
    if task.source is not None:
        adopt(task.source, task.run)
    task.run.environment_file.write_text(json.dumps(environment(task.plan), indent=1) + "\n")


def forget_old_stop(run: RunDirectory) -> None:
    """Remove a STOP file from before this process began: an attempt that was killed did not answer it."""
    with contextlib.suppress(OSError):
        if run.stop_file.is_file() and run.stop_file.stat().st_mtime < psutil.Process().create_time():
            run.stop_file.unlink()
            logger.warning(f"{run.stop_file}: is from before this start, removed")


def environment(plan: Plan) -> dict[str, object]:
    """Where and with what this attempt runs."""
    return {
        "versions": plan.versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name()
        if plan.device == "cuda"
        else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


@dataclass(frozen=True)
class Ended:
    """Where an attempt ended, and why when it was not at the last step."""

    step: int
    stop: StopReason | None = None


def train(task: Task, state: PartialState, watch: Watch, clock: FirstStep) -> Ended:
    """Load, resume, train, write the adapter; or stop at a step boundary when all ranks agreed to."""
    checkpoint = from_rank_0(lambda: resume_point(task))  # a node may see an older state of a shared disk
    step = checkpoint.step if checkpoint else 0
    on_rank_0(lambda: forget_after(task.run, step))
    if reason := watch.agree().stop:
        return Ended(step, reason)
    evaluation_missing = from_rank_0(lambda: evaluation_is_missing(task, step))
    clock.passed("plan")
    trainer = build(task, state, watch, step, clock)
    try:
        settle(trainer)
        clock.passed("trial")
        if reason := watch.agree().stop:
            return Ended(step, reason)
        take_steps(trainer, str(checkpoint.folder) if checkpoint else None, evaluation_missing)
    finally:
        trainer.finish()  # while the run is still ours and signals are wishes
    together(watch.raise_failure)
    reached, stop = trainer.state.global_step, trainer.agreed.stop
    if stop and (reached < task.plan.max_steps or trainer.evaluation_given_up):
        return Ended(reached, stop)
    if reached != task.plan.max_steps:
        raise RunError(
            f"transformers: its Trainer ended at step {reached} of {task.plan.max_steps} without being asked to; "
            "install the versions of constraints.txt and run again"
        )
    trainer.save_final_adapter()
    return Ended(reached)


def take_steps(trainer: PlannedTrainer, checkpoint: str | None, evaluation_missing: bool) -> None:
    """From the checkpoint to the last step, beginning with an evaluation that a stop gave up."""
    step, max_steps = trainer.resumed_at, trainer.plan.max_steps
    if checkpoint:
        logger.info(f"resuming at step {step} of {max_steps}")
        trainer.load(checkpoint)
    if evaluation_missing:
        trainer.evaluate()
        trainer.clock.passed("evaluation")
    if step < max_steps and not trainer.agreed.stop:
        trainer.train(resume_from_checkpoint=checkpoint)


def leave_marker(task: Task, ended: Ended) -> None:
    """Say how the attempt ended; what was asked of it is answered."""
    if ended.stop:
        text = f"{ended.stop}: at step {ended.step} of {task.plan.max_steps}"
        logger.info(f"stopped, {text}; the same command goes on")
        write_marker(task.run, "STOPPED", text)
    else:
        write_marker(task.run, "DONE", f"step {ended.step}")
    clear_requests(task.run)


def build(task: Task, state: PartialState, watch: Watch, resumed_at: int, clock: FirstStep) -> PlannedTrainer:
    """Base, LoRA and trainer on this rank's device.

    Raises:
        SamestepError: on all ranks together: what one rank alone can meet is met outside the collectives of sharding.
    """
    if task.recipe.training.deterministic:
        make_deterministic()
    encoder = together(
        lambda: Encoder(load_processor(task.recipe), task.recipe.data.system_message, task.recipe.data.loss)
    )
    clock.passed("processor")
    model = load_model(task, state.device)
    clock.passed("base")

    def finish() -> PlannedTrainer:
        kept = open_features(task.recipe, model, encoder.processor)
        return build_trainer(
            model,
            task,
            replace(encoder, features=kept, pixels=DTYPES[task.recipe.model.dtype]),
            watch,
            resumed_at,
            clock,
        )

    trainer = together(finish)
    clock.passed("trainer")
    return trainer


def open_features(recipe: Recipe, model: PeftModel, processor: Qwen2VLProcessor) -> FeatureCache | None:
    """The cache of vision features that the recipe asks for; `model` is as it was loaded."""
    place = recipe.data.vision_cache
    if place != "memory":
        remove_unused()
    if place == "off":
        return None
    tower = cast(Qwen2VLForConditionalGeneration, model.get_base_model()).model.visual
    facts = facts_of(recipe, tower, processor.image_processor)
    found = open_cache(place, kind_of(tower, facts), facts)
    for line in describe(found, facts):
        logger.info(line)
    return found


def load_model(task: Task, device: torch.device) -> PeftModel:
    """Base and LoRA; for fsdp every layer is sharded before the next is read, and checked when all are."""
    recipe, plan = task.recipe, task.plan
    if plan.strategy != "fsdp":
        return together(lambda: add_lora(load_base(recipe, device, plan.quant_storage), recipe))
    whole: list[LayerFacts] = []
    mesh = mesh_of(plan.world_size, device)

    def take(layer: nn.Module) -> None:
        whole.append(layer_facts(layer))
        shard_layer(layer, mesh)

    def read() -> PeftModel:
        model = add_lora(load_base(recipe, device, plan.quant_storage, take), recipe)
        close_sharding(model, mesh)
        return model

    model = together(read)
    check_sharding(model, whole, plan.world_size)
    return model


def make_deterministic() -> None:
    """The same bits on every repetition on the same GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def leave_smaller_plan(task: Task) -> None:
    """For the next attempt: settings that need less memory than those that did not suffice, in plan.json."""
    with contextlib.suppress(OSError):
        plan = Plan.from_json(task.run.plan_file.read_text(encoding="utf-8"))
        if plan.out_of_memory > task.plan.out_of_memory:
            return  # another rank was faster
        smaller = plan_with_less(task.recipe, task.index, plan, reloading=True)
        if smaller is None:
            return
        keep_plan(task.run, replace(smaller, out_of_memory=plan.out_of_memory + 1))
        logger.warning(
            f"{task.run.plan_file}: the next attempt takes {smaller.micro_batch_tokens:,} tokens a micro-batch, "
            f"recomputed: {recomputation(smaller.recompute_every)}"
        )


def leave_reason(run: RunDirectory, error: SamestepError) -> None:
    """Write why a request was refused where `samestep run` looks for it; a failed run leaves no marker."""
    with contextlib.suppress(OSError):
        if isinstance(error, ConfigError | CheckpointError):
            write_marker(run, "REFUSED", str(error))


if __name__ == "__main__":
    end_process(main())
