"""Answers of packed prompts and a static cache held against `model.generate` for one prompt at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from launch.recipe.loading import recipe_from_dict
from tests.helpers.chats import chats_recipe, write_chats
from tests.helpers.tiny_families import write_tiny
from trainer.data.encoder import Encoder
from trainer.data.images import decode_image
from trainer.data.rows import Row
from trainer.data.splits import open_split
from trainer.generation.replica import Replica
from trainer.model.base import RECIPE_DTYPES, load_base, prepare_answers
from trainer.model.lora import add_lora
from trainer.prepare import prepare
from trainer.pretrained import load_processor

NEW = 9
ADAPTERS = ("default", "other", None)


class AnsweredChats:
    """Chats of none to three images with a model of a family that has two adapters, and the plain answers of both and
    of the base. Half of the answers end early.
    """

    def __init__(
        self, kind: str, world: Path, folder: Path, device: str, dtype: str = "float32", nf4: bool = False
    ) -> None:
        values = chats_recipe(world, write_chats(folder / "data", {"train": 8, "val": 1}))
        values["model"] |= {
            "name_or_path": str(write_tiny(kind, folder / "base", initializer_range=0.3)),
            "dtype": dtype,
        }
        values["quantization"] |= {"load_in_4bit": nf4, "bnb_4bit_compute_dtype": dtype}
        recipe = recipe_from_dict(values)
        prepare(recipe, quiet=True)
        self.processor, self.rows = load_processor(recipe), list(open_split(recipe, "train"))
        assert len({len(row.images) for row in self.rows}) > 2
        encoder = Encoder(self.processor, None, "all_answers")
        self.prompts = [encoder.conversation(row).prompt for row in self.rows]
        self.dtype = RECIPE_DTYPES[dtype]
        self.model: Any = add_lora(load_base(recipe, torch.device(device)), recipe)
        self.model.add_adapter("other", self.model.peft_config["default"])
        torch.manual_seed(3)
        for name, parameter in self.model.eval().named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape).to(parameter.data) * 0.3
        self.base = self.model.get_base_model()
        self._end_early()
        self.expected: list[list[list[int]]] = []
        for adapter in ADAPTERS:
            with self.active(adapter):
                self.expected.append(self._plain())

    def _end_early(self) -> None:
        """Let tokens that are no end of the model's own be one: they stand at different places of the answers."""
        own = self.base.generation_config.eos_token_id
        early = [tokens[2 + n % 5] for n, tokens in enumerate(self._plain()[::2])]
        self.base.generation_config.eos_token_id = [*own, *early]

    def _plain(self) -> list[list[int]]:
        """New tokens of one prompt after the other, as the documentation of transformers has it."""
        return [self._answer(prompt, row) for prompt, row in zip(self.prompts, self.rows, strict=True)]

    def _answer(self, prompt: str, row: Row) -> list[int]:
        images = [decode_image(image) for image in row.images] or None
        inputs = self.processor(text=[prompt], images=images, return_tensors="pt").to(self.base.device)
        with torch.autocast(self.base.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens

    def active(self, adapter: str | None) -> AbstractContextManager[Any]:
        """Return a context in which an adapter answers, or none."""
        if adapter is None:
            return self.model.disable_adapter()  # type: ignore[no-any-return]
        self.model.set_adapter(adapter)
        return nullcontext()

    def fast(self) -> Replica:
        """Return the model as it answers by packed prompts, on a GPU by CUDA graphs."""
        prepare_answers(self.base, self.dtype)
        rows: Any = self.rows
        return Replica(self.model, self.processor, rows, NEW, self.dtype, stock=None)

    def check(self, replica: Replica) -> None:
        """Hold a replica against the plain answers: all prompts together, then two that use the buffers again."""
        for few in (range(len(self.rows)), range(3, 5), range(len(self.rows))):
            for adapter, answers in zip(ADAPTERS, self.expected, strict=True):
                with self.active(adapter):
                    mine = replica.answers([self.prompts[n] for n in few], few)
                texts = self.processor.tokenizer.batch_decode(
                    [answers[n] for n in few], skip_special_tokens=True
                )
                assert mine == [text.strip() for text in texts], (adapter, few)
