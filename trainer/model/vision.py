"""The frozen vision tower in a packed forward: no autograd graph, no recomputation, no device sync.

transformers >= 5 makes the output of every input embedding require gradients once PEFT and gradient checkpointing
are on, the patch embedding included, and so runs a useless backward through the whole tower. Here its features
are computed under `no_grad` and handed to the language model as part of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.model.attention import Segments
from trainer.model.dropout import ARGUMENT, DropoutKeys
from trainer.model.families.modelling import DEEPSTACK, Grid
from trainer.model.families.registry import modelling_of

Keep = Callable[[Sequence[str], Sequence[tuple[int, int, int]], Tensor], None]
"""Told the names of images, their grids and their features [V, maps * hidden] when the tower has computed them."""


def register_packed_inputs(
    model: PreTrainedModel, keys: DropoutKeys | None, keep: Keep | None = None
) -> None:
    """Teach the model's forward the packed inputs of `trainer.data.packing.ModelInputs`; `keys` of its dropout.

    A hook inside the forward, so that a wrapper (DDP, FSDP) sees an ordinary call with tensors. Calls without
    packed inputs, like `generate`'s, pass through untouched.
    """
    model.model.register_forward_pre_hook(partial(_unpack, keys, keep), with_kwargs=True)
    model.model.register_forward_hook(_keep_scored, with_kwargs=True)


def _unpack(
    keys: DropoutKeys | None,
    keep: Keep | None,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, Any]] | None:
    """Replace pixels and token ids by embeddings, lengths by segments, step and samples by dropout keys.

    The tower runs for fresh images alone, and not at all where every image is cached: it is whole on every rank, so
    no other rank waits for it.
    """
    if "text_cu_seqlens" not in kwargs:
        return None
    embeddings: Tensor = model.get_input_embeddings()(kwargs.pop("input_ids"))  # type: ignore[operator]
    fresh = _fresh_features(keep, model, kwargs)
    both = (
        (kwargs.pop("fresh_positions"), fresh),
        (kwargs.pop("cached_positions"), kwargs.pop("cached_features")),
    )
    images = [(positions, features) for positions, features in both if len(positions)]
    hidden = embeddings.shape[-1]
    for positions, features in images:
        embeddings = embeddings.index_copy(1, positions, features[None, :, :hidden].to(embeddings.dtype))
    kwargs["inputs_embeds"] = embeddings
    if images and images[0][1].shape[1] > hidden:
        places = torch.cat([positions for positions, _ in images])
        maps = torch.cat([features[:, hidden:] for _, features in images])
        kwargs[DEEPSTACK] = places, maps.split(hidden, dim=1)
    kwargs["segments"] = Segments(kwargs.pop("text_cu_seqlens"), kwargs.pop("text_lengths"))
    step, sample_ids = kwargs.pop("step"), kwargs.pop("sample_ids")
    if keys is not None and model.training:
        kwargs[ARGUMENT] = keys.of(step, sample_ids, kwargs["position_ids"][0, 0])
    kwargs["attention_mask"] = modelling_of(model).mask
    return args, kwargs


def _fresh_features(keep: Keep | None, model: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    """Features [Vf, maps * hidden] of the images that are not cached; `keep` hears of them."""
    pixels, grids, positions = (
        kwargs.pop(name) for name in ("pixel_values", "image_grid_thw", "vision_positions")
    )
    segments = Segments(kwargs.pop("vision_cu_seqlens"), kwargs.pop("vision_lengths"))
    names, sizes = kwargs.pop("fresh_images"), kwargs.pop("fresh_grids")
    if not segments.lengths:
        return pixels
    features = image_features(model, pixels, grids, sizes, positions, segments)
    if keep is not None and names:
        keep(names, sizes, features)
    return features


def _keep_scored(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Hand only the hidden states that predict a target to the output head: [1, K, hidden]."""
    if "scored_positions" in kwargs:
        output.last_hidden_state = output.last_hidden_state.index_select(1, kwargs["scored_positions"])
    return output


@torch.no_grad()
def image_features(
    model: nn.Module,
    pixel_values: Tensor,
    grids: Tensor,
    sizes: Sequence[Grid],
    positions: Tensor,
    segments: Segments,
) -> Tensor:
    """Features [V, maps * hidden] of all images of a micro-batch in one pass, in the tower's own dtype.

    `sizes`: `grids` [F, 3] once more, for the host. `positions` [P, 2] and `segments` are what the tower would else
    compute from `grids` with a device sync each.
    """
    visual: Any = model.visual
    family = modelling_of(model)
    with torch.autocast(pixel_values.device.type, enabled=False):
        output = visual(
            pixel_values.to(visual.patch_embed.proj.weight.dtype),
            grid_thw=grids,
            position_ids=positions,
            cu_seqlens=segments.cu_seqlens,
            max_seqlen=max(segments.lengths),
            segments=segments,
            **family.tower_inputs(visual, sizes, pixel_values.device),
        )
    return family.features(output)
