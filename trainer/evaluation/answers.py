"""The answers of a run's models to the questions of a split: one rank's replica and its share of the batches.

Every rank holds a replica (generation under sharding hangs on answers of unequal length). The batches do not depend on
the number of ranks, so neither do the answers.
"""

import contextlib
import gc
import hashlib
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypedDict, cast, get_args

import torch
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import GenerationConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from launch.atomic_files import refuse_readonly
from launch.checkpoints.manifest import read_manifest
from launch.errors import ConfigError, RunError
from launch.inputs.dataset_index import SPLITS, Index, SplitName
from launch.planning.make_plan import compute_dtype_of
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from launch.run.merged_model import merge_behind
from trainer.base_files import refuse_unsafe_base
from trainer.data.chartqa import Rows, open_split
from trainer.data.encoder import Encoder
from trainer.data.images import decode_image
from trainer.data.row_errors import naming_row
from trainer.formats.detect import SHARDS, read_sharded
from trainer.formats.portable import load_adapter, put_adapter
from trainer.model.base import DTYPES, add_lora, load_base
from trainer.pretrained import load_processor

ModelName = Literal["base", "adapter", "shuffled", "merged"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)
TITLES = {"base": "before", "adapter": "after", "shuffled": "after, images shuffled", "merged": "merged"}
BATCH_SIZE = 64  # of `evaluation.batch_size: auto`; a constant: the company of a question may break a tie
CACHE_BYTES = 2 << 30  # of image features on the device
PATIENCE = timedelta(days=1)  # of a rank that has answered its batches and waits for the others


@dataclass(frozen=True)
class Request:
    """What is asked for.

    `allow`: parts of the run's identity that may differ from the training's. `checkpoint`: the step of the checkpoint
    that is asked instead of the run's last adapter.
    """

    run: RunDirectory
    split: SplitName
    models: tuple[ModelName, ...]
    max_samples: int | None
    allow: tuple[str, ...] = ()
    checkpoint: int | None = None

    @property
    def adapter(self) -> Path:
        """The folder with the adapter."""
        return self.run.adapter if self.checkpoint is None else self.run.checkpoint(self.checkpoint)

    @property
    def file(self) -> Path:
        """Where the answers are kept."""
        return self.run.eval_file(self.split, self.max_samples, self.checkpoint)


@dataclass(frozen=True)
class Question:
    """One row of the split. `prompt` is the text of training up to where the answer begins."""

    row: int
    query: str
    label: tuple[str, ...]
    human_or_machine: int
    prompt: str
    image_row: int  # the first of the rows asked that shows this image, this one included
    text_tokens: int
    visual_tokens: int


@dataclass(frozen=True)
class Task:
    """The request with what it needs."""

    request: Request
    recipe: Recipe
    index: Index


class Answer(TypedDict):
    """What one model said to the question of one row, looking at the image of row `image_row`."""

    model: ModelName
    row: int
    image_row: int
    prediction: str


# The questions: the same on every rank ---------------------------------------------------


def spread(total: int, wanted: int | None) -> list[int]:
    """`wanted` positions of `total`, evenly spaced (all of them when None or more than there are)."""
    count = total if wanted is None else min(wanted, total)
    return [position * total // count for position in range(count)]


def read_questions(task: Task, processor: Qwen2VLProcessor, rows: Rows) -> list[Question]:
    """The questions of the split, with the training prompt; rows that `prepare` dropped are left out."""
    recipe, request = task.recipe, task.request
    split = task.index.splits[request.split]
    if not len(split):
        raise ConfigError(f"--split {request.split}: has no rows; choose one of {', '.join(SPLITS)}")
    encoder = Encoder(processor, recipe.data.system_message, recipe.data.loss)
    questions, first_rows = [], dict[str, int]()
    for sample in spread(len(split), request.max_samples):
        number = int(split.rows[sample])
        with naming_row(f"data: row {number} of the split"):
            row = rows[number]
            prompt = encoder.texts(row)[0]
        questions.append(
            Question(
                row=number,
                query=row.query,
                label=tuple(row.label),
                human_or_machine=row.human_or_machine,
                prompt=prompt,
                image_row=first_rows.setdefault(hashlib.sha256(row.image).hexdigest(), number),
                text_tokens=int(split.text_tokens[sample]),
                visual_tokens=int(split.visual_tokens[sample]),
            )
        )
    return questions


def other_images(questions: Sequence[Question], seed: int = 0) -> list[int]:
    """For every question the position of one with another image; the same for every call.

    The distinct images are put into one seeded cycle and each is replaced by its successor, so no question
    keeps its image, also where several questions share one.
    """
    first: dict[int, int] = {}
    for position, question in enumerate(questions):
        first.setdefault(question.image_row, position)
    if len(first) < 2:
        raise ConfigError("--models shuffled: all questions are on one image; ask more (--max-samples)")
    cycle = list(first)
    random.Random(seed).shuffle(cycle)
    successor = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return [first[successor[question.image_row]] for question in questions]


def make_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Positions in batches of similar length, the longest first: the same for every number of ranks."""
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


# One replica -----------------------------------------------------------------------------


@dataclass
class Replica:
    """A model that answers, on one device, and the features of the images it has lately seen."""

    model: Qwen2VLForConditionalGeneration | PeftModel
    processor: Qwen2VLProcessor
    rows: Rows
    max_new_tokens: int
    compute_dtype: torch.dtype
    _features: OrderedDict[int, tuple[Tensor, Tensor]] = field(default_factory=OrderedDict)

    @property
    def base(self) -> Qwen2VLForConditionalGeneration:
        """The model without PEFT's wrapper."""
        model = self.model
        return cast(
            Qwen2VLForConditionalGeneration, model.get_base_model() if isinstance(model, PeftModel) else model
        )

    @torch.inference_mode()
    def image_features(self, image_row: int) -> tuple[Tensor, Tensor]:
        """Features [V, hidden] and grid [1, 3] of a row's image, encoded alone: no batch changes them.

        In the tower's own dtype, as in training (`trainer.model.vision`).
        """
        if image_row in self._features:
            self._features.move_to_end(image_row)
            return self._features[image_row]
        device = self.base.device
        with naming_row(f"data: row {image_row} of the split"):
            image = decode_image(self.rows[image_row].image)
            encoded = self.processor.image_processor(images=[image], return_tensors="pt")
        encoded = encoded.to(device)
        grid: Tensor = encoded["image_grid_thw"]
        with torch.autocast(device.type, enabled=False):
            output = self.base.get_image_features(encoded["pixel_values"], grid, return_dict=True)
        features = output.pooler_output[0]
        self._features[image_row] = features, grid
        while len(self._features) * features.nbytes > CACHE_BYTES:
            self._features.popitem(last=False)
        return features, grid

    @torch.inference_mode()
    def answers(self, prompts: Sequence[str], image_rows: Sequence[int]) -> list[str]:
        """Greedy answers, each to a prompt about the image of a row."""
        images = [self.image_features(row) for row in image_rows]
        token = self.processor.image_token
        texts = [
            prompt.replace(token, token * len(features), 1)
            for prompt, (features, _) in zip(prompts, images, strict=True)
        ]
        device = self.base.device
        encoded = self.processor.tokenizer(
            texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
        ).to(device)
        input_ids: Tensor = encoded["input_ids"]
        pooled = tuple(features for features, _ in images)
        half = self.compute_dtype != torch.float32
        with torch.autocast(device.type, self.compute_dtype) if half else contextlib.nullcontext():
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=encoded["attention_mask"],
                mm_token_type_ids=(input_ids == self.processor.image_token_id).int(),
                image_grid_thw=torch.cat([grid for _, grid in images]),
                mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=pooled)},
                generation_config=self._greedy(),
            )
        new = output[:, input_ids.shape[1] :]
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _greedy(self) -> GenerationConfig:
        """Nothing but the ends of the model's own configuration: no sampling, no repetition penalty."""
        own = self.base.generation_config
        tokenizer = self.processor.tokenizer
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )


Loader = Callable[[Task, Qwen2VLProcessor, Rows, torch.device], Replica]


def load_replica(task: Task, processor: Qwen2VLProcessor, rows: Rows, device: torch.device) -> Replica:
    """The recipe's base, with the run's adapter when it is asked for."""
    recipe, request = task.recipe, task.request
    model: Qwen2VLForConditionalGeneration | PeftModel = load_base(recipe, device)
    if {"adapter", "shuffled"} & set(request.models):
        model = add_lora(model, recipe)
        if (sharded := read_sharded(request.adapter)) is not None:
            put_adapter(model, sharded.tensors, request.adapter / SHARDS)
        else:
            load_adapter(model, request.adapter)
    model.eval()
    return Replica(model, processor, rows, recipe.evaluation.max_new_tokens, DTYPES[compute_dtype_of(recipe)])


def load_merged(task: Task, processor: Qwen2VLProcessor, rows: Rows, device: torch.device) -> Replica:
    """The run's merged model, unquantized, in the dtype it is stored in."""
    refuse_unsafe_base(task.request.run.merged, None)
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        task.request.run.merged,
        dtype="auto",
        device_map={"": device},
        attn_implementation="sdpa",
        local_files_only=True,
        trust_remote_code=False,
    ).eval()
    return Replica(model, processor, rows, task.recipe.evaluation.max_new_tokens, model.dtype)


def check_request(request: Request) -> None:
    """Refuse what is missing before a model is loaded."""
    run, problems = request.run, []
    if not run.recipe_file.is_file():
        raise ConfigError(f"--run-dir {run.path}: has no recipe.yaml; give the directory of a run")
    if request.checkpoint is not None:
        read_manifest(request.adapter, verify=True)
        if "merged" in request.models:
            problems.append(
                f"--models: merged is of the run's last adapter, not of {request.adapter.name}; leave it out"
            )
    elif {"adapter", "shuffled"} & {*request.models} and not (run.adapter / "adapter_config.json").is_file():
        problems.append(f"{run.adapter}: no adapter yet; `samestep run` writes it when the run is done")
    if "merged" in request.models and not (run.merged / "config.json").is_file():
        problems.append(
            f"{run.merged}: no merged model yet; run `samestep merge {run.path} --output {run.merged}`"
        )
    if "merged" in request.models and (behind := merge_behind(run, run.merged)):
        problems.append(behind)
    if problems:
        raise ConfigError(problems)
    refuse_readonly(run.path, "the evaluation")


# All answers of this rank ----------------------------------------------------------------


def answer_all(task: Task, state: PartialState) -> tuple[list[Question], list[Answer]]:
    """The questions, and this rank's share of the answers."""
    request = task.request
    processor = load_processor(task.recipe)
    rows = open_split(task.recipe, request.split)
    questions = read_questions(task, processor, rows)
    others = other_images(questions) if "shuffled" in request.models else []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    answers: list[Answer] = []
    with Progress(*columns, console=Console(stderr=True), disable=not state.is_main_process) as progress:
        for load, models in _loads(request.models):
            description = f"answers of {', '.join(models)}" + (" (rank 0)" if state.num_processes > 1 else "")
            shown = progress.add_task(description, total=None)
            replica = load(task, processor, rows, state.device)
            share = list(_share(task, questions, others, models, state))
            progress.update(shown, total=sum(len(positions) for _, positions in share))
            for model, positions in share:
                answers += _answer(replica, model, questions, others, positions)
                progress.advance(shown, len(positions))
            del replica
            gc.collect()
    return questions, answers


def _loads(models: Sequence[ModelName]) -> Iterator[tuple[Loader, tuple[ModelName, ...]]]:
    """Who answers together: base and adapter are one model, the merged one is loaded after them."""
    if loaded_together := tuple(model for model in models if model != "merged"):
        yield load_replica, loaded_together
    if "merged" in models:
        yield load_merged, ("merged",)


def _share(
    task: Task,
    questions: Sequence[Question],
    others: Sequence[int],
    models: Sequence[ModelName],
    state: PartialState,
) -> Iterator[tuple[ModelName, list[int]]]:
    """This rank's batches. Models that see the same images take turns, while the features are there."""
    chosen = task.recipe.evaluation.batch_size
    size = BATCH_SIZE if chosen == "auto" else chosen
    for looks in (tuple(m for m in models if m != "shuffled"), tuple(m for m in models if m == "shuffled")):
        seen = [questions[other] for other in others] if looks == ("shuffled",) else questions
        lengths = [
            asked.text_tokens + shown.visual_tokens for asked, shown in zip(questions, seen, strict=True)
        ]
        for batch in make_batches(lengths, size)[state.process_index :: state.num_processes]:
            yield from ((model, batch) for model in looks)


def _answer(
    replica: Replica,
    model: ModelName,
    questions: Sequence[Question],
    others: Sequence[int],
    positions: list[int],
) -> list[Answer]:
    looked_at = [questions[others[p] if model == "shuffled" else p].image_row for p in positions]
    prompts = [questions[p].prompt for p in positions]
    without: AbstractContextManager[Any] = contextlib.nullcontext()
    if model == "base" and isinstance(replica.model, PeftModel):
        without = replica.model.disable_adapter()
    try:
        with without:
            predictions = replica.answers(prompts, looked_at)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"evaluation.batch_size: {len(prompts)} prompts are too many for this GPU's memory; "
            "set a smaller one in the run's recipe.yaml"
        ) from error
    return [
        Answer(model=model, row=questions[p].row, image_row=image_row, prediction=prediction)
        for p, image_row, prediction in zip(positions, looked_at, predictions, strict=True)
    ]
