"""A recipe, an attempt and a merge in words: rows of (what, value) for a reader who does not know the keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from launch.checkpoints.scan import Checkpoint
from launch.hub_names import EMBEDDED
from launch.recipe.schema import Recipe
from launch.report.local_attempts import LocalAttempt
from launch.report.records import Merge, RunRecords, number, total_seconds
from launch.slurm.attempts import Attempt
from launch.units import age, gib, megabytes


def headline(run: RunRecords) -> str:
    """What was trained on what, how long and where, in one sentence."""
    recipe, plan = run.recipe, run.plan
    unit = "GPU" if plan.device == "cuda" else "CPU process"
    processes = f"{plan.world_size} {unit}{'' if plan.world_size == 1 else 'es' if unit[-1] == 's' else 's'}"
    bits = "in 4 bits " if recipe.quantization.load_in_4bit else ""
    return (
        f"{model_name(recipe)} {bits}on {dataset_name(recipe)}: {plan.max_steps:,} steps of "
        f"{plan.global_batch_size} samples, {plan.strategy} on {processes}"
    )


def model_name(recipe: Recipe) -> str:
    """The base model, also where its name is a keyword of ours."""
    return "The tiny embedded base" if recipe.model.name_or_path == EMBEDDED else recipe.model.name_or_path


def dataset_name(recipe: Recipe) -> str:
    """The dataset, also where its name is a keyword of ours."""
    return "the embedded charts" if recipe.data.dataset == EMBEDDED else recipe.data.dataset


def recipe_rows(run: RunRecords) -> list[tuple[str, str]]:
    """The recipe in words."""
    recipe, plan = run.recipe, run.plan
    lora, data, training = recipe.lora, recipe.data, recipe.training
    modules = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    quantization = recipe.quantization
    double = ", double quantization" if quantization.bnb_4bit_use_double_quant else ""
    stored = (
        f"4 bits ({quantization.bnb_4bit_quant_type}{double})"
        if quantization.load_in_4bit
        else recipe.model.dtype
    )
    loss = "the answer's tokens" if data.loss == "answer" else "every token of the chat"
    epochs = "" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs: "
    return [
        ("Base model", f"{recipe.model.name_or_path}, revision {recipe.model.revision}, weights in {stored}"),
        ("Adapter", f"LoRA of rank {lora.r}, alpha {lora.lora_alpha}, dropout {lora.lora_dropout:g}, on {modules}"),
        ("Data", f"{data.dataset}: trained on {data.train}, validated on {data.validation}, "
                 f"tested on {data.test}; the loss counts {loss}"),
        ("Schedule", f"{epochs}{plan.max_steps:,} steps of {plan.global_batch_size} samples, "
                     f"{plan.warmup_steps:,} of them warm-up"),
        ("Optimizer", f"{training.optim}, learning rate {training.learning_rate:g} ({training.lr_scheduler_type}), "
                      f"gradient norm at most {training.max_grad_norm:g}, seed {training.seed}"),
        ("Checkpoints", f"every {recipe.checkpoint.every_steps} steps, the last {recipe.checkpoint.keep} are kept"),
        ("Validation", f"loss of {recipe.evaluation.max_samples} samples every "
                       f"{recipe.evaluation.every_steps} steps"),
    ]  # fmt: skip


def environment_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Device and versions of the newest attempt; neither its host nor its command, which a reader elsewhere lacks."""
    versions = environment.get("versions")
    rows = [("Device", environment.get("device")), ("Python", environment.get("python"))]
    if isinstance(versions, dict):
        rows.append(("Libraries", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return [(name, str(value)) for name, value in rows if value]


def training_time(run: RunRecords) -> str:
    """Seconds of all steps in words."""
    seconds = total_seconds(run.steps)
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def last_loss(lines: list[dict[str, Any]]) -> float | None:
    """The loss of the newest line that has a finite one."""
    return next((loss for line in reversed(lines) if (loss := number(line, "loss")) is not None), None)


def attempt_rows(attempts: Sequence[Attempt], local: Sequence[LocalAttempt]) -> list[tuple[str, ...]]:
    """(job, began, nodes or processes, steps, how it ended, why) of every attempt, in the order of their starts."""
    begun = [(each.began, _attempt_row(each, f"{each.job}.{each.restart}", each.nodes)) for each in attempts]
    begun += [(each.began, _attempt_row(each, "local", each.processes)) for each in local]
    return [row for _, row in sorted(begun, key=lambda each: each[0])]


def _attempt_row(attempt: Attempt | LocalAttempt, job: str, where: str) -> tuple[str, ...]:
    first = f"{attempt.first_step:,}"
    return (
        job,
        _moment(attempt.began),
        where or "-",
        f"{first} to {attempt.last_step:,}" if attempt.how else f"from {first}",
        attempt.how or "under way",
        attempt.reason,
    )


def _moment(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}" if seconds else "-"
    except (OverflowError, OSError, ValueError):
        return "-"


def checkpoint_rows(checkpoints: list[Checkpoint]) -> list[tuple[str, ...]]:
    """(step, form, size, processes, state) of every published checkpoint."""
    return [
        (
            f"{each.step:,}",
            str(each.metadata.get("form", "-")),
            f"{megabytes(each.bytes)} MiB",
            str(each.metadata.get("world_size", "-")),
            "complete" if each.valid else "damaged",
        )
        for each in checkpoints
    ]


def merge_rows(merge: Merge) -> list[tuple[str, str]]:
    """What a merge proves of itself, from merge.json."""
    record = merge.record
    start = (
        "the unquantized base" if record.get("base") == "original" else "the base rounded to 4 bits and back"
    )
    rows = [
        ("Merged into", start),
        ("Tensors", f"{record.get('tensors')} in all: {record.get('changed')} changed by the adapter, "
                    f"{record.get('byte_identical')} byte-identical to the base, {record.get('rounded')} rounded only, "
                    f"{record.get('converted')} converted"),
        ("Largest error", f"{_figure(record.get('largest_error'))} between a merged weight and W + s·BA"),
        ("Adapter", f"sha256 {str(record.get('adapter_sha256'))[:16]}"),
        ("Base", str(record.get("base_comparison") or "not compared with the training's")),
    ]  # fmt: skip
    return [*rows, ("Note", merge.behind)] if merge.behind else rows


def comparison_rows(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(model, against, largest and mean difference of logits, same first token) of comparison.json."""
    rows: list[tuple[str, ...]] = []
    try:
        for each in comparison.get("merged", ()):
            for against, key in (("base + adapter", "unmerged"), ("4-bit base + adapter", "quantized")):
                if difference := each.get(key):
                    rows.append(
                        (
                            str(each["model"]),
                            against,
                            _figure(difference["largest"]),
                            _figure(difference["mean"]),
                            f"{100 * difference['agreement']:.1f} %",
                        )
                    )
    except (LookupError, TypeError, AttributeError, ValueError):
        return []  # of another version
    return rows


def same_answers(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(model, share of answers equal to the reference's, accuracy) of comparison.json."""
    try:
        return [
            (
                str(each["model"]),
                f"{100 * each['same']:.1f} %",
                f"{each['accuracy']:.1f} % ({each['correct']})",
            )
            for each in comparison.get("answers", ())
        ]
    except (LookupError, TypeError, AttributeError, ValueError):
        return []


def _figure(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "-"


def memory_words(run: RunRecords) -> str | None:
    """The most memory that PyTorch's allocator reserved on rank 0; None on a CPU."""
    peaks = [peak for step in run.steps if (peak := number(step, "memory_reserved")) is not None]
    return gib(max(peaks)) if peaks else None


def checkpoint_words(run: RunRecords) -> str:
    """The newest checkpoint and its age."""
    step, seconds = run.status.checkpoint_step, run.status.checkpoint_age
    return "none" if step is None else f"step {step:,}, {age(seconds or 0.0)} before this report"
