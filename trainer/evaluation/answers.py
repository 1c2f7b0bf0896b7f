"""The questions of a split, and a model on one device that answers them."""

import contextlib
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypedDict, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from launch.errors import ConfigError
from launch.inputs.dataset_index import SPLITS
from trainer.data.encoder import Encoder
from trainer.data.images import decode_image
from trainer.data.row_errors import naming_row
from trainer.data.splits import Rows
from trainer.evaluation.request import EvaluationTask

CACHE_BYTES = 2 << 30  # of image features on the device


@dataclass(frozen=True)
class Question:
    """One row of the split. `prompt` is the text of training up to where the answer begins.

    `prompts`: the same with other system messages, by the suffix of who is asked so; `image`: a digest of its image.
    """

    row: int
    query: str
    label: tuple[str, ...]
    human_or_machine: int | None
    prompt: str
    image_row: int  # the first of the rows asked that shows these images, this one included
    text_tokens: int
    visual_tokens: int
    images: int = 1
    image: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)

    def prompt_of(self, suffix: str) -> str:
        """Return the prompt with the system message that a suffix stands for."""
        return self.prompts[suffix] if suffix else self.prompt


class Answer(TypedDict):
    """What one model said to the question of one row, looking at the image of row `image_row`."""

    model: str
    row: int
    image_row: int
    prediction: str


# The questions: the same on every rank ---------------------------------------------------


def evenly_spaced(total: int, wanted: int | None) -> list[int]:
    """Return `wanted` positions of `total`, evenly spaced (all of them when None or more than there are)."""
    count = total if wanted is None else min(wanted, total)
    return [position * total // count for position in range(count)]


def read_questions(
    task: EvaluationTask,
    processor: ProcessorMixin,
    rows: Rows,
    messages: Mapping[str, str | None] = MappingProxyType({}),
) -> list[Question]:
    """Return the questions of the split, with the training prompt; rows that `prepare` dropped are left out.

    `messages`: other system messages that are wanted too, by the suffix that stands for them.
    """
    recipe, request = task.recipe, task.request
    split = task.index.splits[request.split]
    if not len(split):
        raise ConfigError(f"--split {request.split}: has no rows; choose one of {', '.join(SPLITS)}")
    encoder = Encoder(processor, recipe.data.system_message, recipe.data.loss)
    others = {suffix: replace(encoder, system_message=message) for suffix, message in messages.items()}
    questions, first_rows = [], dict[str, int]()
    for sample in evenly_spaced(len(split), request.max_samples):
        number = int(split.rows[sample])
        with naming_row(f"data: row {number} of the split"):
            row = rows[number]
            prompt = encoder.texts(row)[0]
            prompts = {suffix: other.texts(row)[0] for suffix, other in others.items()}
        image = row.images_digest
        questions.append(
            Question(
                row=number,
                query=row.query,
                label=tuple(row.label),
                human_or_machine=row.human_or_machine,
                prompt=prompt,
                image_row=first_rows.setdefault(image, number),
                text_tokens=int(split.text_tokens[sample]),
                visual_tokens=int(split.visual_tokens[sample]),
                images=len(row.images),
                image=image,
                prompts=prompts,
            )
        )
    return questions


def other_images(questions: Sequence[Question], seed: int = 0) -> list[int]:
    """Return, for every question, the position of one with other images, as many; the same for every call.

    The distinct images are put into one seeded cycle and each is replaced by its successor, so no question
    keeps its image, also where several questions share one. Questions without an image, and the only one with so many,
    stay as they are.
    """
    first: dict[int, dict[int, int]] = {}
    for position, question in enumerate(questions):
        first.setdefault(question.images, {}).setdefault(question.image_row, position)
    if not any(len(of_count) > 1 for count, of_count in first.items() if count):
        raise ConfigError("--models shuffled: all questions are on one image; ask more (--max-samples)")
    successor: dict[int, int] = {}
    for count in sorted(first):
        cycle = list(first[count])
        if count:
            random.Random(seed).shuffle(cycle)
            successor |= zip(cycle, cycle[1:] + cycle[:1], strict=True)
        else:
            successor |= zip(cycle, cycle, strict=True)
    return [first[question.images][successor[question.image_row]] for question in questions]


def make_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return positions in batches of similar length, the longest first: the same for every number of ranks."""
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


# One replica -----------------------------------------------------------------------------


_Maps = tuple[Tensor, ...]
"""Features [V, hidden] of an image: what enters the embeddings, then what enters decoder layers (Qwen3-VL's)."""


@dataclass
class Replica:
    """A model that answers, on one device, and the tower's outputs for the images it has lately seen.

    `synced`: its layers wait for those of the other ranks, so all generate as many tokens.
    """

    model: PreTrainedModel | PeftModel
    processor: ProcessorMixin
    rows: Rows
    max_new_tokens: int
    compute_dtype: torch.dtype
    synced: bool = False
    _features: OrderedDict[int, list[tuple[_Maps, Tensor]]] = field(default_factory=OrderedDict)

    @property
    def base(self) -> PreTrainedModel:
        """Return the model without PEFT's wrapper."""
        model = self.model
        return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)

    def forget_trained_features(self) -> None:
        """Drop what a tower with LoRA has computed, before another adapter, or none, answers: its features are that
        adapter's.
        """
        if any("lora_" in name for name, _ in self.base.model.visual.named_parameters()):
            self._features.clear()

    @torch.no_grad()
    def image_features(self, image_row: int) -> list[tuple[_Maps, Tensor]]:
        """Return, for each of a row's images, its maps of features [V, hidden] and its grid [1, 3]; each is encoded
        alone, so no batch changes them.

        In the tower's own dtype, as in training (`trainer.model.vision`).
        """
        if image_row in self._features:
            self._features.move_to_end(image_row)
            return self._features[image_row]
        with naming_row(f"data: row {image_row} of the split"):
            features = [self._encode(image) for image in self.rows[image_row].images]
        self._features[image_row] = features
        size = sum(len(maps) * maps[0].nbytes for maps, _ in features)
        while len(self._features) * size > CACHE_BYTES:
            self._features.popitem(last=False)
        return features

    def _encode(self, image: bytes) -> tuple[_Maps, Tensor]:
        device = self.base.device
        encoded = self.processor.image_processor(images=[decode_image(image)], return_tensors="pt")
        encoded = encoded.to(device)
        grid: Tensor = encoded["image_grid_thw"]
        with torch.autocast(device.type, enabled=False):
            output = self.base.get_image_features(encoded["pixel_values"], grid, return_dict=True)
        deepstack = [parts[0] for parts in getattr(output, "deepstack_features", None) or ()]
        return (output.pooler_output[0], *deepstack), grid

    @torch.no_grad()
    def answers(self, prompts: Sequence[str], image_rows: Sequence[int]) -> list[str]:
        """Return greedy answers, each to a prompt about the images of a row."""
        of_prompts = [self.image_features(row) for row in image_rows]
        images = [image for of_prompt in of_prompts for image in of_prompt]
        token = self.processor.image_token
        texts = [
            _with_visual_tokens(prompt, token, [len(maps[0]) for maps, _ in of_prompt])
            for prompt, of_prompt in zip(prompts, of_prompts, strict=True)
        ]
        device = self.base.device
        encoded = self.processor.tokenizer(
            texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
        ).to(device)
        input_ids: Tensor = encoded["input_ids"]
        half = self.compute_dtype != torch.float32
        with torch.autocast(device.type, self.compute_dtype) if half else contextlib.nullcontext():
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=encoded["attention_mask"],
                mm_token_type_ids=(input_ids == self.processor.image_token_id).int(),
                generation_config=greedy(self.base, self.processor, self.max_new_tokens),
                synced_gpus=self.synced,
                **(
                    {
                        "image_grid_thw": torch.cat([grid for _, grid in images]),
                        "mm_encoder_outputs": {"image": _tower_output([maps for maps, _ in images])},
                    }
                    if images
                    else {}
                ),
            )
        new = output[:, input_ids.shape[1] :]
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]


def greedy(model: PreTrainedModel, processor: ProcessorMixin, max_new_tokens: int) -> GenerationConfig:
    """Return a generation configuration with nothing but the ends of the model's own: no sampling, no repetition
    penalty.
    """
    own, tokenizer = model.generation_config, processor.tokenizer
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tower_output(images: Sequence[_Maps]) -> BaseModelOutputWithPooling:
    """What `get_image_features` gives for these images together: a tuple of tensors for every map."""
    pooled, *deepstack = zip(*images, strict=True)
    if not deepstack:
        return BaseModelOutputWithPooling(pooler_output=pooled)
    return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=deepstack)


def _with_visual_tokens(prompt: str, token: str, counts: Sequence[int]) -> str:
    """With the token of each image repeated for its visual tokens."""
    first, *rest = prompt.split(token)
    return first + "".join(token * count + text for count, text in zip(counts, rest, strict=True))
