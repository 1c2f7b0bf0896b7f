"""Rows of packed samples, filled up to one of a few fixed sizes: what a CUDA graph of the decoder layers takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from trainer.model.attention import Segments
from trainer.model.dropout import ARGUMENT

_FINE, _COARSE = 128, 256  # tokens of a bucket: rows of a product's tile, so that filling up costs little
_FINE_UP_TO = 4096
_SEGMENTS = 8  # of a bucket, or a power of two times as many
_LONGEST = 2048  # tokens of a bucket's segments, or a multiple: kernels skip the blocks that a segment lacks


@dataclass(frozen=True)
class Bucket:
    """The fixed shape of a graph: tokens, segments with those that fill up, the longest segment at most."""

    tokens: int
    segments: int
    longest: int


def bucket_of(lengths: Sequence[int]) -> Bucket:
    """Return the bucket of a row of segments of these lengths."""
    segments = _SEGMENTS
    while segments < len(lengths) + 1:
        segments *= 2
    return Bucket(tokens_of_bucket(sum(lengths)), segments, _multiple(max(lengths), _LONGEST))


def tokens_of_bucket(tokens: int) -> int:
    """Return the tokens of the bucket that a row of `tokens` tokens belongs to."""
    return _multiple(tokens, _FINE if tokens <= _FINE_UP_TO else _COARSE)


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


@dataclass(frozen=True)
class Row:
    """What decoder layers read besides weights: [1, T, hidden], twice [1, T, head], segments, [M, T, 2]."""

    hidden: Tensor
    cos: Tensor
    sin: Tensor
    segments: Segments
    dropout_keys: Tensor | None

    def filled_up(self, bucket: Bucket) -> Row:
        """The same with one segment more, and empty ones after it, in a bucket's shape."""
        missing = bucket.tokens - self.hidden.shape[1]
        hidden, cos, sin = (pad(each, (0, 0, 0, missing)) for each in (self.hidden, self.cos, self.sin))
        keys = None if self.dropout_keys is None else pad(self.dropout_keys, (0, 0, 0, missing))
        return Row(hidden, cos, sin, _more(self.segments, bucket.segments, bucket.tokens), keys)

    def arguments(self) -> dict[str, Any]:
        """What a decoder layer is given besides the hidden states."""
        keys = {} if self.dropout_keys is None else {ARGUMENT: self.dropout_keys}
        return {"position_embeddings": (self.cos, self.sin), "segments": self.segments, **keys}

    def emptied(self) -> Row:
        """A row of no tokens, of the same widths and dtypes."""
        hidden, cos, sin = (each[:, :0].detach().clone() for each in (self.hidden, self.cos, self.sin))
        keys = None if self.dropout_keys is None else self.dropout_keys[:, :0].clone()
        return Row(hidden, cos, sin, Segments(self.segments.cu_seqlens[:0].clone(), ()), keys)

    def copy(self, other: Row) -> None:
        """Take over the numbers of another row of the same shapes."""
        self.hidden.copy_(other.hidden)
        self.cos.copy_(other.cos)
        self.sin.copy_(other.sin)
        self.segments.cu_seqlens.copy_(other.segments.cu_seqlens)
        if self.dropout_keys is not None and other.dropout_keys is not None:
            self.dropout_keys.copy_(other.dropout_keys)


def _more(segments: Segments, count: int, tokens: int) -> Segments:
    """`count` segments of `tokens` tokens: the first one after those that are there takes all, the others none."""
    missing = count - len(segments.lengths)
    ends = pad(segments.cu_seqlens, (0, missing), value=tokens)
    return Segments(ends, (*segments.lengths, tokens - sum(segments.lengths), *[0] * (missing - 1)))
