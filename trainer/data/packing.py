"""Samples laid end to end in one row, without padding: what the packed forward takes.

The prefix that samples have in common (`Encoder.shared_prefix`) stands once, at the row's begin: its hidden states are
the same in all of them, as attention is causal. Attention alone sees every sample whole (`SharedPrefix`).

`position_ids` has shape [4, 1, T]: row 0 counts the text positions of each sample from 0, rows 1 to 3 are M-RoPE
(time, height, width) of each sample, the form that transformers' Qwen2-VL takes for packed input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids

from trainer.data.encoder import IGNORED, EncodedImage, Sample

_PREFIX = -1
"""Stands for the sample of a shared prefix, whose dropout mask is that of the step, in all samples and layouts."""


class ModelInputs(TypedDict):
    """What the packed forward takes, for N samples of A tokens together, which lie in a row of T tokens.

    Where n of them share a prefix of P tokens, T = A - (n - 1) * P, else T = A.

    Their images, of which a sample may have none or several, come in two kinds: C whose features are cached (Vc visual
    tokens), and F fresh ones (P patches, Vf visual tokens), for which the tower runs, once for an image that is shown
    several times.
    """

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [4, 1, T]
    sample_ids: Tensor  # [T] int64: the position in the split of the sample of a token; of a prefix -1
    step: int  # the optimizer step, counted from 0; -1 in an evaluation
    scored_positions: Tensor  # [K]: the tokens from which a target is predicted
    shift_labels: Tensor  # [1, K]: that target, the label of the *next* token
    text_cu_seqlens: Tensor  # [N + 1] int32, of A tokens
    text_lengths: tuple[int, ...]
    whole_rows: Tensor  # [A]: where each token of the whole samples lies in the row; empty where T = A
    row_places: Tensor  # [T]: where each token of the row first lies among the whole samples; empty as above
    prefix_starts: Tensor  # [n]: where samples with the prefix begin among the whole ones; empty as above
    prefix_length: int  # P
    read_positions: Tensor  # [S]: of each sample the tokens from the first scored one to its end
    read_cu_seqlens: Tensor  # [N + 1] int32
    read_lengths: tuple[int, ...]
    pixel_values: Tensor  # [P, patch features]
    image_grid_thw: Tensor  # [F, 3]
    fresh_positions: Tensor  # [Vf]: where their visual tokens lie in the row
    fresh_rows: Tensor  # [Vf]: the rows of their features there, where an image is shown twice; else empty
    fresh_images: tuple[str, ...]  # F names in the cache of features; empty without one
    fresh_grids: tuple[tuple[int, int, int], ...]  # `image_grid_thw` once more, for the host
    vision_positions: Tensor  # [P, 2]: height and width of each patch, in merge order
    vision_cu_seqlens: Tensor  # [F + 1] int32
    vision_lengths: tuple[int, ...]
    cached_features: Tensor  # [Vc, hidden]
    cached_positions: Tensor  # [Vc]


def pack(
    samples: Sequence[Sample],
    *,
    sample_ids: Sequence[int],
    step: int,
    masked: bool,
    image_token_id: int,
    merge: int,
    prefixes: Sequence[int] = (),
) -> ModelInputs:
    """Lay samples end to end. `masked` scores no token: a filler, which runs and weighs nothing.

    `sample_ids`: their positions in the split, which choose their dropout masks together with `step`. `prefixes`: how
    many tokens of each are those of the shared prefix, all the same number or 0; empty: of none.

    A prefix has one dropout mask in all samples of a step, also where a micro-batch holds one of them alone.
    """
    prefixes = prefixes or [0] * len(samples)
    row = _lay(samples, prefixes)
    kept = row.kept
    input_ids = torch.cat([sample.input_ids for sample in samples])[kept]
    next_labels = torch.cat([_next_labels(sample.labels) for sample in samples])[kept]
    scored = next_labels.new_empty(0) if masked else (next_labels != IGNORED).nonzero()[:, 0]
    text_positions = torch.cat([torch.arange(len(sample.input_ids)) for sample in samples])[kept]
    positions = torch.cat([sample.positions for sample in samples], dim=1)[:, kept]
    text_lengths = tuple(len(sample.input_ids) for sample in samples)
    images = [image for sample in samples for image in sample.images]
    visual = (input_ids == image_token_id).nonzero()[:, 0]
    is_cached = torch.tensor([image.features is not None for image in images], dtype=torch.bool)
    counts = torch.tensor([image.visual_tokens(merge) for image in images], dtype=torch.int64)
    is_cached = is_cached.repeat_interleave(counts)
    return ModelInputs(
        input_ids=input_ids[None],
        position_ids=torch.cat([text_positions[None], positions])[:, None],
        sample_ids=_token_samples(sample_ids, text_lengths, prefixes)[kept],
        step=step,
        scored_positions=scored,
        shift_labels=next_labels[scored][None],
        text_cu_seqlens=cumulative(text_lengths),
        text_lengths=text_lengths,
        **_whole_samples(row, sum(text_lengths)),
        **_read_tokens(row.prefix_length, row.own_lengths, scored),
        fresh_positions=visual[~is_cached],
        cached_positions=visual[is_cached],
        cached_features=_joined([image.features for image in images]),
        **_pack_fresh([image for image in images if image.features is None], merge),
    )


class _Row(NamedTuple):
    """How samples of A tokens together lie in a row of T, as `ModelInputs` has it.

    `kept`: [T], the places among the A of the row's tokens; `own_lengths`: what of each sample follows the prefix.
    """

    kept: Tensor
    own_lengths: tuple[int, ...]
    prefix_length: int
    prefix_starts: Tensor


def _lay(samples: Sequence[Sample], prefixes: Sequence[int]) -> _Row:
    """The prefix of those that share one, then of every sample the rest."""
    lengths = [len(sample.input_ids) for sample in samples]
    starts = cumulative(lengths)[:-1].to(torch.int64)
    sharing = [number for number, length in enumerate(prefixes) if length]
    if len(sharing) < 2:
        none = starts.new_empty(0)
        return _Row(torch.arange(sum(lengths)), tuple(lengths), 0, none)
    length = prefixes[sharing[0]]
    begins = zip(starts.tolist(), lengths, prefixes, strict=True)
    own = [torch.arange(start + prefix, start + whole) for start, whole, prefix in begins]
    kept = torch.cat([starts[sharing[0]] + torch.arange(length), *own])
    return _Row(kept, tuple(map(len, own)), length, starts[sharing])


class _WholeSamples(TypedDict):
    """The part of `ModelInputs` that attention takes to see every sample whole."""

    whole_rows: Tensor
    row_places: Tensor
    prefix_starts: Tensor
    prefix_length: int


def _whole_samples(row: _Row, tokens: int) -> _WholeSamples:
    """Where the `tokens` of all samples lie in the row, and back."""
    if not row.prefix_length:
        none = row.prefix_starts
        return _WholeSamples(whole_rows=none, row_places=none, prefix_starts=none, prefix_length=0)
    prefix = torch.arange(row.prefix_length)
    whole_rows = torch.empty(tokens, dtype=torch.int64)
    whole_rows[row.kept] = torch.arange(len(row.kept))
    whole_rows[row.prefix_starts[:, None] + prefix] = prefix
    return _WholeSamples(
        whole_rows=whole_rows,
        row_places=row.kept,
        prefix_starts=row.prefix_starts,
        prefix_length=row.prefix_length,
    )


def _token_samples(sample_ids: Sequence[int], lengths: Sequence[int], prefixes: Sequence[int]) -> Tensor:
    """The sample of each of A tokens, int64; -1 of a prefix."""
    parts = zip(sample_ids, lengths, prefixes, strict=True)
    runs = [run for sample, length, prefix in parts for run in ((_PREFIX, prefix), (sample, length - prefix))]
    names, counts = torch.tensor(runs).unbind(1)
    return names.repeat_interleave(counts)


class _ReadTokens(TypedDict):
    """The part of `ModelInputs` that the last decoder layer takes."""

    read_positions: Tensor
    read_cu_seqlens: Tensor
    read_lengths: tuple[int, ...]


def _read_tokens(begin: int, lengths: Sequence[int], scored: Tensor) -> _ReadTokens:
    """Of each sample the tokens from the first scored one to its end; two where none is scored, as in a filler.

    Never one alone: FlashAttention takes rows of one query for decoding, and folds their heads. The samples lie end to
    end from `begin` on.
    """
    ends = (cumulative(lengths)[1:] + begin).tolist()
    begins = []
    for length, end in zip(lengths, ends, strict=True):
        at = int(torch.searchsorted(scored, end - length))
        first = int(scored[at]) if at < len(scored) else end
        begins.append(min(first, max(end - 2, end - length)))
    counts = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
    spans = [torch.arange(begin, end) for begin, end in zip(begins, ends, strict=True)]
    return _ReadTokens(
        read_positions=torch.cat(spans), read_cu_seqlens=cumulative(counts), read_lengths=counts
    )


class _FreshImages(TypedDict):
    """The part of `ModelInputs` that the tower takes."""

    pixel_values: Tensor
    image_grid_thw: Tensor
    fresh_rows: Tensor
    fresh_images: tuple[str, ...]
    fresh_grids: tuple[tuple[int, int, int], ...]
    vision_positions: Tensor
    vision_cu_seqlens: Tensor
    vision_lengths: tuple[int, ...]


def _pack_fresh(shown: Sequence[EncodedImage], merge: int) -> _FreshImages:
    """Images without cached features, end to end and each once; empty tensors for none."""
    images = _distinct(shown)
    grids = torch.tensor([image.grid for image in images], dtype=torch.int64).view(-1, 3)
    lengths = tuple(grid[1] * grid[2] for grid in grids.tolist() for _ in range(grid[0]))
    return _FreshImages(
        pixel_values=_joined([image.pixel_values for image in images]),
        image_grid_thw=grids,
        fresh_rows=_feature_rows(shown, images, merge),
        fresh_images=tuple(image.name for image in images if image.name),
        fresh_grids=tuple(image.grid for image in images),
        vision_positions=get_vision_position_ids(grids, merge) if images else grids.new_empty(0, 2),
        vision_cu_seqlens=cumulative(lengths),
        vision_lengths=lengths,
    )


def _distinct(shown: Sequence[EncodedImage]) -> list[EncodedImage]:
    """Each image once, in their order; one that has no name stands for itself."""
    first: dict[str | int, EncodedImage] = {}
    for number, image in enumerate(shown):
        first.setdefault(image.name or number, image)
    return list(first.values())


def _feature_rows(shown: Sequence[EncodedImage], distinct: Sequence[EncodedImage], merge: int) -> Tensor:
    """Where the features of every shown image lie among those of the distinct ones; empty where all are."""
    if len(shown) == len(distinct):
        return torch.empty(0, dtype=torch.int64)
    ends = cumulative([image.visual_tokens(merge) for image in distinct]).tolist()
    begins = {image.name or id(image): begin for image, begin in zip(distinct, ends, strict=False)}
    return torch.cat(
        [torch.arange(image.visual_tokens(merge)) + begins[image.name or id(image)] for image in shown]
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor:
    """The tensors among `parts` end to end, an empty one for none."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else torch.empty(0)


def _next_labels(labels: Tensor) -> Tensor:
    """The label of the token after each; none after a sample's last, whatever lies behind it in the row."""
    return torch.cat([labels[1:], labels.new_tensor([IGNORED])])


def cumulative(lengths: Sequence[int]) -> Tensor:
    """Return the sequence boundaries [N + 1], int32, as variable-length attention takes them."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
