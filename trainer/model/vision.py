"""The vision tower in a packed forward: frozen, it has no autograd graph, no recomputation, no device sync.

transformers >= 5 makes the output of every input embedding require gradients once PEFT and gradient checkpointing
are on, the patch embedding included, and so runs a useless backward through the whole tower. Here its features
are computed under `no_grad` and handed to the language model as part of the embeddings. A tower with LoRA has a graph,
and sample dropout of its own.

P counts patches of images, V visual tokens (merge_size ** 2 patches each), F images. Features are [V, maps * hidden]:
what enters the decoder's embeddings, and, of Qwen3-VL, a map for each of its first layers beside it (deepstack). The
tower computes in its own dtype, outside autocast.
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

from trainer.data.packing import cumulative
from trainer.model.attention import Segments, SharedPrefix
from trainer.model.dropout import ARGUMENT, DropoutKeys, replace_dropout
from trainer.model.families.modelling import DEEPSTACK, Grid
from trainer.model.families.registry import modelling_of
from trainer.model.last_layer import ReadTokens

Keep = Callable[[Sequence[str], Sequence[tuple[int, int, int]], Tensor], None]
"""Called with the names (sha256) of images, their grids (time, height, width in patches) and their features
[V, maps * hidden] when the tower has computed them."""


@dataclass(frozen=True)
class TrainedTower:
    """A tower with LoRA: the dropout of its blocks, keyed by patches, and of its mergers, keyed by visual tokens.

    Its masks belong to the image, by its content, not to the sample: an image that several samples of a micro-batch
    show goes through the tower once, and has the same masks in every layout.
    """

    blocks: DropoutKeys | None
    mergers: DropoutKeys | None
    unit: int  # patches to a visual token

    def take_keys(
        self,
        step: int,
        images: Sequence[str],
        grids: Sequence[Grid],
        order: Tensor | None,
        device: torch.device,
    ) -> None:
        """Make the masks of a pass over `images` (sha256, hexadecimal) in `step` (from 0) current.

        `order`: [V], the order in which the tower computes the visual tokens, where it is not that of the row
        (windowed attention of Qwen2.5-VL).
        """
        counts = torch.tensor([time * height * width // self.unit for time, height, width in grids])
        names = torch.tensor([int(name[:15], 16) for name in images])
        whose = names.repeat_interleave(counts).to(device)
        where = torch.cat([torch.arange(count) for count in counts.tolist()]).to(device)
        if order is not None:
            whose, where = whose[order], where[order]
        if self.mergers is not None:
            self.mergers.current = self.mergers.of(step, whose, where)
        if self.blocks is not None:
            patches = where[:, None] * self.unit + torch.arange(self.unit, device=device)
            self.blocks.current = self.blocks.of(
                step, whose.repeat_interleave(self.unit), patches.reshape(-1)
            )


def trained_tower(visual: Any, seed: int) -> TrainedTower | None:
    """Give a tower with LoRA its sample dropout, from the recipe's seed; return None for a frozen one."""
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

    It is a hook inside the forward, so that a wrapper (DDP, FSDP) sees an ordinary call with tensors. Calls without
    packed inputs, like `generate`'s, pass through untouched. `keep`: hears of features that the tower has computed.
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
    whole = [kwargs.pop(name) for name in ("whole_rows", "row_places", "prefix_starts", "prefix_length")]
    shared = SharedPrefix(*whole) if len(whole[0]) else None
    kwargs["segments"] = Segments(kwargs.pop("text_cu_seqlens"), kwargs.pop("text_lengths"), shared)
    read = Segments(kwargs.pop("read_cu_seqlens"), kwargs.pop("read_lengths"))
    positions = kwargs.pop("read_positions")
    if read.lengths != kwargs["segments"].lengths:  # else every token is read
        kwargs["read"] = ReadTokens(positions, read)
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
    names, sizes, rows = (kwargs.pop(name) for name in ("fresh_images", "fresh_grids", "fresh_rows"))
    features = kwargs.pop("fresh_features", None)
    if not segments.lengths:
        return pixels
    keys = None
    if tower is not None:
        keys = partial(tower.take_keys, kwargs["step"], names, sizes)
    if features is None:
        features = image_features(model, pixels, grids, sizes, positions, segments, keys)
    if keep is not None and names:
        keep(names, sizes, features)
    return features.index_select(0, rows) if len(rows) else features


def with_tower_features(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the packed inputs of a micro-batch, which are on the device, with the features of its fresh images.

    For a frozen tower, whose features no step changes: the forward then does not run it. The pixels are left out:
    whoever holds the micro-batch would hold them on the device until its backward pass has ended.
    """
    pixels, grids, positions = (
        inputs[name] for name in ("pixel_values", "image_grid_thw", "vision_positions")
    )
    segments = Segments(inputs["vision_cu_seqlens"], inputs["vision_lengths"])
    if not segments.lengths:
        return inputs
    features = image_features(model, pixels, grids, inputs["fresh_grids"], positions, segments)
    return {**inputs, "pixel_values": pixels.new_empty(0), "fresh_features": features}


def _keep_scored(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Hand only the hidden states that predict a target to the output head: [1, K, hidden]."""
    if "scored_positions" in kwargs:
        places, read = kwargs["scored_positions"], kwargs.get("read")
        places = places if read is None else read.among(places)
        output.last_hidden_state = output.last_hidden_state.index_select(1, places)
    return output


def _blank_features(model: Any, tower: TrainedTower, device: torch.device) -> Tensor:
    """Features [1, maps * hidden] of one visual token of a grey image, for no sample."""
    edge, patch = int(tower.unit**0.5), model.visual.patch_embed.proj.weight[0]
    grid = (1, edge, edge)
    grids = torch.tensor([grid])
    segments = Segments(torch.tensor([0, tower.unit], dtype=torch.int32, device=device), (tower.unit,))
    return image_features(
        model,
        torch.zeros(tower.unit, patch.numel(), device=device),
        grids.to(device),
        [grid],
        get_vision_position_ids(grids, edge).to(device),
        segments,
        partial(tower.take_keys, 0, ["0"], [grid]),
    )


def image_features(
    model: nn.Module,
    pixel_values: Tensor,
    grids: Tensor,
    sizes: Sequence[Grid],
    positions: Tensor,
    segments: Segments,
    take_keys: Callable[[Tensor | None, torch.device], None] | None = None,
) -> Tensor:
    """Compute features [V, maps * hidden] of all images of a micro-batch in one pass, in the tower's own dtype.

    `pixel_values`: [P, values of a patch], of any floating dtype. `grids`: [F, 3], patches in time, height and width
    of each image; `sizes`: the same for the host. `positions` [P, 2] and `segments` (one for each frame of an image)
    are what the tower would else compute from `grids` with a device sync each. `take_keys`: of a tower that trains, is
    told the order of its visual tokens; without it there is no graph.
    """
    visual: Any = model.visual
    family = modelling_of(model)
    inputs = family.tower_inputs(visual, sizes, pixel_values.device)
    if take_keys is not None and visual.training:
        take_keys(inputs.get("window_index"), pixel_values.device)
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


def features_of_images(model: Any, pixels: Sequence[Tensor], grids: Sequence[Grid]) -> tuple[Tensor, ...]:
    """Return features [V, maps * hidden] of each of several images that go through the tower together, without a graph.

    `pixels`: the patches [P, values] of each, on any device; `grids`: its patches in time, height and width.
    """
    sizes, device = torch.tensor(grids), model.device
    merge = int(model.visual.spatial_merge_size)
    lengths = tuple(height * width for time, height, width in grids for _ in range(time))
    features = image_features(
        model,
        torch.cat(list(pixels)).to(device),
        sizes.to(device),
        grids,
        get_vision_position_ids(sizes, merge).to(device),
        Segments(cumulative(lengths).to(device), lengths),
    )
    return features.split([time * height * width // merge**2 for time, height, width in grids])
