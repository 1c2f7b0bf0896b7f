"""The decoder layers and the vision tower through fused kernels, on a GPU in bfloat16.

RMSNorm, SwiGLU and rotary positions are Liger's kernels, called directly: Liger 0.8.5's own patch for Qwen2-VL does
not import with transformers 5.23. LoRA layers run as one autograd function over `trainer.model.kernels`. All of it
replaces the `forward` of single modules of one model: other models in the process keep theirs.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction, rope_forward
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import Qwen2VLForConditionalGeneration

from trainer.model import kernels
from trainer.model.attention import Segments, varlen
from trainer.model.dropout import DRAWS, SampleDropout, channel_words

Forward = Callable[..., Any]


def use_fused_kernels(model: Qwen2VLForConditionalGeneration, partitioned: bool) -> None:
    """Switch a model in bfloat16 on a GPU to fused kernels, after LoRA and sample dropout are on it.

    `partitioned`: a module's weights come together only when it is called itself (ZeRO-3), so that no kernel may
    reach over several modules.
    """
    language, visual = model.model.language_model, model.model.visual
    _replace(language.norm, rms_norm)
    for layer in language.layers:
        _replace(layer.input_layernorm, rms_norm)
        _replace(layer.post_attention_layernorm, rms_norm)
        _replace(layer.mlp, swiglu_mlp)
        if not partitioned:
            _replace(layer, decoder_layer)
        _replace(layer.self_attn, _or_stock(layer.self_attn.forward, text_attention))
    _replace(visual.patch_embed, embed_patches)
    for block in visual.blocks:
        _replace(block.attn, _or_stock(block.attn.forward, vision_attention))
        if type(block.mlp.act).__name__ == "QuickGELUActivation":
            _replace(block.mlp.act, _or_stock(block.mlp.act.forward, quick_gelu))
    for module in language.modules():
        if not partitioned and isinstance(module, LoraLayer) and _takes_lora(module):
            _replace(module, _or_stock(module.forward, lora_linear))


def _replace(module: nn.Module, forward: Forward) -> None:
    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def _or_stock(stock: Forward, fused: Forward) -> Forward:
    """`fused`, or the stock forward where `fused` returns NotImplemented."""

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = fused(module, *args, **kwargs)
        return stock(*args, **kwargs) if result is NotImplemented else result

    return forward


# --- Liger's kernels ----------------------------------------------------------------------------------------------


def rms_norm(module: Any, hidden: Tensor) -> Tensor:
    """`Qwen2VLRMSNorm.forward`: statistics in fp32, the product in the dtype of the input."""
    return cast(
        Tensor,
        LigerRMSNormFunction.apply(hidden, module.weight, module.variance_epsilon, 0.0, "llama", True),
    )


def decoder_layer(module: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """`Qwen2VLDecoderLayer.forward`: the attention's residual is added in the kernel of the norm after it."""
    attended, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **kwargs)
    norm = module.post_attention_layernorm
    normed, residual = LigerFusedAddRMSNormFunction.apply(
        attended, hidden_states, norm.weight, norm.variance_epsilon, 0.0, "llama", True
    )
    return cast(Tensor, residual + module.mlp(normed))


def swiglu_mlp(module: Any, hidden: Tensor) -> Tensor:
    """`Qwen2MLP.forward`: gate and up in one kernel."""
    return cast(
        Tensor,
        module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(hidden), module.up_proj(hidden))),
    )


def text_attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    segments: Segments | None = None,
    **_: Any,
) -> Any:
    """`Qwen2VLAttention.forward` on a packed row, [1, T, hidden]."""
    if segments is None:
        return NotImplemented
    heads = (1, hidden_states.shape[1], -1, module.head_dim)
    query, key, value = (
        projection(hidden_states).view(heads) for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    query, key = LigerRopeFunction.apply(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
    output = varlen(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0],
        segments,
        causal=True,
        scale=module.scaling,
    )
    return module.o_proj(output.reshape(1, hidden_states.shape[1], -1)), None


def vision_attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    segments: Segments | None = None,
    **_: Any,
) -> Any:
    """`VisionAttention.forward` over all images of a micro-batch, [P, hidden]; without a gradient.

    Cosines and sines are fp32, so the kernel rotates in fp32 and rounds once, as the stock code does.
    """
    if segments is None:
        return NotImplemented
    query, key, value = module.qkv(hidden_states).view(len(hidden_states), 3, module.num_heads, -1).unbind(1)
    cos, sin = (part[None] for part in position_embeddings)
    query, key, *_ = rope_forward(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    output = varlen(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value, segments, causal=False, scale=module.scaling
    )
    return module.proj(output.reshape(len(hidden_states), -1))


def embed_patches(module: Any, pixels: Tensor) -> Tensor:
    """`PatchEmbed.forward`: kernel and stride of its convolution are a whole patch, so it is a matrix product."""
    return linear(pixels.to(module.proj.weight.dtype), module.proj.weight.view(module.embed_dim, -1))


def quick_gelu(_: nn.Module, x: Tensor) -> Any:
    """`QuickGELUActivation.forward`, in one pass; the tower has no graph."""
    if torch.is_grad_enabled():
        return NotImplemented
    return kernels.quick_gelu(x)


# --- LoRA ------------------------------------------------------------------------------------------------------------


def _takes_lora(module: LoraLayer) -> bool:
    """One plain adapter on a linear layer, of a rank whose tiles fit."""
    plain = len(module.lora_A) == 1 and not module.lora_variant
    rank = max(module.r.values(), default=0)
    return plain and rank <= kernels.LARGEST_RANK and isinstance(module.base_layer, nn.Linear)


def lora_linear(module: Any, x: Tensor) -> Any:
    """PEFT's forward of a linear layer with one adapter: base(x) + scaling * up(down(dropout(x)))."""
    (adapter,) = module.lora_A
    if module.disable_adapters or module.merged or module.active_adapters != [adapter]:
        return NotImplemented
    base = module.base_layer
    packed = None
    if isinstance(base, Linear4bit):  # FSDP2's gathered weight has lost it, the module has it
        packed = getattr(base.weight, "quant_state", None) or base.quant_state
    rows, dropped = None, 0
    dropout = module.lora_dropout[adapter]
    if isinstance(dropout, SampleDropout) and module.training and dropout.dropped:
        rows, dropped = dropout.rows_of(x), dropout.dropped
    down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    return _LoraLinear.apply(
        x, base.weight, base.bias, down, up, module.scaling[adapter], packed, rows, dropped
    )


def _matrix(weight: Tensor, packed: Any, dtype: torch.dtype) -> Tensor:
    """The base's weight [out, in] in `dtype`, out of its 4 bits where it is packed, as `MatMul4Bit` does."""
    if packed is None:
        return weight.to(dtype)
    return dequantize_4bit(weight.view(-1, 1), packed).to(dtype)


class _LoraLinear(torch.autograd.Function):
    """One frozen linear layer and its adapter. Saves x, the adapter and `down(dropout(x))`, and no mask.

    Adapters are fp32; their products are in the dtype of x, as under autocast, their gradients fp32 again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        packed: Any,
        rows: Tensor | None,
        dropped: int,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).contiguous()
            rank, channels = down.shape
            down_padded = flat.new_zeros(kernels.padded_rank(rank), channels)
            down_padded[:rank] = down
            mask = _mask_of(flat, rows, dropped)
            inner = kernels.project(flat, down_padded, *mask)
            output = linear(
                flat, _matrix(weight, packed, x.dtype), None if bias is None else bias.to(x.dtype)
            )
            output.addmm_(inner[:, :rank], up.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, weight, down_padded, up, inner, rows)
        ctx.facts = (scaling, packed, dropped, rank)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, down_padded, up, inner, rows = ctx.saved_tensors
        scaling, packed, dropped, rank = ctx.facts
        with torch.autocast(flat.device.type, enabled=False):
            gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
            mask = _mask_of(flat, rows, dropped)
            of_up = gradient.t().mm(inner[:, :rank]).float().mul_(scaling)
            of_inner = flat.new_zeros(len(flat), len(down_padded))
            of_inner[:, :rank] = gradient.mm(up.to(gradient.dtype)).mul_(scaling)
            of_down = kernels.adapter_gradient(flat, of_inner, *mask)[:rank]
            of_x = None
            if ctx.needs_input_grad[0]:
                of_x = gradient.mm(_matrix(weight, packed, gradient.dtype))
                kernels.add_back(of_x, of_inner, down_padded, *mask)
                of_x = of_x.view(*gradients[0].shape[:-1], -1)
        return of_x, None, None, of_down, of_up, None, None, None, None


def _mask_of(flat: Tensor, rows: Tensor | None, dropped: int) -> tuple[Tensor, Tensor, int, float]:
    """Row keys, channel words, share and scale as the kernels take them; without dropout nothing is read."""
    if rows is None:
        return flat, flat, 0, 1.0
    words = channel_words((flat.shape[1] + 1) // 2, flat.device)
    return rows, words, dropped, DRAWS / (DRAWS - dropped)
