"""A model on one device that answers prompts about images: through buffers and CUDA graphs, or as transformers does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from trainer.data.encoder import mrope_positions
from trainer.generation.decoding import GreedyDecoder, Prompt
from trainer.generation.image_features import ImageFeatures, ImageMaps
from trainer.model.families.registry import is_known

if TYPE_CHECKING:
    from trainer.data.splits import Rows  # its library takes half a second, and who asks reads no rows


@dataclass
class Replica:
    """A model that answers, on one device.

    `synced`: its layers wait for those of the other ranks, so all generate as many tokens. `stock`: why transformers
    generates; None: prompts are packed and steps are CUDA graphs, of a model that is prepared (`prepare_answers`).
    """

    model: PreTrainedModel | PeftModel
    processor: ProcessorMixin
    rows: Rows
    max_new_tokens: int
    compute_dtype: torch.dtype
    synced: bool = False
    stock: str | None = "asked for"

    @property
    def fast(self) -> bool:
        """Whether prompts are packed, images read ahead and steps captured as CUDA graphs."""
        return self.stock is None

    @property
    def way(self) -> str:
        """The way it answers, in words for the log."""
        return "packed prompts and CUDA graphs" if self.fast else f"transformers' `generate` ({self.stock})"

    @property
    def base(self) -> PreTrainedModel:
        """Return the model without PEFT's wrapper."""
        model = self.model
        return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)

    @cached_property
    def features(self) -> ImageFeatures:
        """The features of the images of the rows."""
        return ImageFeatures(self.base, self.processor, self.rows, packed=self.fast)

    def forget_trained_features(self) -> None:
        """Drop the features of a tower with LoRA before another adapter, or none, answers: they are that adapter's."""
        if any("lora_" in name for name, _ in self.base.model.visual.named_parameters()):
            self.features.forget()

    def look_ahead(self, image_rows: Iterable[int]) -> None:
        """Name the rows whose images will be asked about, in that order: a GPU need not wait until they are decoded."""
        if self.fast:
            self.features.look_ahead(image_rows)

    @torch.no_grad()
    def answers(self, prompts: Sequence[str], image_rows: Sequence[int]) -> list[str]:
        """Return greedy answers, each to a prompt about the images of a row."""
        of_prompts = self.features.of(image_rows)
        merge = int(self.processor.image_processor.merge_size)
        counts = [[image.visual_tokens(merge) for image in images] for images in of_prompts]
        token = self.processor.image_token
        texts = [_with_visual_tokens(*each, token) for each in zip(prompts, counts, strict=True)]
        half = self.compute_dtype != torch.float32
        with torch.autocast(self.base.device.type, self.compute_dtype) if half else contextlib.nullcontext():
            new = self._decoded(texts, of_prompts) if self.fast else self._generated(texts, of_prompts)
        answers = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in answers]

    @cached_property
    def _decoder(self) -> GreedyDecoder:
        base, processor = self.base, self.processor
        config = greedy(base, processor, self.max_new_tokens)
        on_gpu = base.device.type == "cuda"
        return GreedyDecoder(base, config, processor.image_token_id, self.compute_dtype, captured=on_gpu)

    def _decoded(self, texts: Sequence[str], of_prompts: Sequence[list[ImageMaps]]) -> list[list[int]]:
        token, merge = self.processor.image_token_id, int(self.processor.image_processor.merge_size)
        ids = [
            torch.tensor(each)
            for each in self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]
        return self._decoder.generate(
            [
                Prompt(
                    of_text,
                    mrope_positions(of_text == token, [image.grid for image in images], merge),
                    [image.values for image in images],
                )
                for of_text, images in zip(ids, of_prompts, strict=True)
            ]
        )

    def _generated(self, texts: Sequence[str], of_prompts: Sequence[list[ImageMaps]]) -> Tensor:
        device = self.base.device
        images = [image for of_prompt in of_prompts for image in of_prompt]
        encoded = self.processor.tokenizer(
            texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
        ).to(device)
        input_ids: Tensor = encoded["input_ids"]
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=encoded["attention_mask"],
            mm_token_type_ids=(input_ids == self.processor.image_token_id).int(),
            generation_config=greedy(self.base, self.processor, self.max_new_tokens),
            synced_gpus=self.synced,
            **(
                {
                    "image_grid_thw": torch.tensor([image.grid for image in images], device=device),
                    "mm_encoder_outputs": {"image": self._tower_output(images)},
                }
                if images
                else {}
            ),
        )
        return cast(Tensor, output[:, input_ids.shape[1] :])

    def _tower_output(self, images: Sequence[ImageMaps]) -> BaseModelOutputWithPooling:
        """What `get_image_features` gives for these images together: a tuple of tensors for every map."""
        hidden = self.base.config.get_text_config().hidden_size
        pooled, *deepstack = zip(*(image.values.split(hidden, dim=1) for image in images), strict=True)
        if not deepstack:
            return BaseModelOutputWithPooling(pooler_output=pooled)
        return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=deepstack)


def why_stock(base: PreTrainedModel) -> str | None:
    """Say why a model cannot answer by packed prompts and CUDA graphs; None: it can."""
    if base.device.type != "cuda":
        return f"CUDA graphs need a GPU, this is a {base.device.type}"
    if torch.are_deterministic_algorithms_enabled():
        return "the run is deterministic"
    kinds = getattr(base.config.get_text_config(), "layer_types", None) or ()
    if not is_known(base) or {*kinds} - {"full_attention"}:
        return f"not known for layers of {base.config.model_type}"
    return None


def greedy(model: PreTrainedModel, processor: ProcessorMixin, max_new_tokens: int) -> GenerationConfig:
    """Return a generation configuration with the ends of the model's own: no sampling, no repetition penalty."""
    own, tokenizer = model.generation_config, processor.tokenizer
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _with_visual_tokens(prompt: str, counts: Sequence[int], token: str) -> str:
    """With the token of each image repeated for its visual tokens."""
    first, *rest = prompt.split(token)
    return first + "".join(token * count + text for count, text in zip(counts, rest, strict=True))
