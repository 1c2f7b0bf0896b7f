"""Greedy answers to many prompts at once: no padding, and every token's step one CUDA graph.

The tokens are those of `model.generate` for one prompt at a time, up to the rounding of the kernels. The prompts go
through the decoder end to end in one row, as samples do in training; their keys and values go into fixed buffers. A
step then takes one token of every row. On CUDA it is captured once for a number of rows, a length and an adapter, and
replayed: Python, which needs longer for a step of 28 layers than the GPU, takes no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from trainer.data.packing import cumulative
from trainer.generation.image_features import chunks
from trainer.generation.static_cache import StaticKeysValues, static_attention
from trainer.model.attention import Segments
from trainer.model.families.registry import modelling_of

PROMPT_TOKENS = 16_384  # of prompts that go through the decoder together
LENGTHS = 256  # a buffer is a multiple of so many tokens long
LOOK_EVERY_STEPS = 4  # steps between two looks at whether all answers have ended: each look waits for the GPU


@dataclass(frozen=True)
class Prompt:
    """A prompt: `ids` [T] and `positions` [3, T] (M-RoPE) on the host; `features` [V, maps * hidden] of each of its
    images.
    """

    ids: Tensor
    positions: Tensor
    features: Sequence[Tensor]


@dataclass(frozen=True)
class _Rows:
    """What a step reads and writes in place, for each row.

    `tokens`: its last token; `places`: where that goes in the cache; `offsets`: how far its position is from there;
    `ended`: whether it has ended. `output`: the new tokens [rows, new]; `count`: how many of them there are, less one.
    """

    cache: StaticKeysValues
    tokens: Tensor
    places: Tensor
    offsets: Tensor
    ended: Tensor
    output: Tensor
    count: Tensor
    graphs: dict[tuple[str, ...] | None, torch.cuda.CUDAGraph] = field(default_factory=dict)

    def state(self) -> tuple[Tensor, ...]:
        """Return all that a step changes, but for the cache, whose places it would write again."""
        return self.tokens, self.places, self.ended, self.output, self.count


@dataclass
class GreedyDecoder:
    """Decodes with one model; `config`: of greedy decoding, its ends, its pad and `max_new_tokens`.

    `dtype`: of the cache. `captured`: steps are CUDA graphs.
    """

    model: PreTrainedModel
    config: GenerationConfig
    image_token: int
    dtype: torch.dtype
    captured: bool
    _rows: dict[tuple[int, int], _Rows] = field(default_factory=dict)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the new tokens of each prompt, its end token included; the caller opens autocast."""
        count = int(self.config.max_new_tokens)
        lengths = [len(prompt.ids) for prompt in prompts]
        size = 1 << (len(prompts) - 1).bit_length() if self.captured else len(prompts)
        rows = self._rows_of(size, -(-(max(lengths) + count) // LENGTHS) * LENGTHS)
        self._begin(rows, prompts)
        with static_attention(self.model):
            for begin, end in chunks(lengths, PROMPT_TOKENS):
                self._read(rows, prompts[begin:end], begin)
            step = self._stepping(rows)
            for number in range(1, count):
                if number % LOOK_EVERY_STEPS == 0 and bool(rows.ended.all()):
                    break
                step()
        return [self._answer(tokens) for tokens in rows.output[: len(prompts)].tolist()]

    def _answer(self, tokens: list[int]) -> list[int]:
        ends = self._ends()
        stop = next((at + 1 for at, token in enumerate(tokens) if token in ends), len(tokens))
        return tokens[:stop]

    def _ends(self) -> list[int]:
        ends = self.config.eos_token_id
        return list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]

    def _rows_of(self, size: int, length: int) -> _Rows:
        """Buffers and graphs of the last call, where it was of the same shape."""
        if (size, length) not in self._rows:
            self._rows.clear()
            device = self.model.device
            text = self.model.config.get_text_config()

            def numbers(*shape: int) -> Tensor:
                return torch.zeros(shape, dtype=torch.long, device=device)

            self._rows[size, length] = _Rows(
                cache=StaticKeysValues(text, size, length, self.dtype, device),
                tokens=numbers(size),
                places=numbers(size),
                offsets=numbers(size),
                ended=numbers(size).bool(),
                output=numbers(size, int(self.config.max_new_tokens)),
                count=numbers(1),
            )
        return self._rows[size, length]

    def _begin(self, rows: _Rows, prompts: Sequence[Prompt]) -> None:
        """Rows without a prompt have ended before they begin."""
        spare = [0] * (len(rows.tokens) - len(prompts))
        lengths = [len(prompt.ids) for prompt in prompts]
        nexts = [int(prompt.positions.max()) + 1 for prompt in prompts]
        offsets = [position - length for position, length in zip(nexts, lengths, strict=True)]
        rows.places.copy_(torch.tensor(lengths + spare))
        rows.offsets.copy_(torch.tensor(offsets + spare))
        rows.ended.copy_(torch.arange(len(rows.tokens)) >= len(prompts))
        rows.output.fill_(int(self.config.pad_token_id))
        rows.count.zero_()

    def _read(self, rows: _Rows, prompts: Sequence[Prompt], first: int) -> None:
        """Take prompts through the decoder, those of the rows from `first` on, and have their first tokens."""
        device = self.model.device
        lengths = tuple(len(prompt.ids) for prompt in prompts)
        ids = torch.cat([prompt.ids for prompt in prompts])
        places = torch.cat([torch.arange(length) for length in lengths])
        positions = torch.cat([places[None], torch.cat([prompt.positions for prompt in prompts], dim=1)])
        of_tokens = torch.arange(first, first + len(lengths)).repeat_interleave(torch.tensor(lengths))
        output = self.model.model.language_model(
            **self._embedded(ids, [image for prompt in prompts for image in prompt.features]),
            position_ids=positions[:, None].to(device),
            attention_mask=modelling_of(self.model).mask,
            past_key_values=rows.cache.write_prompts(of_tokens.to(device), places.to(device)),
            prompts=Segments(cumulative(lengths).to(device), lengths),
        )
        last = cumulative(lengths)[1:].to(device, torch.long) - 1
        tokens = self._likeliest(output.last_hidden_state[0, last])
        these = slice(first, first + len(lengths))
        rows.tokens[these], rows.output[these, 0], rows.ended[these] = tokens, tokens, self._is_end(tokens)

    def _embedded(self, ids: Tensor, images: Sequence[Tensor]) -> dict[str, Any]:
        """Packed prompts [1, T, hidden] with the features of their images, and those for the decoder layers."""
        device = self.model.device
        embeddings = self.model.get_input_embeddings()(ids.to(device)[None])
        if not images:
            return {"inputs_embeds": embeddings}
        shown = (ids == self.image_token).to(device)
        entering, *deepstack = torch.cat(list(images)).split(embeddings.shape[-1], dim=1)
        places = (ids == self.image_token).nonzero()[:, 0].to(device)
        inputs = {"inputs_embeds": embeddings.index_copy(1, places, entering[None].to(embeddings.dtype))}
        if deepstack:
            inputs |= {"visual_pos_masks": shown[None], "deepstack_visual_embeds": deepstack}
        return inputs

    def _step(self, rows: _Rows) -> None:
        """One more token of every row."""
        device = rows.tokens.device
        every = torch.arange(len(rows.tokens), device=device)
        visible = torch.arange(rows.cache.length, device=device)[None] <= rows.places[:, None]
        output = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(rows.tokens[:, None]),
            position_ids=(rows.places + rows.offsets)[None, :, None].expand(3, -1, -1),
            attention_mask=modelling_of(self.model).mask,
            past_key_values=rows.cache.write_token(every, rows.places),
            visible=visible[:, None, None],
        )
        tokens = self._likeliest(output.last_hidden_state[:, 0])
        tokens = tokens.masked_fill(rows.ended, int(self.config.pad_token_id))
        rows.count.add_(1)
        rows.output.index_copy_(1, rows.count, tokens[:, None])
        rows.ended.logical_or_(self._is_end(tokens))
        rows.tokens.copy_(tokens)
        rows.places.add_(1)

    def _likeliest(self, hidden: Tensor) -> Tensor:
        """Of hidden states [rows, hidden], in fp32 as `generate` compares them."""
        return self.model.lm_head(hidden).float().argmax(-1)  # type: ignore[no-any-return]

    def _is_end(self, tokens: Tensor) -> Tensor:
        ended = torch.zeros_like(tokens, dtype=torch.bool)
        for end in self._ends():
            ended = ended | (tokens == end)
        return ended

    def _stepping(self, rows: _Rows) -> Callable[[], None]:
        if not self.captured:
            return lambda: self._step(rows)
        adapters = self._active_adapters()
        if adapters not in rows.graphs:
            rows.graphs[adapters] = self._capture(rows)
        return rows.graphs[adapters].replay

    def _capture(self, rows: _Rows) -> torch.cuda.CUDAGraph:
        """The step as a graph, after one that chooses and compiles kernels; the rows are left as they were.

        Autocast must not keep what it has cast: that memory would be the graph's (PyTorch's notes on CUDA graphs).
        Only this thread's calls are captured: NCCL's and those of the threads that keep features go on.
        """
        before = [tensor.clone() for tensor in rows.state()]
        caches = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._step(rows)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step(rows)
        finally:
            torch.set_autocast_cache_enabled(caches)
        for tensor, value in zip(rows.state(), before, strict=True):
            tensor.copy_(value)
        return graph

    def _active_adapters(self) -> tuple[str, ...] | None:
        """Whose step a graph is; None: the base's."""
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                return None if module.disable_adapters else tuple(module.active_adapters)
        return None
