"""The family of a model that is loaded."""

from __future__ import annotations

from typing import Any

from trainer.model.families import qwen2_5_vl, qwen2_vl, qwen3_vl
from trainer.model.families.modelling import Modelling

_FAMILIES = {each.model_type: each for each in (qwen2_vl.FAMILY, qwen2_5_vl.FAMILY, qwen3_vl.FAMILY)}


def modelling_of(model: Any) -> Modelling:
    """Return the family of a whole model, or of the part of it without the output head: both have its config."""
    return _FAMILIES[model.config.model_type]


def is_known(model: Any) -> bool:
    """Whether a loaded model is of a family that is taken through packed forwards."""
    return model.config.model_type in _FAMILIES


def feature_width(model: Any) -> int:
    """Return the numbers of a visual token as the tower of a whole model gives it: all its maps side by side."""
    maps = modelling_of(model).maps(model.model.visual)
    return maps * int(model.config.get_text_config().hidden_size)
