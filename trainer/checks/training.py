"""Checks of a training run against what would corrupt it without an error."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from launch.errors import RunError
from launch.planning.plan import Plan
from trainer.distributed.collectives import gather_objects, run_on_all_ranks

if TYPE_CHECKING:
    from accelerate import Accelerator


def output_tolerance(dtype: torch.dtype) -> float:
    """Return the most that an output may differ by before and after wrapping.

    0 in fp32 on a CPU; a GPU's libraries choose another kernel when weights lie elsewhere in memory (4.8e-7 seen).
    """
    if dtype == torch.float32:
        return 1e-4 if torch.cuda.is_available() else 0.0
    return 1e-2


def check_launch(plan: Plan, accelerator: Accelerator, wrapped: nn.Module) -> None:
    """Check on this rank that world size, distributed type and wrapper class are what the plan says.

    `accelerate launch` can start one process where several were asked for, or wrap nothing (accelerate 1.15,
    `MULTI_CPU` with `num_processes: 2`; FSDP on a CPU), and reports success.

    Raises:
        RunError: they are not.
    """
    types, wrapper = plan.parallelism.distributed_types, plan.parallelism.wrapper
    processes, kind, wrapped_in = (
        accelerator.num_processes,
        accelerator.distributed_type.value,
        type(wrapped).__name__,
    )
    if processes != plan.world_size or kind not in types or wrapped_in != wrapper:
        raise RunError(
            f"rank {accelerator.process_index}: the launcher started {processes} processes of type {kind} with the "
            f"model in {wrapped_in}, the plan wants {plan.world_size}, {' or '.join(sorted(types))}, {wrapper}; "
            "check the accelerate config and --num_processes"
        )


def check_adapters(parameters: dict[str, nn.Parameter]) -> None:
    """Check that adapters train in fp32 (trl casts those of a quantized model to bf16), and nothing else trains.

    Raises:
        RunError: they do not.
    """
    if not parameters:
        raise RunError("model: nothing trains; lora.target_modules matched no layer")
    for name, parameter in parameters.items():
        if "lora_" not in name:
            raise RunError(f"model: {name} would train; only LoRA weights may")
        if parameter.dtype != torch.float32:
            raise RunError(f"model: the adapter {name} is {parameter.dtype}, not float32")


def check_logits(before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
    """Check that wrapping left the log-probabilities of one sample unchanged, computed in `dtype`. A collective.

    Raises:
        RunError: on all ranks.
    """
    apart = (before.float() - after.float()).abs()
    allowed = output_tolerance(dtype)

    def compare() -> None:
        if not (apart <= allowed).all():
            largest = apart.nan_to_num(math.inf).max()
            raise RunError(
                f"model: wrapping changed its outputs (the log-probability of a target differs by {largest:.3g}, "
                f"{allowed:.3g} allowed); install the versions of constraints.txt, or use another --strategy"
            )

    run_on_all_ranks(compare)


def check_same_adapters(parameters: Mapping[str, nn.Parameter]) -> None:
    """Check after a resume that all ranks hold the same adapter. A collective.

    Raises:
        RunError: on all ranks.
    """
    digest = hashlib.sha256()
    for parameter in parameters.values():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    digests = gather_objects(digest.hexdigest())
    differing = [rank for rank, other in enumerate(digests) if other != digests[0]]

    def compare() -> None:
        if differing:
            raise RunError(
                f"rank {differing[0]}: resumed with another adapter than rank 0 ({len(differing)} ranks differ); "
                "the nodes see other files, share the run directory"
            )

    run_on_all_ranks(compare)


def describe_targets(
    inputs: Mapping[str, Any],
    samples: Sequence[int],
    scored: Sequence[tuple[str, ...] | None],
    tokenizer: Any,
) -> str:
    """Check that the first micro-batch scores what each of its samples should; return a description for the log.

    `inputs`: a `ModelInputs` of `samples`, positions in the split; `scored`: the texts of each sample's targets, one
    for every answer that is scored, the last one ending the sample; None for all its tokens but the first.

    Raises:
        RunError: a sample's targets are not exactly the tokens of these texts.
    """
    row, positions = inputs["input_ids"][0], inputs["scored_positions"]
    ends = inputs["text_cu_seqlens"].tolist()
    if len(inputs["whole_rows"]):  # samples share a prefix: as they are whole
        row, positions = row[inputs["whole_rows"]], inputs["row_places"][positions]
    ids = row.tolist()
    targets = dict(zip((positions + 1).tolist(), inputs["shift_labels"][0].tolist(), strict=True))
    for sample, begin, end, expected in zip(samples, ends, ends[1:], scored, strict=False):
        places = [place for place in targets if begin <= place < end]
        texts = [_text_of(ids, run, tokenizer) for run in _runs(places)]
        if (
            not places
            or places[-1] != end - 1
            or [targets[place] for place in places] != [ids[place] for place in places]
            or (expected is None and places != list(range(begin + 1, end)))
            or (expected is not None and texts != _in_nfc(expected))
        ):
            target_text = tokenizer.decode([targets[place] for place in places])
            expected_text = "all but the first" if expected is None else repr(" ... ".join(expected)[:200])
            raise RunError(
                f"data.loss: sample {sample} scores {len(places):,} of its {end - begin:,} tokens, "
                f"{target_text[:200]!r}, where {expected_text} should be; the tokenizer and the chat template do not "
                "fit each other"
            )
    first, last = (tokenizer.decode([int(inputs["shift_labels"][0, place])]) for place in (0, -1))
    return (
        f"first micro-batch: {len(targets):,} of {len(ids):,} tokens are targets ({len(targets) / len(ids):.1%}), "
        f"the first {first!r}, the last {last!r}"
    )


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Split ascending places into runs [begin, end) without gaps."""
    groups = groupby(enumerate(places), lambda each: each[1] - each[0])
    runs = [[place for _, place in group] for _, group in groups]
    return [(run[0], run[-1] + 1) for run in runs]


def _text_of(ids: Sequence[int], run: tuple[int, int], tokenizer: Any) -> str:
    text = tokenizer.decode(ids[run[0] : run[1]], clean_up_tokenization_spaces=False)
    return unicodedata.normalize("NFC", text)


def _in_nfc(texts: Sequence[str]) -> list[str]:
    return [unicodedata.normalize("NFC", text) for text in texts]


class GradientCheck:
    """Records the gradients of the first step of an attempt, whatever the engine does with them afterwards."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._largest: dict[str, Tensor] = {}
        self.skipped = False
        """This rank did not compute its gradients; then those of no rank are checked."""
        self._names = list(parameters)
        self._handles = [
            parameter.register_hook(partial(self._record, name)) for name, parameter in parameters.items()
        ]

    def _record(self, name: str, gradient: Tensor) -> None:
        largest = gradient.detach().abs().amax()
        known = self._largest.get(name)
        self._largest[name] = largest if known is None else torch.maximum(known, largest)

    def check(self) -> None:
        """Check them after the step's last backward, and record no more. A collective.

        Raises:
            RunError: on all ranks, for an adapter without gradients, or a lora_B whose are zero on all ranks.
        """
        for handle in self._handles:
            handle.remove()
        known = list(self._largest)
        values = torch.stack([self._largest[name] for name in known]).tolist() if known else []
        largest_by_rank = gather_objects(None if self.skipped else dict(zip(known, values, strict=True)))
        gradients_by_rank = [gradients for gradients in largest_by_rank if gradients is not None]

        def compare() -> None:
            if len(gradients_by_rank) < len(largest_by_rank):
                return
            missing = [name for name in self._names if not any(name in known for known in gradients_by_rank)]
            zero = [
                name
                for name in self._names
                if ".lora_B." in name and not any(known.get(name, 0.0) != 0.0 for known in gradients_by_rank)
            ]
            if wrong := missing or zero:
                what = "no gradient" if missing else "a gradient of zero"
                raise RunError(
                    f"model: {len(wrong)} of {len(self._names)} adapters got {what} in the first step, such as "
                    f"{wrong[0]}; they would not train; install the versions of constraints.txt, or use another "
                    "--strategy"
                )

        run_on_all_ranks(compare)


def check_step_taken(norm: float, step: int) -> None:
    """Check after DeepSpeed's backward, which takes the step, that the gradients were finite; the loss was.

    Raises:
        RunError: they were not (DeepSpeed 0.19 then leaves the weights as they are).
    """
    if not math.isfinite(norm):
        error = RunError(
            f"step {step}: the gradient norm is {norm}, so DeepSpeed took no step; the newest checkpoint is whole; "
            "lower training.learning_rate"
        )
        error.agreed = True  # the norm is of all ranks
        raise error


def check_finite(loss: float, grad_norm: float, step: int, samples: list[int]) -> None:
    """Check loss and gradient norm before the weights change, on every rank with the same numbers.

    Raises:
        RunError: loss or gradient norm is not a finite number.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        error = RunError(
            f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; the weights are unchanged; the step's "
            f"samples are {samples}; lower training.learning_rate, or look at these samples"
        )
        error.agreed = True  # the numbers are sums over all ranks
        raise error
