"""Log-probabilities of the targets alone: the output head on the scored tokens, never all logits at once.

The collator knows which tokens are scored, so nothing is read back from the device (trl 1.16's fused head looks for
them with a mask, and waits for the device twice a micro-batch).
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

_TOKENS = 1024  # whose logits are there at once: 0.6 GB in fp32 with the vocabulary of Qwen2-VL


@dataclass
class Scored(ModelOutput):
    """What a packed micro-batch answers. `log_probs`: fp32 [1, K], of the target of each of K scored tokens.

    A `ModelOutput`, in which FSDP2 and DeepSpeed find the tensors that they hook.
    """

    log_probs: Tensor | None = None


def patch_forward_target_logprobs(model: PreTrainedModel) -> None:
    """Let the model's forward answer a packed micro-batch that has `shift_labels` [1, K] with `Scored`.

    Everything else, such as what `generate` calls it with, goes to the forward that was there, whose signature stays.
    """
    stock = model.forward

    # `generate` refuses arguments that the signature does not name (transformers 5.23, `_validate_model_kwargs`).
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, shift_labels: Tensor | None = None, **kwargs: Any) -> Any:
        if shift_labels is None or "text_cu_seqlens" not in kwargs:
            return stock(*args, **kwargs)
        hidden = self.model(*args, use_cache=False, **kwargs).last_hidden_state
        return Scored(
            log_probs=_LogProbs.apply(hidden.squeeze(0), self.lm_head.weight, shift_labels.squeeze(0))[None]
        )

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


class _LogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T) at the labels: fp32 [K] from [K, hidden], [vocabulary, hidden] and [K].

    The weight is frozen. The backward pass computes the logits again, which costs less than keeping them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        log_sums, target_logits = [], []
        for rows, targets in zip(hidden.split(_TOKENS), labels.split(_TOKENS), strict=True):
            logits = _logits(rows, weight)
            log_sums.append(logits.logsumexp(-1))
            target_logits.append(logits.gather(1, targets[:, None])[:, 0])
        log_sum = torch.cat(log_sums)
        ctx.save_for_backward(hidden, weight, labels, log_sum)
        return torch.cat(target_logits) - log_sum

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        hidden, weight, labels, log_sum = ctx.saved_tensors
        parts = []
        for rows, targets, sums, gradient in zip(
            *(tensor.split(_TOKENS) for tensor in (hidden, labels, log_sum, gradients[0])), strict=True
        ):
            change = _logits(rows, weight).sub_(sums[:, None]).exp_().mul_(-gradient[:, None])
            change.scatter_add_(1, targets[:, None], gradient[:, None])
            with torch.autocast(rows.device.type, enabled=False):
                parts.append(change.to(weight.dtype) @ weight)
        return torch.cat(parts).to(hidden.dtype), None, None


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """fp32 [rows, vocabulary]; the product in the dtype of the weight, on a GPU not rounded to it."""
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden.to(weight.dtype)
        if weight.dtype == torch.float32 or weight.device.type != "cuda":
            return (hidden @ weight.t()).float()
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
