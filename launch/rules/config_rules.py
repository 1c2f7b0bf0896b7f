"""What an accelerate or DeepSpeed configuration must not ask for: rules like those of `launch.rules.request_rules`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.rules.request import PlanRequest

_DEEPSPEED_KEYS = {
    *(
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization"),
    *("bf16", "fp16", "amp"),  # another rule's
    *("steps_per_print", "wall_clock_breakdown", "comms_logger"),
}
_ZERO_KEYS = {
    *("stage", "overlap_comm", "contiguous_gradients", "reduce_bucket_size", "allgather_bucket_size"),
    *("stage3_param_persistence_threshold", "stage3_max_reuse_distance"),
    "stage3_gather_16bit_weights_on_model_save",
}
_LAYERS_SIZES = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters")
_OFFLOADS = ("offload_param", "offload_optimizer")
_NUMBERS = ("reduce_bucket_size", "stage3_param_persistence_threshold")


def accelerate_casts_nothing(request: PlanRequest) -> str | None:
    """accelerate's mixed precision casts fp32 adapters and float-stored packed weights; precision is the plan's."""
    precision = request.launch.mixed_precision
    if precision == "no":
        return None
    where = request.launch.where
    return f"mixed_precision: {precision} in {where}; set it to 'no', the recipe says what is computed in"


def fsdp_is_version_2(request: PlanRequest) -> str | None:
    """FSDP 1 with SHARDED_STATE_DICT saves no tensor of a LoRA, without an error."""
    # accelerate 1.15 takes 1 where none is given.
    fsdp_version = str(request.launch.fsdp.get("fsdp_version", 1))
    if not request.launch.fsdp or fsdp_version == "2":
        return None
    return f"fsdp_version: {fsdp_version} in {request.launch.where}; set it to 2"


def recomputation_is_ours(request: PlanRequest) -> str | None:
    """accelerate's FSDP recomputation forgets the random state: other masks, wrong gradients, no error."""
    if not request.launch.fsdp_flag("fsdp_activation_checkpointing"):
        return None
    return (
        f"fsdp_activation_checkpointing: true in {request.launch.where}; set it to false and use "
        "training.gradient_checkpointing"
    )


def weights_stay_on_the_gpu(request: PlanRequest) -> str | None:
    """4-bit weights that are offloaded to a CPU are refused or quantized again."""
    zero = _section(request.launch.deepspeed, "zero_optimization")
    offloads = [key for key in _OFFLOADS if _section(zero, key).get("device", "none") != "none"]
    if request.launch.fsdp_flag("fsdp_offload_params"):
        offloads.append("fsdp_offload_params")
    if not offloads:
        return None
    where = request.launch.where
    return f"{', '.join(offloads)}: asked for in {where}; leave it out, and use more GPUs or a smaller base"


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Of a DeepSpeed file; null asks for nothing, and anything else that is no section is another rule's."""
    section = values.get(key)
    return section if isinstance(section, dict) else {}


def deepspeed_casts_nothing(request: PlanRequest) -> str | None:
    """DeepSpeed's bf16, fp16 and amp engines cast every float parameter, adapters and packed weights included."""
    enabled = [
        name for name in ("bf16", "fp16", "amp") if _section(request.launch.deepspeed, name).get("enabled")
    ]
    if not enabled:
        return None
    return f"{', '.join(enabled)}: enabled in the DeepSpeed file of {request.launch.where}; leave it out"


def deepspeed_sections_are_sections(request: PlanRequest) -> str | None:
    """A value in the place of a section is passed over here and there, and ends elsewhere in a traceback."""
    zero, stage = request.launch.deepspeed, "zero_optimization"
    sections = {key: zero[key] for key in (stage, "bf16", "fp16", "amp", "comms_logger") if key in zero}
    offload = _section(zero, stage)
    sections |= {f"{stage}.{key}": offload[key] for key in _OFFLOADS if key in offload}
    wrong = [
        f"{key} ({json.dumps(value)[:40]})"
        for key, value in sections.items()
        if not isinstance(value, dict) and (value is not None or key == stage)
    ]
    if not wrong:
        return None
    return (
        f"{', '.join(wrong)}: no section, in the DeepSpeed file of {request.launch.where}; write it in braces, "
        "see ds_configs/"
    )


def deepspeed_counts_what_the_plan_counts(request: PlanRequest) -> str | None:
    """Numbers in the DeepSpeed file win over the recipe in silence; `auto` buckets need what vision models lack."""
    zero = request.launch.deepspeed
    if not zero:
        return None
    sizes = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    wrong = [key for key in sizes if zero.get(key, "auto") != "auto"]
    section = _section(zero, "zero_optimization")
    wrong += [key for key in _NUMBERS if section.get(key) == "auto"]
    if not wrong:
        return None
    return (
        f'{", ".join(wrong)}: batch keys must be "auto" and bucket sizes numbers in the DeepSpeed file of '
        f"{request.launch.where}; see ds_configs/"
    )


def deepspeed_is_asked_for_what_is_known(request: PlanRequest) -> str | None:
    """Other keys of the DeepSpeed file change what is trained: how gradients travel, a schedule, an optimizer."""
    zero = request.launch.deepspeed
    section = _section(zero, "zero_optimization")
    odd = sorted({*zero} - _DEEPSPEED_KEYS) + sorted({*section} - _ZERO_KEYS - {*_OFFLOADS, *_LAYERS_SIZES})
    if not odd:
        return None
    return (
        f"{', '.join(odd)}: in the DeepSpeed file of {request.launch.where}; leave them out, see ds_configs/"
    )


def deepspeed_holds_as_many_layers_as_are_planned(request: PlanRequest) -> str | None:
    """How many decoder layers are whole at once comes from the model's own sizes, and the memory plan counts on it."""
    section = _section(request.launch.deepspeed, "zero_optimization")
    sizes = [key for key in _LAYERS_SIZES if key in section]
    if not sizes:
        return None
    return (
        f"{', '.join(sizes)}: in the DeepSpeed file of {request.launch.where}; leave it out, it follows from the "
        "size of the model's layers"
    )


def deepspeed_uses_the_standard_launcher(request: PlanRequest) -> str | None:
    """By default accelerate starts DeepSpeed on several nodes through pdsh and a hostfile."""
    if request.launch.multinode_launcher == "standard" or request.nodes == 1:
        return None
    return f"deepspeed_multinode_launcher: {request.launch.multinode_launcher} ({request.launch.where}); set standard"


CONFIG_RULES: tuple[Callable[[PlanRequest], str | None], ...] = (
    accelerate_casts_nothing,
    fsdp_is_version_2,
    recomputation_is_ours,
    weights_stay_on_the_gpu,
    deepspeed_casts_nothing,
    deepspeed_sections_are_sections,
    deepspeed_counts_what_the_plan_counts,
    deepspeed_is_asked_for_what_is_known,
    deepspeed_holds_as_many_layers_as_are_planned,
    deepspeed_uses_the_standard_launcher,
)
"""Of the accelerate configuration: of the shipped file before a launch, and of what was launched in the trainer."""
