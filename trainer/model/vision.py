"""The vision tower in a packed forward: frozen, it has no autograd graph, no recomputation, no device sync.

transformers >= 5 makes the output of every input embedding require gradients once PEFT and gradient checkpointing
are on, the patch embedding included, and so runs a useless backward through the whole tower. Here its features
are computed under `no_grad` and handed to the language model as part of the embeddings. A tower with LoRA has a graph,
and sample dropout of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.vision_utils import get_vision_position_ids

from trainer.model.attention import Segments
from trainer.model.dropout import ARGUMENT, DropoutKeys, replace_dropout
from trainer.model.families.modelling import DEEPSTACK, Grid
from trainer.model.families.registry import modelling_of

Keep = Callable[[Sequence[str], Sequence[tuple[int, int, int]], Tensor], None]
"""Told the names of images, their grids and their features [V, maps * hidden] when the tower has computed them."""


@dataclass(frozen=True)
class TrainedTower:
    """A tower with LoRA: the dropout of its blocks, keyed by patches, and of its mergers, keyed by visual tokens."""

    blocks: DropoutKeys | None
    mergers: DropoutKeys | None
    unit: int  # patches to a visual token

    def take_keys(self, step: int, sample_ids: Tensor, positions: Tensor, order: Tensor | None) -> None:
        """Make the masks of a pass current: of visual tokens [V] of samples at positions within these.

        `order`: in which the tower computes them, where it is not that of the row. A patch is known by the position
        of its visual token and its place there, so that no layout of rows and images counts.
        """
        if order is not None:
            sample_ids, positions = sample_ids[order], positions[order]
        if self.mergers is not None:
            self.mergers.current = self.mergers.of(step, sample_ids, positions)
        if self.blocks is not None:
            within = torch.arange(self.unit, device=positions.device)
            patches = (positions[:, None] * self.unit + within).reshape(-1)
            self.blocks.current = self.blocks.of(step, sample_ids.repeat_interleave(self.unit), patches)


def trained_tower(visual: Any, seed: int) -> TrainedTower | None:
    """Give a tower with LoRA its sample dropout; None for a frozen one."""
    if not any(weight.requires_grad for weight in visual.parameters()):
        return None
    unit = int(visual.spatial_merge_size) ** 2
    return TrainedTower(
        replace_dropout(visual, seed, "visual.", lambda name: name.startswith("blocks.")),
        replace_dropout(visual, seed, "visual.", lambda name: not name.startswith("blocks.")),
        unit,
    )


def register_packed_inputs(
    model: PreTrainedModel,
    keys: DropoutKeys | None,
    keep: Keep | None = None,
    tower: TrainedTower | None = None,
) -> None:
    """Teach the model's forward the packed inputs of `trainer.data.packing.ModelInputs`; `keys` of its dropout.

    A hook inside the forward, so that a wrapper (DDP, FSDP) sees an ordinary call with tensors. Calls without
    packed inputs, like `generate`'s, pass through untouched.
    """
    model.model.register_forward_pre_hook(partial(_unpack, keys, keep, tower), with_kwargs=True)
    model.model.register_forward_hook(_keep_scored, with_kwargs=True)


def _unpack(
    keys: DropoutKeys | None,
    keep: Keep | None,
    tower: TrainedTower | None,
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
    fresh = _fresh_features(keep, tower, model, kwargs)
    if tower is not None and not len(fresh):
        # Every rank must have gradients of the tower: a blank image takes part, and weighs nothing.
        embeddings = embeddings + 0.0 * _blank_features(model, tower, embeddings.device).sum()
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


def _fresh_features(
    keep: Keep | None, tower: TrainedTower | None, model: nn.Module, kwargs: dict[str, Any]
) -> Tensor:
    """Features [Vf, maps * hidden] of the images that are not cached; `keep` hears of them."""
    pixels, grids, positions = (
        kwargs.pop(name) for name in ("pixel_values", "image_grid_thw", "vision_positions")
    )
    segments = Segments(kwargs.pop("vision_cu_seqlens"), kwargs.pop("vision_lengths"))
    names, sizes = kwargs.pop("fresh_images"), kwargs.pop("fresh_grids")
    if not segments.lengths:
        return pixels
    keys = None
    if tower is not None:
        places = kwargs["fresh_positions"]
        whose, where = kwargs["sample_ids"][places], kwargs["position_ids"][0, 0, places]
        keys = partial(tower.take_keys, kwargs["step"], whose, where)
    features = image_features(model, pixels, grids, sizes, positions, segments, keys)
    if keep is not None and names:
        keep(names, sizes, features)
    return features


def _keep_scored(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Hand only the hidden states that predict a target to the output head: [1, K, hidden]."""
    if "scored_positions" in kwargs:
        output.last_hidden_state = output.last_hidden_state.index_select(1, kwargs["scored_positions"])
    return output


def _blank_features(model: Any, tower: TrainedTower, device: torch.device) -> Tensor:
    """Of one visual token of a grey image, for no sample."""
    edge, patch = int(tower.unit**0.5), model.visual.patch_embed.proj.weight[0]
    grid = (1, edge, edge)
    grids = torch.tensor([grid])
    segments = Segments(torch.tensor([0, tower.unit], dtype=torch.int32, device=device), (tower.unit,))
    nobody = torch.zeros(1, dtype=torch.int64, device=device)
    return image_features(
        model,
        torch.zeros(tower.unit, patch.numel(), device=device),
        grids.to(device),
        [grid],
        get_vision_position_ids(grids, edge).to(device),
        segments,
        partial(tower.take_keys, 0, nobody, nobody),
    )


def image_features(
    model: nn.Module,
    pixel_values: Tensor,
    grids: Tensor,
    sizes: Sequence[Grid],
    positions: Tensor,
    segments: Segments,
    take_keys: Callable[[Tensor | None], None] | None = None,
) -> Tensor:
    """Features [V, maps * hidden] of all images of a micro-batch in one pass, in the tower's own dtype.

    `take_keys`: of a tower that trains, is told the order of its visual tokens; without it there is no graph.

    `sizes`: `grids` [F, 3] once more, for the host. `positions` [P, 2] and `segments` are what the tower would else
    compute from `grids` with a device sync each.
    """
    visual: Any = model.visual
    family = modelling_of(model)
    inputs = family.tower_inputs(visual, sizes, pixel_values.device)
    if take_keys is not None and visual.training:
        take_keys(inputs.get("window_index"))
    graph = torch.is_grad_enabled() and take_keys is not None
    with torch.set_grad_enabled(graph), torch.autocast(pixel_values.device.type, enabled=False):
        output = visual(
            pixel_values.to(visual.patch_embed.proj.weight.dtype),
            grid_thw=grids,
            position_ids=positions,
            cu_seqlens=segments.cu_seqlens,
            max_seqlen=max(segments.lengths),
            segments=segments,
            **inputs,
        )
        return family.features(output)
