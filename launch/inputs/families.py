"""The kinds of models that can be trained: what the launcher must know of each, torch-free.

What runs on the compute node is in `trainer/model/families/`, one file for each. Another family is an entry here, a
file there, and its tests. transformers 5.23 is the source of all names and sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.inputs.caches import config_file
from launch.inputs.model_shape import ModelShape, TowerLinear, reached_tower_linears
from launch.untrusted_files import UNREADABLE, printable, read_mapping

if TYPE_CHECKING:
    from launch.recipe.schema import Recipe


@dataclass(frozen=True)
class Family:
    """One kind of model.

    `model_type`: as config.json names it; `name`: as people do; `model_class`, `config_class`, `processor_class`: of
    transformers; `shape`: sizes from (config.json, its text part, its vision part).
    """

    model_type: str
    name: str
    model_class: str
    config_class: str
    processor_class: str
    shape: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], ModelShape]


def family_of(config: dict[str, Any]) -> Family:
    """The family of a model by its config.json.

    Raises ValueError, with a sentence for people, when it is none of them.
    """
    kind = config.get("model_type")
    if (family := FAMILIES.get(str(kind))) is not None:
        return family
    if kind in REFUSED_MODEL_TYPES:
        raise ValueError(f"a {kind}: {REFUSED_MODEL_TYPES[str(kind)]}")
    raise ValueError(
        f"a {printable(str(kind))[:60]}, not one of {', '.join(FAMILIES)}; give a model of one of these kinds"
    )


def why_not_trained(recipe: Recipe) -> str | None:
    """Why the base of a recipe is of no family, by its config.json; None where it is of one, or not known here."""
    file = config_file(recipe)
    if file is None:
        return None
    try:
        family_of(read_mapping(file))
    except UNREADABLE:
        return None  # whoever loads it says so
    except ValueError as error:
        return f"{file.parent} is {error}"
    return None


def tower_targets(recipe: Recipe) -> list[str] | None:
    """The linear layers of the vision tower that `lora.target_modules` reaches; None where config.json is not here."""
    shape = read_shape(recipe)
    return None if isinstance(shape, str) else reached_tower_linears(recipe.lora.target_modules, shape)


def read_shape(recipe: Recipe) -> ModelShape | str:
    """The shape of a recipe's base model; or, where its config.json is not here or not understood, why."""
    file = config_file(recipe)
    if file is None:
        return f"config.json of {recipe.model.name_or_path} is not on this machine; `samestep prepare` fetches it"
    try:
        return shape_of(read_mapping(file))
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        return f"{file} cannot be read as a model of a known family ({type(error).__name__}: {error})"


def shape_of(config: dict[str, Any]) -> ModelShape:
    """From config.json: flat, as Qwen2-VL's on the hub, or with a `text_config`, as transformers 5 writes it.

    Raises KeyError, TypeError or ValueError when it is of no family.
    """
    return family_of(config).shape(config, config.get("text_config") or config, config["vision_config"])


def _language_sizes(config: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    heads, hidden = int(text["num_attention_heads"]), int(text["hidden_size"])
    return {
        "hidden": hidden,
        "intermediate": int(text["intermediate_size"]),
        "layers": int(text["num_hidden_layers"]),
        "heads": heads,
        "kv_heads": int(text["num_key_value_heads"]),
        "vocabulary": int(text["vocab_size"]),
        "tied_embeddings": bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        "head_width": hidden // heads,
    }


def _patch_sizes(vision: dict[str, Any], patch: int) -> dict[str, Any]:
    patch = int(vision.get("patch_size", patch))
    channels = int(vision.get("in_channels", vision.get("in_chans", 3)))
    return {
        "vision_blocks": int(vision["depth"]),
        "patch_values": channels * int(vision.get("temporal_patch_size", 2)) * patch * patch,
        "patches_per_token": int(vision.get("spatial_merge_size", 2)) ** 2,
    }


def _tower(
    sizes: dict[str, Any],
    width: int,
    inner: int,
    mlp: tuple[str, ...],
    mergers: dict[str, int],
    ends: tuple[str, str],
) -> dict[str, TowerLinear]:
    """The tower's linear layers: of each block attention and MLP, whose last leads back; two of each merger."""
    blocks, merged = sizes["vision_blocks"], width * sizes["patches_per_token"]
    shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    shapes |= {f"mlp.{name}": (inner, width) for name in mlp[:-1]} | {f"mlp.{mlp[-1]}": (width, inner)}
    linears = {f"blocks.*.{name}": TowerLinear(blocks, *shape) for name, shape in shapes.items()}
    for merger, copies in mergers.items():
        linears[f"{merger}.{ends[0]}"] = TowerLinear(copies, merged, merged)
        linears[f"{merger}.{ends[1]}"] = TowerLinear(copies, sizes["hidden"], merged)
    return linears


def _qwen2_vl(config: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> ModelShape:
    sizes = _language_sizes(config, text) | _patch_sizes(vision, 14)
    width = int(vision["embed_dim"])
    inner = int(width * vision.get("mlp_ratio", 4))
    return ModelShape(
        **sizes,
        vision_width=width,
        vision_intermediate=inner,
        tower_linears=_tower(sizes, width, inner, ("fc1", "fc2"), {"merger": 1}, ("mlp.0", "mlp.2")),
    )


def _qwen2_5_vl(config: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> ModelShape:
    sizes = _language_sizes(config, text) | _patch_sizes(vision, 14)
    width, inner = int(vision["hidden_size"]), int(vision["intermediate_size"])
    mlp = ("gate_proj", "up_proj", "down_proj")
    return ModelShape(
        **sizes,
        vision_width=width,
        vision_intermediate=inner,
        tower_linears=_tower(sizes, width, inner, mlp, {"merger": 1}, ("mlp.0", "mlp.2")),
        vision_gated=True,
    )


def _qwen3_vl(config: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> ModelShape:
    sizes = _language_sizes(config, text) | _patch_sizes(vision, 16)
    width, inner = int(vision["hidden_size"]), int(vision["intermediate_size"])
    deepstack = len(vision["deepstack_visual_indexes"])
    ends = ("linear_fc1", "linear_fc2")
    mergers = {"merger": 1} | ({"deepstack_merger_list.*": deepstack} if deepstack else {})
    return ModelShape(
        **sizes | {"head_width": int(text.get("head_dim", 128))},
        vision_width=width,
        vision_intermediate=inner,
        tower_linears=_tower(sizes, width, inner, ends, mergers, ends),
        attention_bias=bool(text.get("attention_bias", False)),
        query_norm=True,
        deepstack=deepstack,
        vision_positions=int(vision["num_position_embeddings"]),
        patch_bias=True,
    )


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "qwen2_vl",
            "Qwen2-VL",
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLConfig",
            "Qwen2VLProcessor",
            _qwen2_vl,
        ),
        Family(
            "qwen2_5_vl",
            "Qwen2.5-VL",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLConfig",
            "Qwen2_5_VLProcessor",
            _qwen2_5_vl,
        ),
        Family(
            "qwen3_vl",
            "Qwen3-VL",
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLConfig",
            "Qwen3VLProcessor",
            _qwen3_vl,
        ),
    )
}
"""By `model_type` of config.json."""


def every_tower_linear() -> dict[str, int | None]:
    """The paths of the towers' linear layers in any family, for a base that is not here."""
    return dict.fromkeys(
        [
            *(f"blocks.*.attn.{name}" for name in ("qkv", "proj")),
            *(f"blocks.*.mlp.{name}" for name in ("fc1", "fc2", "gate_proj", "up_proj", "down_proj")),
            *(f"blocks.*.mlp.{name}" for name in ("linear_fc1", "linear_fc2")),
            *(f"merger.{name}" for name in ("mlp.0", "mlp.2", "linear_fc1", "linear_fc2")),
            *(f"deepstack_merger_list.*.{name}" for name in ("linear_fc1", "linear_fc2")),
        ]
    )


REFUSED_MODEL_TYPES = {
    "qwen3_vl_moe": "a mixture of experts is not trained here (its experts are no linear layers, so bitsandbytes does "
    "not quantize them); give a dense Qwen3-VL (2B, 4B, 8B, 32B)",
}
"""Kinds that people will try, and why they cannot be trained."""
