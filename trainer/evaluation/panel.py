"""Models that are asked about images by hand: the base, its adapters, a merged model, loaded once each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from peft import PeftModel
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from launch.errors import ConfigError
from launch.planning.make_plan import compute_dtype_of
from launch.recipe.schema import Recipe
from launch.untrusted_files import TABLE, UNREADABLE, printable, read_bytes, reason_of
from trainer.data.encoder import Encoder
from trainer.data.images import decode_image, refuse_stripe
from trainer.data.row_errors import RowError
from trainer.data.rows import IMAGE, Turn, chat
from trainer.evaluation.loading import answering_as, load_stored, load_with_adapters
from trainer.evaluation.request import EvaluationRequest, Variant, variants_of
from trainer.generation.replica import greedy
from trainer.model.base import RECIPE_DTYPES
from trainer.pretrained import load_processor

Model: TypeAlias = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class Respondent:
    """A name that answers. `model` is shared by all that stand on the same base."""

    variant: Variant
    model: Model
    compute_dtype: torch.dtype

    @property
    def name(self) -> str:
        """The name of the variant, as `--models` has it."""
        return self.variant.name


@dataclass(frozen=True)
class Panel:
    """All that are asked, in the order of the request, with one processor."""

    respondents: tuple[Respondent, ...]
    processor: ProcessorMixin
    max_new_tokens: int
    _encoder: Encoder = field(repr=False)

    def refuse_question(self, question: str) -> None:
        """Raise ConfigError for a question that is empty, or that the model would read as structure."""
        if not question.strip():
            raise ConfigError("QUESTION: is empty; ask something")
        if match := self._encoder.control_tokens.search(question):
            raise ConfigError(
                f"QUESTION: holds the special token {match[0]}, which the model does not read as text; take it out"
            )

    @torch.no_grad()
    def answer(
        self,
        respondent: Respondent,
        images: Sequence[Image.Image],
        question: str,
        streamer: BaseStreamer | None = None,
    ) -> str:
        """Return the greedy answer of one model about all images together; `streamer` is handed the tokens as they
        come.
        """
        model = respondent.model
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        turn = Turn("user", (*[IMAGE] * len(images), question))
        messages = chat(respondent.variant.system_message, [turn])
        prompt = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(
            text=[prompt], images=list(images), return_tensors="pt", add_special_tokens=False
        ).to(base.device)
        half = respondent.compute_dtype != torch.float32
        config = greedy(base, self.processor, self.max_new_tokens)
        with (
            torch.autocast(base.device.type, respondent.compute_dtype) if half else nullcontext(),
            answering_as(model, respondent.variant),
        ):
            output = model.generate(**inputs, generation_config=config, streamer=streamer)
        new = output[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.decode(new, skip_special_tokens=True).strip())


def seat(
    request: EvaluationRequest, recipe: Recipe, telling: Callable[[str], None] = lambda _: None
) -> Panel:
    """Load every model that is asked; base and adapters are one model. `telling` hears what is loaded.

    Raises:
        SamestepError: something is missing or does not fit.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(recipe)
    variants = variants_of(request, recipe)
    on_base = [variant for variant in variants if not variant.is_merged]
    loaded: dict[bool, tuple[Model, torch.dtype]] = {}
    if on_base:
        telling(recipe.model.name_or_path)
        loaded[False] = load_with_adapters(recipe, device, on_base), RECIPE_DTYPES[compute_dtype_of(recipe)]
    if len(on_base) < len(variants):
        telling(str(request.run.merged))
        merged = load_stored(request.run.merged, device)
        loaded[True] = merged, merged.dtype
    respondents = tuple(Respondent(variant, *loaded[variant.is_merged]) for variant in variants)
    encoder = Encoder(processor, recipe.data.system_message, recipe.data.loss)
    return Panel(respondents, processor, recipe.evaluation.max_new_tokens, encoder)


def read_image(file: Path) -> Image.Image:
    """Return an image in RGB as the training would see it. ConfigError, which names the file."""
    try:
        image = decode_image(read_bytes(file, TABLE))
        refuse_stripe(image.height, image.width)
        return image
    except UNREADABLE as error:
        raise ConfigError(f"IMAGE: {printable(str(file))} cannot be read ({reason_of(error)})") from error
    except RowError as error:
        raise ConfigError(f"IMAGE: {printable(str(file))}: {error}; give another image") from error
