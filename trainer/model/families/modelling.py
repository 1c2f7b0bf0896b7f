"""What a family's file says of its models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, device, nn

DEEPSTACK = "deepstack_features"
"""The keyword under which features for the decoder layers travel to the language model: (places, maps)."""
Grid = tuple[int, int, int]
"""Patches of an image in time, height and width."""


def nothing(_: Any) -> None:
    """Do nothing: for what a family does not need."""


def no_inputs(visual: Any, grids: Sequence[Grid], at: device) -> dict[str, Any]:
    """Return no inputs: for a tower that needs nothing besides pixels, grids, positions and segments."""
    return {}


def pooled(output: Any) -> Tensor:
    """Return the features [V, hidden] of a tower that has one map of them."""
    features: Tensor = output.pooler_output
    return features


@dataclass(frozen=True)
class Modelling:
    """How a family's models are taken through a packed forward.

    `decoder_layer`: makes one of (text config, number). `mask`: the attention mask that makes transformers build
    none. `prepare`: is called once with the model. `tower_inputs`: (tower, grids, device) -> keywords of the tower
    that it would else compute on the device with a sync each. `features`: (output of the tower) -> [V, maps * hidden].
    `maps`: (tower) -> how many. `fuse_tower`: replaces forwards of the tower on a GPU in bfloat16; `stock`: what it
    and the decoder layers leave to transformers, for the log.
    """

    model_type: str
    decoder_layer: Callable[[Any, int], nn.Module]
    fuse_tower: Callable[[Any], None]
    mask: dict[str, None] | None
    prepare: Callable[[Any], None] = nothing
    tower_inputs: Callable[[Any, Sequence[Grid], device], dict[str, Any]] = no_inputs
    features: Callable[[Any], Tensor] = pooled
    maps: Callable[[Any], int] = lambda tower: 1
    stock: str = ""
