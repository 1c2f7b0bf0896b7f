"""The shape of a Qwen2-VL, from the config.json of its base model: what its bytes are counted from. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.inputs.caches import config_file
from launch.untrusted_files import read_mapping

if TYPE_CHECKING:
    from launch.recipe.schema import Recipe


LAYERS = "model.language_model.layers"
LAYER_LINEARS = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
"""The linear layers of a decoder layer of a Qwen2-VL, and where the layers are (transformers 5.23)."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the language model, then of the vision tower. `patch_values`: numbers in one image patch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied_embeddings: bool
    vision_width: int
    vision_blocks: int
    vision_intermediate: int
    patch_values: int
    patches_per_token: int

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_width(self) -> int:
        """Channels of all keys, or of all values."""
        return self.kv_heads * self.head_width

    @property
    def layer_linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a decoder layer: name -> (outputs, inputs)."""
        hidden, kv, inner = self.hidden, self.kv_width, self.intermediate
        return {
            "q_proj": (hidden, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, hidden),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }

    @property
    def layer_weights(self) -> int:
        """Weights of one decoder layer that are quantized."""
        return sum(outputs * inputs for outputs, inputs in self.layer_linears.values())

    @property
    def tower_weights(self) -> int:
        """Weights of the vision tower's linear layers, which are quantized too: blocks and merger."""
        width, merged = self.vision_width, self.vision_width * self.patches_per_token
        block = 4 * width * width + 2 * width * self.vision_intermediate
        return self.vision_blocks * block + merged * merged + merged * self.hidden

    @property
    def vocabulary_weights(self) -> int:
        """Embeddings and output head, one matrix where they are tied; never quantized."""
        return self.vocabulary * self.hidden * (1 if self.tied_embeddings else 2)

    @property
    def other_weights(self) -> int:
        """Norms, biases and the patch embedding; never quantized."""
        width, merged = self.vision_width, self.vision_width * self.patches_per_token
        layer = 3 * self.hidden + 2 * self.kv_width
        block = 9 * width + self.vision_intermediate
        merger = 2 * width + merged + self.hidden
        rest = self.hidden + merger + width * self.patch_values
        return self.layers * layer + self.vision_blocks * block + rest


def unreached(names: Sequence[str], layers: int | None) -> list[str]:
    """Those of `lora.target_modules` that name no linear layer of a decoder layer, as PEFT compares them.

    A name is the end of a module's path: `q_proj`, `mlp.up_proj`, `layers.3.self_attn.q_proj`. `layers`: how many
    there are, None where that is not known.
    """
    return [name for name in names if not any(_ends_in(linear, name, layers) for linear in LAYER_LINEARS)]


def _ends_in(linear: str, name: str, layers: int | None) -> bool:
    index = re.search(r"(?:^|\.)([0-9]+)\.(?:self_attn|mlp)\.", name)
    if index and (str(int(index[1])) != index[1] or int(index[1]) >= (layers or math.inf)):
        return False
    path = f"{LAYERS}.{index[1] if index else 0}.{linear}"
    return path == name or path.endswith(f".{name}")


def read_shape(recipe: Recipe) -> ModelShape | str:
    """Read the shape of a recipe's base model; or, where its config.json is not here or not understood, why."""
    file = config_file(recipe)
    if file is None:
        return f"config.json of {recipe.model.name_or_path} is not on this machine; `samestep prepare` fetches it"
    try:
        return shape_of(read_mapping(file))
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        return f"{file} cannot be read as a Qwen2-VL's ({type(error).__name__}: {error})"


def shape_of(config: dict[str, Any]) -> ModelShape:
    """Derive the shape from config.json: flat, as on the hub, or with a `text_config`, as transformers 5 writes it.

    Raises KeyError, TypeError or ValueError when it is not a Qwen2-VL's.
    """
    if config["model_type"] != "qwen2_vl":
        raise ValueError(f"a {config['model_type']}, not a qwen2_vl")
    text, vision = config.get("text_config") or config, config["vision_config"]
    width = int(vision["embed_dim"])
    patch = int(vision.get("patch_size", 14))
    channels = int(vision.get("in_channels", vision.get("in_chans", 3)))
    return ModelShape(
        hidden=int(text["hidden_size"]),
        intermediate=int(text["intermediate_size"]),
        layers=int(text["num_hidden_layers"]),
        heads=int(text["num_attention_heads"]),
        kv_heads=int(text["num_key_value_heads"]),
        vocabulary=int(text["vocab_size"]),
        tied_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        vision_width=width,
        vision_blocks=int(vision["depth"]),
        vision_intermediate=int(width * vision.get("mlp_ratio", 4)),
        patch_values=channels * int(vision.get("temporal_patch_size", 2)) * patch * patch,
        patches_per_token=int(vision.get("spatial_merge_size", 2)) ** 2,
    )
