"""The shape of a base model: what its bytes are counted from. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LAYERS = "model.language_model.layers"
TOWER = "model.visual"
LAYER_LINEARS = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
"""The linear layers of a decoder layer, and where the layers are: the same in all families (transformers 5.23)."""


@dataclass(frozen=True)
class TowerLinear:
    """Linear layers of the vision tower that are alike: how many, and their sizes."""

    copies: int
    outputs: int
    inputs: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the language model, then of the vision tower.

    `head_width`: channels of an attention head; `attention_bias`: of queries, keys and values; `query_norm`: queries
    and keys are normalized head by head; `patch_values`: numbers in one image patch; `tower_linears`: by their path in
    the tower, `*` for a number; `vision_gated`: the tower has Qwen2.5-VL's RMSNorm and gated MLP; `deepstack`: mergers
    besides the last; `vision_positions`: learned ones.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied_embeddings: bool
    head_width: int
    vision_width: int
    vision_blocks: int
    vision_intermediate: int
    patch_values: int
    patches_per_token: int
    tower_linears: Mapping[str, TowerLinear] = field(default_factory=dict)
    attention_bias: bool = True
    query_norm: bool = False
    vision_gated: bool = False
    deepstack: int = 0
    vision_positions: int = 0
    patch_bias: bool = False

    @property
    def query_width(self) -> int:
        """Channels of all queries."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Channels of all keys, or of all values."""
        return self.kv_heads * self.head_width

    @property
    def layer_linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a decoder layer: name -> (outputs, inputs)."""
        hidden, query, kv, inner = self.hidden, self.query_width, self.kv_width, self.intermediate
        return {
            "q_proj": (query, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, query),
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
        """Weights of the vision tower's linear layers, which are quantized too: blocks and mergers."""
        return sum(each.copies * each.outputs * each.inputs for each in self.tower_linears.values())

    @property
    def vocabulary_weights(self) -> int:
        """Embeddings and output head, one matrix where they are tied; never quantized."""
        return self.vocabulary * self.hidden * (1 if self.tied_embeddings else 2)

    @property
    def other_weights(self) -> int:
        """Norms, biases, the patch embedding and the tower's positions; never quantized."""
        return self.layers * self._layer_other_weights + self.hidden + self._tower_other_weights

    @property
    def _layer_other_weights(self) -> int:
        biases = self.query_width + 2 * self.kv_width if self.attention_bias else 0
        return 2 * self.hidden + biases + (2 * self.head_width if self.query_norm else 0)

    @property
    def _tower_other_weights(self) -> int:
        width, inner = self.vision_width, self.vision_intermediate
        merged = width * self.patches_per_token
        norm = width if self.vision_gated else 2 * width
        block = 2 * norm + 5 * width + (2 * inner if self.vision_gated else inner)
        mergers = norm + self.deepstack * 2 * merged + (1 + self.deepstack) * (merged + self.hidden)
        patches = width * (self.patch_values + (1 if self.patch_bias else 0))
        return self.vision_blocks * block + mergers + patches + width * self.vision_positions


def unreached(names: Sequence[str], layers: int | None) -> list[str]:
    """Return those of `lora.target_modules` that name no linear layer of a decoder layer, as PEFT compares them.

    A name is the end of a module's path: `q_proj`, `mlp.up_proj`, `layers.3.self_attn.q_proj`. `layers`: how many
    there are, None where that is not known.
    """
    return [name for name in names if not any(_ends_in(linear, name, layers) for linear in LAYER_LINEARS)]


def reached_in_tower(name: str, paths: Mapping[str, int | None]) -> list[str]:
    """The linear layers of the tower that a name of `lora.target_modules` reaches: those of `paths` that it ends.

    A name that reaches a decoder layer is of that alone: Qwen2.5-VL's tower has a `gate_proj` too. `paths`: path in
    the tower, `*` for a number -> how many there are, None where that is not known.
    """
    if not unreached([name], None):
        return []
    numbers = [int(each) for each in re.findall(r"(?<=\.)[0-9]+(?=\.)", f".{name}")]
    general = re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", f".{name}")
    return [
        path
        for path, copies in paths.items()
        if f".{TOWER}.{path}".endswith(general) and all(each < (copies or math.inf) for each in numbers)
    ]


def reached_tower_linears(names: Sequence[str] | str, shape: ModelShape) -> list[str]:
    """The paths of the tower's linear layers that `lora.target_modules` reaches; `all-linear`: none."""
    if isinstance(names, str):
        return []
    paths = {path: linear.copies for path, linear in shape.tower_linears.items()}
    return [path for path in paths if any(path in reached_in_tower(name, paths) for name in names)]


def _ends_in(linear: str, name: str, layers: int | None) -> bool:
    index = re.search(r"(?:^|\.)([0-9]+)\.(?:self_attn|mlp)\.", name)
    if index and (str(int(index[1])) != index[1] or int(index[1]) >= (layers or math.inf)):
        return False
    path = f"{LAYERS}.{index[1] if index else 0}.{linear}"
    return path == name or path.endswith(f".{name}")
