"""The language-model head at selected positions only, in chunks, so that full logits are never in memory.

Legend: M scored positions, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**27}
"""Logits per chunk: 16 MiB on a CPU, to stay near its caches, and 512 MiB on a GPU."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class TokenScores(NamedTuple):
    """Scores of one target token per position, each [M], float32 or wider."""

    logps: Tensor
    """log p(target), nats."""
    entropy: Tensor
    """Entropy of the distribution, nats; carries no gradient."""
    mean_logit: Tensor
    """Mean of the logits over the vocabulary; carries no gradient."""
    top1: Tensor
    """1 if the target is the most likely token, else 0."""
    log_sum_squares: Tensor
    """log sum_v p(v)^2, nats; carries no gradient."""


@dataclass(frozen=True, slots=True)
class LogitForm:
    """logits = softcap * tanh(scale * (W h + b) / softcap) / temperature; without tanh if ``softcap`` is None."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, config: PretrainedConfig) -> "LogitForm":
        """The form that a model's configuration declares (Gemma and xLSTM cap; Cohere, Granite and others scale)."""
        text = config.get_text_config()
        softcap = next((cap for name in CAPS if (cap := getattr(text, name, None)) is not None), None)
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            if getattr(text, name, None) is not None:
                return cls(float(getattr(text, name)), softcap)
        divisor = getattr(text, "logits_scaling", None)
        if divisor is None:
            return cls(1.0, softcap)
        return cls(float(divisor) if text.model_type == "hyperclovax" else 1 / divisor, softcap)

    def apply(self, raw: Tensor) -> Tensor:
        """Logits from W h + b, in float32 or wider."""
        logits = raw.to(_wide(raw.dtype))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1.0 else logits / self.temperature

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient with respect to W h + b from that with respect to the logits, in place."""
        if self.softcap is not None:
            grad.mul_(1 - (logits * self.temperature / self.softcap) ** 2)
        factor = self.scale / self.temperature
        return grad.mul_(factor) if factor != 1.0 else grad


def score_tokens(hidden: Tensor, head: nn.Module, targets: Tensor, form: LogitForm) -> TokenScores:
    """Scores of ``targets`` under ``head``; differentiable in ``hidden`` and in the head's parameters.

    A plain linear head has its own backward: a frozen head needs no second pass over the vocabulary, a trained head
    recomputes each chunk of logits. Any other head (with an adapter, or with sharded parameters) is called chunk by
    chunk under activation checkpointing.

    Args:
        hidden: [M, D], last hidden states at the positions that predict.
        head: the output embeddings of the model.
        targets: [M], token ids.
        form: how the model makes logits from the head's output.
    """
    plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and not hasattr(head.weight, "ds_id")
    if plain and not isinstance(head.weight.data, DTensor):
        return TokenScores(*_LinearScores.apply(hidden, head.weight, head.bias, targets, form))
    size = chunk_rows(max(parameter.shape[0] for parameter in head.parameters()), hidden.device)
    parts = [
        checkpoint(_scores_of_module, hidden[start : start + size], head, targets[start : start + size], form,
                   use_reentrant=False)
        for start in range(0, max(len(targets), 1), size)
    ]  # fmt: skip
    return TokenScores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Positions per chunk."""
    return max(1, CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cuda"]) // vocabulary)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _scores_of_module(hidden: Tensor, head: nn.Module, targets: Tensor, form: LogitForm) -> TokenScores:
    logits = form.apply(head(hidden))
    logps = F.log_softmax(logits, dim=-1)
    chosen = logps.gather(1, targets[:, None]).squeeze(1)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(dim=-1)
        top1 = (chosen >= logps.amax(dim=-1)).float()
        return TokenScores(chosen, entropy, logits.mean(dim=-1), top1, torch.logsumexp(2 * logps, dim=-1))


class _LinearScores(torch.autograd.Function):
    """``score_tokens`` for a linear head.

    d logp_t / d logits_t = onehot(target_t) - softmax_t. With a frozen head, backward needs only this row times W, so
    forward computes the product while it has the softmax: [M, D] numbers in place of a second [M, V].
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, form: LogitForm
    ) -> tuple[Tensor, ...]:
        device = hidden.device.type
        ctx.dtypes = hidden.dtype, weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        direction = torch.empty_like(hidden) if ctx.needs_input_grad[0] and not trained else None
        scores = hidden.new_empty((5, len(targets)), dtype=_wide(hidden.dtype))
        size = chunk_rows(weight.shape[0], hidden.device)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            raw = F.linear(hidden[part], weight, bias)
            logits = form.apply(raw)
            logps = F.log_softmax(logits, dim=-1)
            chosen = logps.gather(1, targets[part, None])
            scores[0, part] = chosen.squeeze(1)
            scores[2, part] = logits.mean(dim=-1)
            scores[3, part] = chosen.squeeze(1) >= logps.amax(dim=-1)
            softmax = logps.exp()
            scores[1, part] = -torch.bmm(softmax[:, None], logps[:, :, None]).flatten()
            scores[4, part] = torch.bmm(softmax[:, None], softmax[:, :, None]).flatten().log()
            if direction is not None:
                grad = softmax.neg_()
                grad.scatter_add_(1, targets[part, None], torch.ones_like(chosen))
                direction[part] = form.backward_(grad, logits).to(weight.dtype) @ weight
        ctx.form, ctx.has_bias = form, bias is not None
        if direction is not None:
            ctx.save_for_backward(direction)
        elif trained:
            ctx.save_for_backward(hidden, weight, *([bias] if bias is not None else []), targets)
        ctx.trained = trained
        ctx.mark_non_differentiable(*scores[1:])
        return tuple(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logps = grads[0]
        hidden_dtype, weight_dtype = ctx.dtypes
        if not ctx.trained:
            (direction,) = ctx.saved_tensors
            return (direction * grad_logps[:, None]).to(hidden_dtype), None, None, None, None
        hidden, weight, *rest = ctx.saved_tensors
        bias, targets = rest[0] if ctx.has_bias else None, rest[-1]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype))
        grad_bias = torch.zeros_like(grad_weight[:, 0]) if ctx.has_bias else None
        size = chunk_rows(weight.shape[0], hidden.device)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            logits = ctx.form.apply(F.linear(hidden[part], weight, bias))
            scale = grad_logps[part, None]
            grad = F.softmax(logits, dim=-1).mul_(-scale)
            grad.scatter_add_(1, targets[part, None], scale)
            grad = ctx.form.backward_(grad, logits).to(weight.dtype)
            torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.T, hidden[part])
            else:
                grad_weight += grad.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
        return (
            grad_hidden.to(hidden_dtype),
            grad_weight.to(weight_dtype),
            None if grad_bias is None else grad_bias.to(weight_dtype),
            None,
            None,
        )
