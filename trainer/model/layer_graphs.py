"""Decoder layers as CUDA graphs, for micro-batches so small that the host is slower than the GPU.

With few samples a GPU, launching the kernels of 28 layers takes the host longer than the GPU needs to run them. A graph
holds the launches of all decoder layers but the last, forward or backward, and is given to the GPU in one call. Its
shapes and addresses are fixed, so a row is filled up to a bucket of tokens by one more segment, which nobody reads and
whose gradient is zero; a micro-batch that meets no graph is filled up alike, so that both compute the same numbers. The
last layer computes some tokens alone, as many as the micro-batch says (`trainer.model.last_layer`), and stays as it is.

A graph is captured by the forward and backward that it replaces: the host's work of one micro-batch, none of the
GPU's. All graphs share one pool of memory, as only one micro-batch is under way at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from launch.units import gib
from trainer.model.attention import Segments
from trainer.model.dropout import ARGUMENT
from trainer.model.filled_rows import Bucket, Row, bucket_of, tokens_of_bucket

MOST_TOKENS = 8192
"""Of a micro-batch. Above it the GPU is slower than the host: nothing is filled up, and no graph is captured."""

_SPARE = 2.0  # times the memory of the largest micro-batch's activations must be free, or nothing is captured


@dataclass(frozen=True)
class _Graph:
    """A bucket's captured passes, what they read and what they write: `gradients` fp32, of all parameters, flat.

    All tensors but the boundaries of segments are the beginnings of buffers that all buckets share.
    """

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    row: Row
    output: Tensor
    of_output: Tensor
    gradients: Tensor


class LayerGraphs:
    """The graphs of one model's decoder layers but the last, in the place of the layers' forwards.

    `most_tokens`: of a micro-batch of the run.
    """

    def __init__(self, all_layers: Sequence[nn.Module], most_tokens: int) -> None:
        *layers, _ = all_layers
        self._layers = layers
        self._forwards = [layer.forward for layer in layers]
        self._places = [
            (module, name, parameter)
            for layer in layers
            for module in layer.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        self._parameters = [parameter for _, _, parameter in self._places]
        self._most_tokens = tokens_of_bucket(most_tokens)
        self._graphs: dict[Bucket, _Graph] = {}
        self._model: Row | None = None  # without its tokens, for the widths and dtypes of the others
        self._bytes_of_token = 0.0
        self._addresses: list[int] = []
        self._buffers: dict[str, Tensor] = {}
        self._taken = False
        self._pool: Any = None
        self._stream: Any = None
        self.replays = 0
        self.given_up = False
        for number, layer in enumerate(layers):
            layer.forward = self._first if number == 0 else self._later(number)  # type: ignore[method-assign]

    def _first(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The forward of the first layer: of all of them, in a training step."""
        self._taken = self._takes(hidden_states, kwargs)
        if not self._taken:
            return cast(Tensor, self._forwards[0](hidden_states, **kwargs))
        segments: Segments = kwargs["segments"]
        bucket = bucket_of(segments.lengths)
        cos, sin = kwargs["position_embeddings"]
        row = Row(hidden_states, cos, sin, segments, kwargs.get(ARGUMENT)).filled_up(bucket)
        tokens = hidden_states.shape[1]
        graph = self._graphs.get(bucket)
        if graph is not None and self._addresses == self._present_addresses():
            return cast(Tensor, _Replay.apply(self, graph, row, tokens, *self._parameters))
        before = torch.cuda.memory_allocated()
        output = self._compute(row)
        self._bytes_of_token = max(
            self._bytes_of_token, (torch.cuda.memory_allocated() - before) / bucket.tokens
        )
        self._model = self._model or row.emptied()
        return output[:, :tokens]

    def _later(self, number: int) -> Any:
        """The forward of another layer: what it is given is its output already, or it computes alone."""

        def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            if self._taken:
                return hidden_states
            return cast(Tensor, self._forwards[number](hidden_states, **kwargs))

        return forward

    def _takes(self, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether a call is a micro-batch of a training step, of a size that is filled up."""
        layers: Any = self._layers
        return (
            not self.given_up
            and isinstance(kwargs.get("segments"), Segments)
            and hidden.shape[1] <= self._most_tokens
            and not hidden.requires_grad
            and torch.is_grad_enabled()
            and layers[0].training
            and not any(layer.gradient_checkpointing for layer in layers)
        )

    def _compute(self, row: Row) -> Tensor:
        """The layers one after another, [1, tokens of the bucket, hidden]."""
        hidden = row.hidden
        for forward in self._forwards:
            hidden = cast(Tensor, forward(hidden, **row.arguments()))
        return hidden

    def _present_addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._parameters]

    # --- capturing ----------------------------------------------------------------------------------------------

    def capture(self, buckets: Iterable[Bucket]) -> str | None:
        """Capture the graphs of these buckets that are missing; in words what was done, None for nothing.

        To be called after a step without them: kernels are compiled then, and nothing watches the gradients any more.
        The GPU may be at work meanwhile. Without memory for it, or where a kernel refuses, all goes on without graphs.
        """
        missing = {each for each in buckets if each not in self._graphs and each.tokens <= self._most_tokens}
        if self.given_up or self._model is None or not missing:
            return None
        if self._addresses != (present := self._present_addresses()):
            self._graphs.clear()  # of weights that lie elsewhere now
            self._addresses = present
        if self._pool is None and (why_not := self._begin()):
            return self._give_up(why_not)
        began = time.perf_counter()
        try:
            # The largest first: what it leaves free in the pool, the others take.
            for bucket in sorted(missing, key=lambda each: -each.tokens):
                self._graphs[bucket] = self._captured(bucket)
        except torch.OutOfMemoryError:
            return self._give_up("there is too little memory")
        except RuntimeError as error:
            return self._give_up(str(error).strip().splitlines()[0][:200])
        return (
            f"decoder layers: {len(missing)} CUDA graphs captured in {time.perf_counter() - began:.1f} s "
            f"({len(self._graphs)} in all)"
        )

    def _begin(self) -> str | None:
        """Make pool and stream of the graphs; why there cannot be any, or None."""
        torch.cuda.empty_cache()
        free, needed = torch.cuda.mem_get_info()[0], int(_SPARE * self._bytes_of_token * self._most_tokens)
        if free < needed:
            return f"{gib(free)} of the GPU are free, {gib(needed)} should be"
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        return None

    def _give_up(self, why_not: str) -> str:
        self.given_up = True
        self._graphs.clear()
        self._buffers.clear()
        torch.cuda.empty_cache()
        return f"decoder layers: no CUDA graphs ({why_not})"

    def _captured(self, bucket: Bucket) -> _Graph:
        """A bucket's graphs. Nothing is computed."""
        assert self._model is not None
        model, keys = self._model, self._model.dropout_keys
        wide = {"hidden": model.hidden, "cos": model.cos, "sin": model.sin}
        row = Row(
            **{
                name: self._buffer(name, each, (1, bucket.tokens, each.shape[-1]))
                for name, each in wide.items()
            },
            segments=Segments(model.segments.cu_seqlens.new_zeros(bucket.segments + 1), (bucket.longest,)),
            dropout_keys=None if keys is None else self._buffer("keys", keys, (len(keys), bucket.tokens, 2)),
        )
        output, of_output = (
            self._buffer(name, row.hidden, row.hidden.shape) for name in ("output", "of_output")
        )
        count = sum(parameter.numel() for parameter in self._parameters)
        gradients = self._buffers.setdefault("gradients", self._parameters[0].new_zeros(count))
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream), torch.enable_grad(), self._stand_ins() as stand_ins:
            with self._capturing(forward):
                with torch.autocast("cuda", dtype=row.hidden.dtype, cache_enabled=False):
                    computed = self._compute(row)
                output.copy_(computed.detach())
            with self._capturing(backward):
                each = torch.autograd.grad(computed, stand_ins, of_output)
                torch.cat([gradient.reshape(-1) for gradient in each], out=gradients)
        return _Graph(forward, backward, row, output, of_output, gradients)

    @contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Capture what is inside. `thread_local`: data workers' batches are pinned meanwhile."""
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # says only that something failed before
                graph.capture_end()
            raise
        graph.capture_end()

    @contextmanager
    def _stand_ins(self) -> Iterator[list[nn.Parameter]]:
        """Other parameters of the same memory in the layers. Where gradients of the true ones arrive, autograd waits
        for the stream of their first use, which must not take part in a capture (torch 2.11); and they have hooks.
        """
        stand_ins = [nn.Parameter(parameter.detach()) for parameter in self._parameters]
        try:
            for (module, name, _), stand_in in zip(self._places, stand_ins, strict=True):
                module._parameters[name] = stand_in
            yield stand_ins
        finally:
            for module, name, parameter in self._places:
                module._parameters[name] = parameter

    def _buffer(self, name: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        """The beginning, in `shape`, of what all buckets share under a name; `shape[1]` are a bucket's tokens."""
        count = math.prod(shape)
        if name not in self._buffers:
            self._buffers[name] = like.new_zeros(count // shape[1] * self._most_tokens)
        return self._buffers[name][:count].view(shape)


class _Replay(torch.autograd.Function):
    """The layers' output [1, T, hidden] by a captured forward; gradients by a captured backward."""

    @staticmethod
    def forward(
        ctx: Any, graphs: LayerGraphs, graph: _Graph, row: Row, tokens: int, *parameters: Tensor
    ) -> Tensor:
        graph.row.copy(row)
        graph.forward.replay()
        graphs.replays += 1
        ctx.graphs, ctx.graph, ctx.replay = graphs, graph, graphs.replays
        ctx.shapes = [parameter.shape for parameter in parameters]
        return graph.output[:, :tokens].detach()

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Any, ...]:
        graph: _Graph = ctx.graph
        if ctx.replay != ctx.graphs.replays:
            raise RuntimeError("a CUDA graph was replayed before the backward pass of the replay before it")
        tokens = of_outputs[0].shape[1]
        graph.of_output[:, :tokens].copy_(of_outputs[0])
        graph.of_output[:, tokens:].zero_()
        graph.backward.replay()
        flat = graph.gradients.clone()  # the next replay writes over it
        parts = flat.split([shape.numel() for shape in ctx.shapes])
        return (
            None,
            None,
            None,
            None,
            *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)),
        )
