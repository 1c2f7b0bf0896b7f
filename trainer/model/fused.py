"""The decoder layers and the vision tower through fused kernels, on a GPU in bfloat16.

RMSNorm forward and rotary positions are Liger's kernels (`trainer.model.liger_kernels`), linear layers are in
`trainer.model.fused_linear`. All of it replaces the `forward` of single modules of one model: other models in the
process keep theirs. A kernel that computes several modules reads their weights and calls none of them, so forward hooks
on them are not called: those on a block's norms and on `mlp.fc2` of the tower, on gate and up of a decoder layer, and
on its second norm and its whole MLP where no adapter is in that.

A packed row is [1, T, hidden], the patches of a micro-batch's images are [P, hidden]. Statistics of norms and softmax
are fp32, everything else is in the dtype of the input (bfloat16).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from trainer.model import kernels
from trainer.model.attention import Segments, varlen
from trainer.model.fp8_mlp import add_norm_mlp, takes_mlp
from trainer.model.frozen_mlp import add_norm_frozen_mlp, frozen_linears_of
from trainer.model.fused_linear import linears, lora_linear
from trainer.model.last_layer import ReadTokens, compute_read_tokens_only, rows
from trainer.model.liger_kernels import norm_forward, norm_of_sum_forward, rotate_in_place
from trainer.model.pass_kernels import layer_norm, swiglu
from trainer.model.prefix_kernels import turn_whole
from trainer.model.resident import MANY_ROWS
from trainer.model.text_attention import attend_causally, faster_than_pytorch
from trainer.model.tower_attention import attend_tower

Forward = Callable[..., Any]


def use_fused_kernels(model: PreTrainedModel) -> None:
    """Switch the language model in bfloat16 on a GPU to fused kernels, after LoRA and sample dropout are on it.

    They reach over the modules of a decoder layer: an engine that shards must bring it together whole. Its layers
    are the same in all families; the tower's are in `trainer.model.families`.
    """
    language = model.model.language_model
    replace(language.norm, rms_norm)
    for layer in language.layers:
        replace(layer.input_layernorm, rms_norm)
        replace(layer.post_attention_layernorm, rms_norm)
        replace(layer.mlp, swiglu_mlp)
        replace(layer, decoder_layer)
        replace_where_it_fits(layer.self_attn, text_attention)
    if language.layers:  # `prepare --vision` loads the tower alone
        compute_read_tokens_only(language.layers[-1], last_decoder_layer)
    for module in language.modules():
        if isinstance(module, LoraLayer):
            replace_where_it_fits(module, lora_linear)
    dequantize_in_one_launch(language)


def dequantize_in_one_launch(part: nn.Module) -> None:
    """Switch linear layers in 4 bits to `packed_linear`, but those that something else computes already."""
    for module in part.modules():
        if isinstance(module, Linear4bit) and "forward" not in module.__dict__:
            replace_where_it_fits(module, packed_linear)


def fuse_patches_and_attention(visual: Any) -> None:
    """Switch patch embedding and attention to fused kernels, which the towers of all families have alike."""
    replace(visual.patch_embed, embed_patches)
    dequantize_in_one_launch(visual)
    for block in visual.blocks:
        replace_where_it_fits(block.attn, vision_attention)


def replace(module: nn.Module, forward: Forward) -> None:
    """Let a module compute with `forward`."""
    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def replace_where_it_fits(module: nn.Module, fused: Forward) -> None:
    """Let a module compute with `fused`, and as before where `fused` returns NotImplemented."""
    stock = module.forward

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = fused(module, *args, **kwargs)
        return stock(*args, **kwargs) if result is NotImplemented else result

    replace(module, forward)


# --- linear layers in 4 bits --------------------------------------------------------------------------------------


def packed_linear(module: Any, x: Tensor) -> Any:
    """`Linear4bit.forward` of [..., in] with the same products, the weight dequantized in fewer launches.

    NotImplemented for few rows, which bitsandbytes multiplies without dequantizing, and for another dtype of products.
    """
    if x.numel() <= MANY_ROWS * x.shape[-1] or module.compute_dtype not in (None, x.dtype):
        return NotImplemented
    return linears(x, (module,))[0]


# --- between the linear layers ------------------------------------------------------------------------------------


def rms_norm(module: Any, hidden: Tensor) -> Tensor:
    """`Qwen2VLRMSNorm.forward` of [..., hidden]: statistics in fp32, the product in the dtype of the input."""
    return cast(Tensor, _Norm.apply(hidden, module.weight, module.variance_epsilon)[0])


class _Norm(torch.autograd.Function):
    """(RMSNorm of x, x): what comes back along x is added in the norm's own backward kernel. The weight is frozen.

    The kernel writes over the gradient of the first output, so that must be nobody else's: linear layers alone may be
    fed it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        normed, deviations = norm_forward(x, weight, epsilon)
        ctx.save_for_backward(x, weight, deviations)
        ctx.set_materialize_grads(False)
        return normed, x

    @staticmethod
    def backward(ctx: Any, of_normed: Tensor | None, of_x: Tensor | None) -> tuple[Tensor | None, None, None]:
        if of_normed is None:
            return of_x, None, None
        return kernels.norm_gradient(of_normed, of_x, *ctx.saved_tensors), None, None


class _NormOfSum(torch.autograd.Function):
    """(RMSNorm of x + residual, x + residual), in one kernel each way; as `_Norm` for the rest."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        normed, total, deviations = norm_of_sum_forward(x, residual, weight, epsilon)
        ctx.save_for_backward(total, weight, deviations)
        return normed, total

    @staticmethod
    def backward(ctx: Any, of_normed: Tensor, of_total: Tensor) -> tuple[Tensor, Tensor, None, None]:
        change = kernels.norm_gradient(of_normed, of_total, *ctx.saved_tensors)
        return change, change, None, None


def decoder_layer(module: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """`Qwen2VLDecoderLayer.forward` of [1, T, hidden]: computed again in the backward pass where the layer is asked to.

    transformers 5.23 recomputes in the class's own `forward` (`GradientCheckpointingLayer`), which this replaces.
    """
    if module.gradient_checkpointing and module.training:
        again = partial(_decoder_layer, module, **kwargs)
        return cast(Tensor, module._gradient_checkpointing_func(again, hidden_states))
    return _decoder_layer(module, hidden_states, **kwargs)


def _decoder_layer(module: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The attention's residual is added in the kernel of the norm after it, gradients of residuals in both norms'."""
    norm = module.input_layernorm
    normed, residual = _Norm.apply(hidden_states, norm.weight, norm.variance_epsilon)
    attended, _ = module.self_attn(hidden_states=normed, **kwargs)
    return _after_attention(module, attended, residual)


def _after_attention(module: Any, attended: Tensor, residual: Tensor) -> Tensor:
    norm, mlp = module.post_attention_layernorm, module.mlp
    if takes_mlp(mlp):
        return add_norm_mlp(attended, residual, norm, mlp)
    if layers := frozen_linears_of(mlp, attended):
        return add_norm_frozen_mlp(attended, residual, norm, layers)
    normed, residual = _NormOfSum.apply(attended, residual, norm.weight, norm.variance_epsilon)
    return cast(Tensor, residual + mlp(normed))


def last_decoder_layer(module: Any, hidden_states: Tensor, *, read: ReadTokens, **kwargs: Any) -> Tensor:
    """`_decoder_layer` at the tokens read: [1, S, hidden] of [1, T, hidden]."""
    norm = module.input_layernorm
    normed, residual = _Norm.apply(hidden_states, norm.weight, norm.variance_epsilon)
    attended, _ = module.self_attn(normed, queries=read, linears=linears, **kwargs)
    return _after_attention(module, attended, rows(residual, read.positions))


def swiglu_mlp(module: Any, hidden: Tensor) -> Tensor:
    """`Qwen2MLP.forward` of [..., hidden]: gate and up are one pair of products, silu(gate) * up one kernel."""
    gate, up = linears(hidden, (module.gate_proj, module.up_proj))
    return cast(Tensor, module.down_proj(swiglu(gate, up)))


def text_attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    segments: Segments | None = None,
    **_: Any,
) -> Any:
    """`Qwen2VLAttention.forward` on a packed row: ([1, T, hidden], None), causal within each of `segments`.

    Without `segments` (a call of `generate`) it returns NotImplemented, and transformers' own forward computes.
    `position_embeddings`: cosines and sines, [1, T, head_dim] each.
    """
    if segments is None:
        return NotImplemented
    query, key, value = linears(hidden_states, (module.q_proj, module.k_proj, module.v_proj))
    if hasattr(module, "q_norm"):  # Qwen3-VL's, head by head
        heads = (1, hidden_states.shape[1], -1, module.head_dim)
        query, key = module.q_norm(query.view(heads)), module.k_norm(key.view(heads))
    turning = (query, key, value, *position_embeddings, module.head_dim)
    shared = segments.shared
    query, key, value = turn_whole(*turning, shared) if shared else _Rotated.apply(*turning)
    output = attend_text(query, key, value, segments, module.scaling)
    output = shared.once(output) if shared else output
    return module.o_proj(output.reshape(1, hidden_states.shape[1], -1)), None


class _Rotated(torch.autograd.Function):
    """Query and key turned by their rotary positions in place, and value: [T, heads, head_dim] each, of [1, T, ...].

    All the views in one node. Query and key are outputs of linear layers, or of norms, that nobody else reads; their
    gradients are turned in place too, which attention's are fit for.

    Without `mark_dirty`, which needs the input itself among the outputs, where these are views of another shape. So
    nothing would notice a producer that saves its output for its own backward pass. None does: `_Linears`, the linear
    layers of PyTorch and bitsandbytes, `_Norm` and a stock RMSNorm save their inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, width: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.shapes = [each.shape for each in (query, key, value)]
        heads = (query.shape[1], -1, width)
        query, key, value = (each.contiguous().view(heads) for each in (query, key, value))
        rotate_in_place(query, key, cos, sin, back=False)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, of_query: Tensor, of_key: Tensor, of_value: Tensor) -> tuple[Tensor | None, ...]:
        of_query, of_key = of_query.contiguous(), of_key.contiguous()
        rotate_in_place(of_query, of_key, *ctx.saved_tensors, back=True)
        gradients = (of_query, of_key, of_value)
        return (
            *(each.reshape(shape) for each, shape in zip(gradients, ctx.shapes, strict=True)),
            None,
            None,
            None,
        )


def attend_text(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """Return causal attention within every sample, through the kernel that is faster on the GPU at hand.

    query [T, heads, head_dim], key and value [T, kv_heads, head_dim]; the output is like query.
    """
    if faster_than_pytorch(query.device, query.shape[-1]):
        return attend_causally(query, key, value, segments.cu_seqlens, segments.lengths, scale)
    return varlen(query, key, value, segments, causal=True, scale=scale)


def vision_attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    segments: Segments | None = None,
    **_: Any,
) -> Any:
    """`VisionAttention.forward` over all images of a micro-batch, [P, hidden]; NotImplemented with a gradient."""
    if segments is None or torch.is_grad_enabled():
        return NotImplemented
    together = module.qkv(hidden_states).view(len(hidden_states), 3, module.num_heads, -1)
    turned = kernels.rotate(together, *position_embeddings)
    output = attend_tower(*turned, segments, module.scaling)
    return module.proj(output.reshape(len(hidden_states), -1))


def vision_block(module: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
    """`Qwen2VLVisionBlock.forward`, without a gradient.

    The attention's residual is added in the norm after it, the MLP's in its last product, whose bias the norm adds.
    """
    if torch.is_grad_enabled():
        return NotImplemented
    first, second = module.norm1, module.norm2
    _, normed = layer_norm(hidden_states, None, first.weight, first.bias, first.eps)
    attended = module.attn(normed, **kwargs)
    mlp, last = module.mlp, module.mlp.fc2
    if type(last) is not nn.Linear:  # in 4 bits, or with LoRA
        hidden, normed = layer_norm(attended, hidden_states, second.weight, second.bias, second.eps)
        return hidden.add_(mlp(normed))
    hidden, normed = layer_norm(attended, hidden_states, second.weight, second.bias, second.eps, last.bias)
    return hidden.addmm_(mlp.act(mlp.fc1(normed)), last.weight.t())


def embed_patches(module: Any, pixels: Tensor) -> Tensor:
    """`PatchEmbed.forward`, [P, values] to [P, hidden].

    Kernel and stride of its convolution are a whole patch, so it is a matrix product.
    """
    convolution = module.proj
    matrix = convolution.weight.view(module.embed_dim, -1)
    return linear(pixels.to(matrix.dtype), matrix, convolution.bias)


def quick_gelu(_: nn.Module, x: Tensor) -> Any:
    """`QuickGELUActivation.forward`, in one pass; the tower has no graph."""
    if torch.is_grad_enabled():
        return NotImplemented
    return kernels.quick_gelu(x)
