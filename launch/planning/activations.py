"""Bytes that a micro-batch takes on one GPU: what autograd saves, and the largest temporary, when they take most.

Counted are the tensors that autograd saves in transformers 5.23, bitsandbytes 0.50, PEFT 0.21 and our dropout, or in
`trainer.model.fused`; a test counts those of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from launch.planning.memory_load import Load, Packed, Settings

if TYPE_CHECKING:
    from launch.inputs.model_shape import ModelShape

_HEAD_ROWS = 1024  # of logits at once (`trainer.model.head`)
# Bytes of a patch and channel of the tower at its peak. Plain: q and k in fp32, their products with cos and sin, beside
# q, k and v. Fused: a block's input and its norm, the MLP's inner values before and after GELU.
_TOWER_BYTES, _FUSED_TOWER_BYTES = {2: 34, 4: 44}, 20
_LARGEST_FUSED_RANK = 128  # of `trainer.model.kernels`


def attention_bytes(load: Load) -> int:
    """What autograd saves of one token in a decoder layer's attention: its four tensors, sums of the softmax."""
    shape = load.shape
    return load.activation_bytes * (2 * shape.query_width + 2 * shape.kv_width) + 4 * shape.heads


def layer_activation_bytes(load: Load) -> int:
    """What autograd saves of one token in a decoder layer that is not recomputed, besides `attention_bytes`.

    4-bit and frozen linear layers save nothing. Plain: each norm its input in fp32, SiLU its input, the product both
    factors; a LoRA its dropped-out input with a byte of mask a value. RoPE saves only cos and sin, the same for all
    layers.
    """
    shape, size = load.shape, load.activation_bytes
    norms = 2 * shape.hidden * (size if load.kernels.fused else 4)
    if shape.query_norm:  # transformers' own in both ways: its input in fp32, the factor of each head
        norms += 4 * (shape.query_width + shape.kv_width + shape.heads + shape.kv_heads)
    product = size * shape.intermediate * (2 if load.kernels.fused else 3)
    return norms + product + _lora_bytes(load) + 2 * 4


def _lora_bytes(load: Load) -> int:
    shape, size = load.shape, load.activation_bytes
    rank, fused = load.lora_rank, load.kernels.fused_lora and load.lora_rank <= _LARGEST_FUSED_RANK
    thin = size * len(load.targets) * rank
    if load.dora:  # PEFT's own forward: the base's output, LoRA's, and the input in fp32
        fused = False
        thin += sum(2 * 4 * shape.layer_linears[name][0] for name in load.targets)
    if load.dropout and not fused:
        return thin + (1 + size) * sum(shape.layer_linears[name][1] for name in load.targets)
    # Undropped, or dropped within the kernel: layers that are fed alike save one input, o_proj's is the attention's.
    fed = {
        ("q_proj", "k_proj", "v_proj"): shape.hidden,
        ("gate_proj", "up_proj"): shape.hidden,
        ("down_proj",): shape.intermediate,
    }
    return thin + size * sum(width for names, width in fed.items() if set(names) & set(load.targets))


def training_peak(load: Load, packed: Packed, settings: Settings) -> tuple[int, int]:
    """(activations, temporaries) at the moment they take most: in a layer's backward, the head's or the tower."""
    shape, size, tokens = load.shape, load.activation_bytes, packed.tokens
    patches = packed.visual_tokens * shape.patches_per_token
    held = _held_bytes(load, packed, patches)
    kept = [_is_recomputed(number, settings.activation_checkpoint_every) for number in range(shape.layers)]
    one = layer_activation_bytes(load) * tokens + attention_bytes(load) * packed.whole_tokens
    # Without a shared prefix the input of o_proj's LoRA is the attention's output itself.
    if packed.whole_tokens > tokens and "o_proj" in load.targets:
        one += size * shape.query_width * tokens
    own_input = size * shape.hidden * tokens
    before, peak = 0, 0
    for recomputed in kept:
        # The fused norm saves the layer's input itself, which recomputation has kept.
        again = own_input if recomputed and not load.kernels.fused else 0
        peak = max(peak, before + one + again)
        before += own_input if recomputed else one
    head_rows = min(packed.scored_tokens, _HEAD_ROWS)
    logits = 8 * head_rows * shape.vocabulary  # in fp32, and what is made of them
    head = logits + packed.scored_tokens * shape.hidden * (4 + size) + own_input
    tower = patches * shape.vision_width * (_FUSED_TOWER_BYTES if load.kernels.fused else _TOWER_BYTES[size])
    moments = (
        (held + peak, _layer_temporaries(load, packed, settings)),
        (held + before, head),
        (held, tower + tokens * size * shape.hidden),
    )
    return max(moments, key=sum)


def _is_recomputed(number: int, every: int) -> bool:
    """As transformers' `activation_checkpointing_enable` counts layers."""
    return every > 0 and number % every == 0


def _held_bytes(load: Load, packed: Packed, patches: int) -> int:
    """What a whole micro-batch holds beside its layers: pixels, positions, dropout keys, cos and sin, the last norm,
    features that enter decoder layers."""
    shape = load.shape
    keys = 8 * len(load.targets) * shape.layers if load.dropout else 0
    rotation = 2 * load.activation_bytes * shape.head_width
    last_norm = shape.hidden * (load.activation_bytes if load.kernels.fused else 4)
    deepstack = packed.visual_tokens * shape.deepstack * shape.hidden * load.weight_bytes
    pixels = patches * (load.weight_bytes * shape.patch_values + 16)
    kept = pixels + deepstack + _trained_tower_bytes(load, patches)
    return kept + packed.tokens * (keys + rotation + last_norm + 6 * 8)


def _trained_tower_bytes(load: Load, patches: int) -> int:
    """What autograd saves of a tower with LoRA, whose forwards are transformers' own, until the backward pass ends.

    A block as a decoder layer: norms, attention, MLP; blocks count where one has LoRA, mergers always. The inputs of
    its LoRA are in fp32, and dropout keeps a byte a value and its keys.
    """
    if not load.tower_targets:
        return 0
    shape, size = load.shape, load.activation_bytes
    width, inner = shape.vision_width, shape.vision_intermediate
    gated = shape.vision_gated
    norms = 2 * width * (4 if gated else size)
    block = norms + 4 * width * size + 4 + size * inner * (3 if gated else 1)
    in_blocks = any(path.startswith("blocks.") for path in load.tower_targets)
    kept = shape.vision_blocks * block if in_blocks else 0
    kept += (1 + shape.deepstack) * 2 * size * width
    lora = 0
    for path in load.tower_targets:
        linear = shape.tower_linears[path]
        share = 1 if path.startswith("blocks.") else shape.patches_per_token
        lora += linear.copies * (linear.inputs * (5 if load.dropout else 4) + 4 * load.lora_rank + 8) // share
    return patches * (kept + lora)


def _layer_temporaries(load: Load, packed: Packed, settings: Settings) -> int:
    """The most that a layer's backward has besides what was saved: gradients of its MLP or its attention, and the
    weight that is dequantized for one product."""
    shape, size, tokens = load.shape, load.activation_bytes, packed.tokens
    fused = load.kernels.fused
    inner = size * shape.intermediate * tokens
    weight = largest_linear(shape) * size if load.load_in_4bit and not settings.keep_dequantized else 0
    product = max(inner + weight, inner if fused else 3 * inner)
    if load.dora:  # PEFT's `get_lora_weight`: an identity matrix in fp32, and the change of the weight
        squares = (shape.layer_linears[name] for name in load.targets)
        weight += max(4 * inputs * (inputs + 3 * outputs) for outputs, inputs in squares)
        product = max(product, inner + weight)
    attention = packed.whole_tokens * max(shape.hidden, shape.query_width) * (6 * size if fused else 12)
    return max(product, attention) + 2 * size * shape.hidden * tokens


def largest_linear(shape: ModelShape) -> int:
    """Return the weights of the largest linear layer of a decoder layer."""
    return max(outputs * inputs for outputs, inputs in shape.layer_linears.values())
