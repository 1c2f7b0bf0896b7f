"""LoRA on the frozen base: which layers it reaches, and which parameters train."""

from __future__ import annotations

from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from launch.errors import ConfigError
from launch.inputs.model_shape import unreached
from launch.recipe.schema import Recipe
from trainer.pretrained import base_name


def add_lora(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """Put fresh LoRA layers on the base: fp32, the same on every rank, from `training.seed`.

    Raises:
        ConfigError: a name in `lora.target_modules` reaches no layer, or what is no linear layer of decoder or tower.
    """
    chosen = recipe.lora
    config = LoraConfig(
        r=chosen.r,
        lora_alpha=chosen.lora_alpha,
        lora_dropout=chosen.lora_dropout,
        bias=chosen.bias,
        use_rslora=chosen.use_rslora,
        use_dora=chosen.use_dora,
        rank_pattern=dict(chosen.rank_pattern),
        alpha_pattern=dict(chosen.alpha_pattern),
        target_modules=chosen.target_modules,
        exclude_modules=_kept_frozen(model, chosen.target_modules),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(recipe.training.seed)
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"lora.target_modules: {chosen.target_modules} ({str(error).splitlines()[0][:200]}); "
            "name linear layers of the language model, such as q_proj and v_proj"
        ) from error
    _check_reach(peft_model, chosen.target_modules)
    config.base_model_name_or_path = base_name(recipe)
    for parameter in trainable_parameters(peft_model).values():
        parameter.data = parameter.data.float()
    return cast(PeftModel, peft_model)


def _kept_frozen(model: PreTrainedModel, names: list[str] | str) -> list[str] | str:
    """Return what of the vision tower PEFT must pass over, though it has the name of a layer that is reached.

    Without a name of the tower's own it is frozen whole, and runs without a graph. With one, Qwen2.5-VL's `gate_proj`
    is still the decoder's alone (`launch.inputs.model_shape.reached_in_tower`).
    """
    whole = r".*\bvisual\b.*"
    if isinstance(names, str):
        return whole
    own = unreached(names, None)
    tower = [f"model.visual.{name}" for name, _ in model.model.visual.named_modules() if name]
    if not any(_ends_in(path, name) for path in tower for name in own):
        return whole
    shared = [name for name in names if name not in own]
    return [
        path
        for path in tower
        if any(_ends_in(path, name) for name in shared) and not any(_ends_in(path, name) for name in own)
    ]


def _check_reach(model: PeftModel, names: list[str] | str) -> None:
    """Refuse a name that reaches no linear layer of decoder or vision tower, or anything else (ConfigError).

    LoRA elsewhere would not train as asked: trl's fused head reads `lm_head.weight` alone, the embeddings are looked
    up before the layers, and neither is given dropout keys. A name that reaches nothing, PEFT passes over in silence.
    """
    base = cast(PreTrainedModel, model.get_base_model())
    reached: list[str] = model.base_model.targeted_module_names
    inside = {*base.model.language_model.layers.modules(), *base.model.visual.modules()}
    layers = {name: base.get_submodule(name) for name in reached}
    outside = [
        name
        for name, layer in layers.items()
        if layer not in inside or not isinstance(getattr(layer, "base_layer", None), nn.Linear)
    ]
    idle = [] if isinstance(names, str) else [n for n in names if not any(_ends_in(r, n) for r in reached)]
    problems = []
    if outside:
        problems.append(
            f"lora.target_modules: {names} reaches outside the decoder layers of the language model and the linear "
            f"layers of the vision tower ({len(outside)} modules: {', '.join(outside[:3])}); name linear layers inside "
            "them, or give `all-linear`"
        )
    if idle:
        problems.append(
            f"lora.target_modules: {', '.join(idle)} names no layer of the model ({len(reached)} layers are "
            "reached by the others); correct the name or leave it out"
        )
    if problems:
        raise ConfigError(problems)


def _ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name, in the order of the names (the order of every reduction)."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(sorted(named.items()))
