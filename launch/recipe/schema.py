"""The recipe: what is trained. Never names a GPU count.

Keys keep the names of the Hugging Face libraries (BitsAndBytesConfig, LoraConfig, SFTConfig), to be looked up there.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from launch.errors import ConfigError
from launch.option_values import NAME_PATTERN, place
from launch.recipe.split_names import FORMS as SPLIT_FORMS
from launch.recipe.split_names import parse_split

EMBEDDED = "embedded"  # as a model or dataset: the tiny one that is built here, whatever folders there are
_REVISION = r"[A-Za-z0-9_][A-Za-z0-9_./+@-]{0,254}"  # of git's names for a branch, those that the hub takes


def _number(value: object) -> object:
    """YAML 1.1 reads 2e-4 as text; a field that wants a float understands it."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Real = Annotated[float, BeforeValidator(_number)]


class Section(BaseModel):
    """Frozen, strict about types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model."""

    name_or_path: str = Field(min_length=1, description="a hub id, a local folder, or `embedded`")
    revision: str = Field("main", min_length=1, description="a branch, tag or commit of the hub repository")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="the dtype of weights not quantized"
    )
    resident_weights: bool | Literal["auto"] = Field(
        "auto",
        description="true: 4-bit weights are held dequantized, for speed; false; `auto`: where memory allows",
    )
    products: Literal["bf16", "fp8"] = Field(
        "bf16",
        description="of the language model's frozen linear layers. fp8: 8 bits, one scale a token; on GPUs of compute "
        "capability 8.9 and up, about 1.4 times as fast; other numbers",
    )


class QuantizationSection(Section):
    """BitsAndBytesConfig of the frozen base; how the packed bytes are stored belongs to the plan."""

    load_in_4bit: bool = Field(True, description="true: a base in 4 bits (QLoRA); false: plain LoRA")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="a 4-bit data type")
    bnb_4bit_use_double_quant: bool = Field(
        True, description="true: quantize the constants too; false: keep them"
    )
    bnb_4bit_compute_dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="the dtype of the products"
    )


ModulePattern = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]
"""The end of a module's path. PEFT takes it for a regular expression; of those only names are allowed."""


class LoraSection(Section):
    """LoraConfig: the trained weights, always in fp32."""

    r: int = Field(8, ge=1, le=4096, description="a rank: a whole number from 1 to 4096")
    lora_alpha: int = Field(16, ge=1, description="a scale: a whole number of at least 1")
    lora_dropout: Real = Field(0.05, ge=0, lt=1, description="a dropout share from 0 to below 1")
    bias: Literal["none"] = Field("none", description="`none`: biases are not trained")
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = Field(
        default=["q_proj", "v_proj"],
        description="a list of module names, or `all-linear`: every linear layer of the decoder",
    )
    use_rslora: bool = Field(False, description="true: scale by alpha / sqrt(r); false: by alpha / r")
    use_dora: bool = Field(False, description="true: train the length of each row too (DoRA); false: LoRA")
    rank_pattern: dict[ModulePattern, Annotated[int, Field(ge=1, le=4096)]] = Field(
        default={}, description="a map from module names to ranks, for layers whose rank is not `r`"
    )
    alpha_pattern: dict[ModulePattern, Annotated[int, Field(ge=1)]] = Field(
        default={},
        description="a map from module names to scales, for layers whose scale is not `lora_alpha`",
    )


class DataSection(Section):
    """The rows, and how they become a chat."""

    dataset: str = Field(
        min_length=1, description="a hub id, a local folder of parquet, JSONL or CSV files, or `embedded`"
    )
    revision: str = Field("main", min_length=1, description="a branch, tag or commit of the hub dataset")
    format: Literal["auto", "chartqa", "messages", "columns"] = Field(
        "auto",
        description="`chartqa`; `messages`: chats; `columns`: question and answer by data.columns; `auto`: as seen",
    )
    columns: dict[Literal["image", "query", "label", "human_or_machine"], str] | None = Field(
        None,
        description="a map from image, query and label to the names of the columns, or null: the usual names",
    )
    train: str = Field("train", description="a split: train, train[:10%], train[10%:90%] or train[:200]")
    validation: str | None = Field(
        "val", description="a split: val, train[90%:], `train, 5 %` (drawn out of train), or null: none"
    )
    test: str | None = Field("test", description="a split: test, test[:10%] or test[:200], or null: none")
    system_message: str | None = Field(
        description="the first message of every chat that has none of its own, or null: none"
    )
    chat_template: str | None = Field(
        None, description="a file with a chat template (Jinja), or null: the base model's own"
    )
    loss: Literal["answer", "all_answers", "sequence"] = Field(
        "answer",
        description="the targets: the last answer's tokens, those of every answer, or every token",
    )
    on_bad_row: Literal["error", "drop"] = Field("error", description="what happens about unusable rows")
    max_pixels: int | None = Field(
        None, ge=784, description="an area of at least 784 pixels, or null: the processor's"
    )
    min_pixels: int | None = Field(
        None, ge=784, description="an area of at least 784 pixels, or null: the processor's"
    )
    vision_cache: Literal["off", "memory", "disk"] = Field(
        "off",
        description="where the vision tower's features are kept: `off`, `memory` until the run ends, or `disk`",
    )


class BatchSection(Section):
    """One optimizer step."""

    global_batch_size: int = Field(32, ge=1, description="the samples of one optimizer step, at least 1")
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="the most tokens of a packed micro-batch (a whole number of at least 1), or `auto`",
    )


class TrainingSection(Section):
    """The SFTConfig fields a recipe may set; `deterministic` and how checkpointing recomputes are ours."""

    num_train_epochs: Real = Field(3.0, gt=0, description="a number of passes over the data, above 0")
    max_steps: int = Field(-1, ge=-1, description="a number of steps, at least 1 (-1: by num_train_epochs)")
    learning_rate: Real = Field(2e-4, gt=0, lt=10, description="a peak rate above 0 and below 10")
    optim: Literal["adamw_torch_fused", "adamw_torch"] = Field(
        "adamw_torch_fused", description="one of torch's AdamW"
    )
    weight_decay: Real = Field(0.0, ge=0, le=1, description="a number from 0 to 1")
    adam_beta1: Real = Field(0.9, ge=0, lt=1, description="a number from 0 to below 1")
    adam_beta2: Real = Field(0.999, ge=0, lt=1, description="a number from 0 to below 1")
    adam_epsilon: Real = Field(1e-8, gt=0, description="a number above 0")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = Field("linear", description="a shape of the learning rate")
    lr_scheduler_kwargs: dict[str, int | float | str] | None = Field(
        None, description="the scheduler's arguments, or null"
    )
    warmup_steps: Real = Field(
        0.03, ge=0, description="a share of the steps below 1, a whole number of steps from 1 on"
    )
    max_grad_norm: Real = Field(0.3, ge=0, description="a norm that gradients are scaled down to (0: never)")
    seed: int = Field(42, ge=0, lt=2**32, description="a whole number from 0 to 2**32 - 1")
    logging_steps: int = Field(10, ge=1, description="the steps between two lines of progress, at least 1")
    gradient_checkpointing: bool | Annotated[int, Field(ge=2)] | Literal["auto"] = Field(
        "auto",
        description="true: recompute every decoder layer; n: every n-th (at least 2); false: none; `auto`: by memory",
    )
    dataloader_num_workers: Annotated[int, Field(ge=0, le=64)] | Literal["auto"] = Field(
        "auto", description="data workers of each process (0: none), or `auto`: by the cores it may use"
    )
    deterministic: bool = Field(False, description="true: bit-exact repetition on a GPU; false: faster")


class CheckpointSection(Section):
    """When resumable state is published."""

    every_steps: int = Field(20, ge=1, description="the steps between checkpoints, at least 1")
    keep: int = Field(3, ge=2, description="the number of valid checkpoints that stay, at least 2")
    keep_best: Literal["eval_loss", "accuracy"] | None = Field(
        None,
        description="the metric whose best evaluation is saved, stays and becomes adapter-best/, or null: none does",
    )
    first_step: bool = Field(
        False,
        description="true: save after the first step of every attempt too, to see that saving works; false",
    )
    format: Literal["auto", "portable", "sharded"] = Field(
        "auto",
        description="`portable`: one small file; `sharded`: every rank writes its part; `auto`: sharded from 1 GB on",
    )


class EvaluationSection(Section):
    """Loss on the validation split during training, answers on a split by `samestep evaluate`."""

    every_steps: int = Field(10, ge=1, description="the steps between validation losses, at least 1")
    max_samples: int = Field(192, ge=1, description="the validation samples of each time, at least 1")
    metrics: Annotated[list[str], Field(min_length=1)] | Literal["auto"] = Field(
        "auto",
        description="a list of relaxed_accuracy, exact_match, anls, token_f1 or module:function, or `auto`",
    )
    answers: int = Field(
        0, ge=0, description="the validation answers that are generated and scored during training (0: none)"
    )
    answers_every: int = Field(
        1, ge=1, description="of how many evaluations one scores answers, at least 1; the last one does"
    )
    early_stop: int = Field(
        0, ge=0, description="the evaluations in a row without gain that end the run (0: it is not ended)"
    )
    max_new_tokens: int = Field(32, ge=1, description="the longest answer in tokens, at least 1")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="the prompts generated together (a whole number of at least 1), or `auto`"
    )


Tracker = Literal["trackio", "wandb", "tensorboard", "mlflow"]


class TrackingSection(Section):
    """Where figures are shown besides metrics.jsonl."""

    report_to: Tracker | Literal["none"] | Annotated[list[Tracker], Field(min_length=1)] = Field(
        "trackio", description="trackio, wandb, tensorboard, mlflow, a list of them, or `none`"
    )
    project: str = Field("samestep", min_length=1, description="a name of the tracker's project")
    space_id: str | None = Field(None, description="a Hugging Face Space for trackio, or null: local only")

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        """Every tracker once, in the order of the recipe."""
        if isinstance(self.report_to, list):
            return tuple(dict.fromkeys(self.report_to))
        return () if self.report_to == "none" else (self.report_to,)


class HubSection(Section):
    """Upload of the adapter when the run is done, and of checkpoints while it is under way."""

    push: bool = Field(False, description="true: upload the adapter when the run is done; false: do not")
    repo_id: str | None = Field(None, description="owner/name on the hub, or null")
    private: bool = Field(True, description="true: a new repository is private; false: everybody can read it")
    every_checkpoints: int = Field(
        0, ge=0, description="the checkpoints between two uploads to `last-checkpoint/`; 0: none is uploaded"
    )


class Recipe(Section):
    """Everything that says what is trained."""

    name: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")] = Field(
        description="up to 100 letters, digits, '.', '_' or '-', the first a letter or digit"
    )
    model: ModelSection
    quantization: QuantizationSection = QuantizationSection()
    lora: LoraSection = LoraSection()
    data: DataSection
    batch: BatchSection = BatchSection()
    training: TrainingSection = TrainingSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    tracking: TrackingSection = TrackingSection()
    hub: HubSection = HubSection()

    @model_validator(mode="after")
    def _values_fit_each_other(self) -> "Recipe":
        if problems := list(_contradictions(self)):
            raise ValueError("\n".join(problems))
        return self


def _contradictions(recipe: Recipe) -> Iterator[str]:
    """What no single field can see."""
    data, training = recipe.data, recipe.training
    yield from _wrong_splits(data)
    yield from _wrong_metrics(recipe.evaluation.metrics)
    if data.validation is None and (recipe.evaluation.answers or recipe.evaluation.early_stop):
        yield "evaluation.answers: there is no validation split to ask (data.validation: null); name one"
    if data.columns is not None and data.format not in ("auto", "columns"):
        yield f"data.columns: is for data.format: columns, not {data.format}; drop one of the two"
    if data.min_pixels and data.max_pixels and data.min_pixels > data.max_pixels:
        yield f"data.min_pixels: above max_pixels ({data.min_pixels} > {data.max_pixels}); swap or drop one"
    if training.max_steps == 0:
        yield "training.max_steps: 0 steps train nothing; give at least 1, or -1 for num_train_epochs"
    if training.warmup_steps >= 1 and not training.warmup_steps.is_integer():
        yield (
            f"training.warmup_steps: not a whole number of steps ({training.warmup_steps}); "
            "give a whole number, or a share of the steps below 1"
        )
    if training.lr_scheduler_type == "constant" and training.warmup_steps:
        yield (
            f"training.warmup_steps: `constant` would ignore the warm-up ({training.warmup_steps}); "
            "use lr_scheduler_type: constant_with_warmup, or warmup_steps: 0"
        )
    if recipe.checkpoint.keep_best == "accuracy" and not recipe.evaluation.answers:
        yield (
            "checkpoint.keep_best: accuracy is not measured during training (evaluation.answers: 0); set "
            "evaluation.answers, or keep_best: eval_loss"
        )
    yield from _wrong_names(recipe)
    if recipe.hub.push and not recipe.hub.repo_id:
        yield "hub.repo_id: missing while hub.push is true; give owner/name, or set hub.push: false"


def _wrong_splits(data: DataSection) -> Iterator[str]:
    for key in ("train", "validation", "test"):
        split = getattr(data, key)
        try:
            drawn = split is not None and parse_split(split).share > 0
        except ValueError as error:
            yield f"data.{key}: {split!r} {error}; write {SPLIT_FORMS}"
            continue
        if drawn and key == "train":
            yield f"data.train: {split!r} draws rows to be left out of training; write it as data.validation"
    if data.validation is not None and data.validation == data.test and "," in data.validation:
        yield "data.test: draws the same rows as data.validation; name another split, or null"


METRICS = ("relaxed_accuracy", "exact_match", "anls", "token_f1")


def _wrong_metrics(names: list[str] | str) -> Iterator[str]:
    for name in () if names == "auto" else names:
        module, colon, function = name.rpartition(":")
        if name not in METRICS and not (colon and module and function.isidentifier()):
            yield (
                f"evaluation.metrics: {name!r} is not {', '.join(METRICS)} or module:function; write for example "
                "scores:close for the function close in scores.py beside the recipe"
            )


def _wrong_names(recipe: Recipe) -> Iterator[str]:
    """What no folder and nothing on the hub can be called."""
    for key, name in (
        ("model.name_or_path", recipe.model.name_or_path),
        ("data.dataset", recipe.data.dataset),
    ):
        if name == EMBEDDED:
            continue
        try:
            path = place(key)(name)
        except ConfigError as error:
            yield str(error)
            continue
        is_path = name.startswith((".", "/", "~")) or path.is_dir()
        if not is_path and (wrong := _not_of_the_hub(name)):
            yield f"{key}: {name!a} is not a folder here and not a hub id (owner/name: {wrong}); correct the name"
    for key, id_ in (("hub.repo_id", recipe.hub.repo_id), ("tracking.space_id", recipe.tracking.space_id)):
        if id_ is not None and (wrong := _not_of_the_hub(id_)):
            yield f"{key}: {id_!a} is not a hub id (owner/name: {wrong}); correct the name"
    for key, revision in (("model.revision", recipe.model.revision), ("data.revision", recipe.data.revision)):
        if not re.fullmatch(_REVISION, revision, re.ASCII) or ".." in revision or "//" in revision:
            yield f"{key}: {revision!a} can be no branch, tag or commit; give one, such as main"
    project = recipe.tracking.project
    if not project.isprintable() or not project.strip() or len(project) > 200:
        yield f"tracking.project: {project[:60]!a} cannot be a name ({len(project)} characters); give at most 200"


def _not_of_the_hub(name: str) -> str | None:
    """The hub's own rule, which huggingface_hub applies before any request; None: it can be an id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # has no __all__

    try:
        validate_repo_id(name)
    except HFValidationError:
        return "1 to 96 of letters, digits, -, _ and . each, no -- or .., not .git at the end"
    return None


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()


_LATER: dict[str, Any] = {
    "data.format": "auto",
    "data.columns": None,
    "data.chat_template": None,
    "evaluation.metrics": "auto",
    "lora.use_rslora": False,
    "lora.use_dora": False,
    "lora.rank_pattern": {},
    "lora.alpha_pattern": {},
}
"""Keys that recipes of older versions do not have, with the values that mean what those versions did."""


def later_values(recipe: Recipe) -> set[str]:
    """Dotted keys that say nothing an older version did not mean: no fingerprint counts them."""
    return {
        key
        for key, value in _LATER.items()
        if getattr(getattr(recipe, key.partition(".")[0]), key.partition(".")[2]) == value
    }


def altering_values(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value of everything that alters the numbers of a run: equal values, same run."""
    values = recipe.model_dump(mode="json")
    flat = {
        f"{section}.{key}": value
        for section in values
        if isinstance(values[section], dict)
        for key, value in values[section].items()
    }
    harmless = {
        "data.on_bad_row",
        "data.vision_cache",
        "model.resident_weights",
        "batch.micro_batch_tokens",
        "training.logging_steps",
        "training.gradient_checkpointing",
        "training.dataloader_num_workers",
    }
    harmless |= later_values(recipe)
    if (
        recipe.data.chat_template is not None
    ):  # where it lies is no matter: its content is part of the identity
        flat["data.chat_template"] = Path(recipe.data.chat_template).name
    if recipe.model.products == "bf16":
        harmless.add("model.products")  # as in the runs of before there was a choice
    sections = ("model.", "quantization.", "lora.", "data.", "batch.", "training.")
    return {key: value for key, value in flat.items() if key.startswith(sections) and key not in harmless}


def recipe_fingerprint(recipe: Recipe) -> str:
    """sha256 of the altering values, hexadecimal."""
    return hashlib.sha256(json.dumps(altering_values(recipe), sort_keys=True).encode()).hexdigest()
