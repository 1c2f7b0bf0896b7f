"""The recipe: what is trained. Never names a GPU count.

Keys keep the names of the Hugging Face libraries (BitsAndBytesConfig, LoraConfig, SFTConfig), to be looked up there.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from launch.option_values import NAME_PATTERN
from launch.recipe.contradictions import contradictions


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
        "capability 8.9 and up, 1.3 to 1.4 times as fast; other numbers",
    )
    num_layers_at_start_in_bf16: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="decoder layers, from the first on, that `products: fp8` leaves as they are: their rounding is an "
        "error in the input of all others; `auto`: four, and at most a seventh of all",
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
        min_length=1,
        description="a hub id, a local folder of parquet, JSONL or CSV files (a relative one: from the current "
        "folder), or `embedded`",
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
    micro_batch_tokens: Annotated[int, Field(ge=1, lt=2**31)] | Literal["auto"] = Field(
        "auto",
        description="the most tokens of a packed micro-batch's samples (a whole number of at least 1), or `auto`",
    )
    prefix_sharing: bool = Field(
        True,
        description="true or false: whether the tokens that every prompt begins with (the system message) are computed "
        "once a micro-batch",
    )


class TrainingSection(Section):
    """The SFTConfig fields a recipe may set; `deterministic`, `recheck` and how checkpointing recomputes are ours."""

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
    lr_scheduler_kwargs: dict[str, Annotated[int | float | str, BeforeValidator(_number)]] | None = Field(
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
    recheck: Real = Field(
        0.0,
        ge=0,
        le=1,
        description="a share of the micro-batches from 0 to 1 that another rank computes too, to find faulty hardware",
    )


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
        if problems := list(contradictions(self)):
            raise ValueError("\n".join(problems))
        return self


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()
