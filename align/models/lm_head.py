"""The language-model head at selected positions only, part by part, so that full logits are never in memory.

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
"""Logits per chunk of positions, for heads that are called as modules: 16 MiB on a CPU and 512 MiB on a GPU."""
TILE_LOGITS = {"cpu": 2**20, "cuda": 2**27}
"""Logits per tile of the vocabulary, for a linear head: 4 MiB on a CPU, to stay in its caches, and 512 MiB on a GPU."""
FEWEST_COLUMNS = 256
"""Smallest tile of the vocabulary; narrower matrix products run below a CPU's speed."""
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


def score_tokens(
    hidden: Tensor, head: nn.Module, targets: Tensor, form: LogitForm, *, metrics: bool = True
) -> TokenScores:
    """Scores of ``targets`` under ``head``; differentiable in ``hidden`` and in the head's parameters.

    A plain linear head has its own backward: a frozen head needs no second pass over the vocabulary, a trained head
    recomputes each tile of logits. Any other head (with an adapter, or with sharded parameters) is called chunk by
    chunk under activation checkpointing.

    Args:
        hidden: [M, D], last hidden states at the positions that predict.
        head: the output embeddings of the model.
        targets: [M], token ids.
        form: how the model makes logits from the head's output.
        metrics: also compute what is not a log-prob; without, a linear head leaves NaN in those columns.
    """
    plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and not hasattr(head.weight, "ds_id")
    if plain and not isinstance(head.weight.data, DTensor):
        return TokenScores(*_LinearScores.apply(hidden, head.weight, head.bias, targets, form, metrics))
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
    """``score_tokens`` for a linear head, in tiles of the vocabulary with a running maximum and sum (online softmax).

    A pass reads the weight once and writes its gradient once, whatever M is. d logp_t / d logits_t = onehot(target_t) -
    softmax_t. With a frozen head, backward needs only this row times W, so forward sums it up tile by tile: [M, D]
    numbers in place of a second [M, V]. A trained head keeps log sum exp [M] and recomputes the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, form: LogitForm, metrics: bool
    ) -> tuple[Tensor, ...]:
        device = hidden.device.type
        ctx.dtypes = hidden.dtype, weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        found = _Running(hidden, direction=ctx.needs_input_grad[0] and not trained, metrics=metrics)
        for columns in _tiles(weight.shape[0], hidden):
            part = weight[columns]
            logits = form.apply(F.linear(hidden, part, None if bias is None else bias[columns]))
            found.add(logits, part, columns.start, targets, form)
        log_total = found.log_total()
        ctx.form, ctx.has_bias, ctx.trained = form, bias is not None, trained
        if found.direction is not None:
            slope = form.backward_(torch.ones_like(found.target), found.target)
            mean = found.direction / found.total[:, None]
            ctx.save_for_backward((weight[targets] * slope[:, None] - mean).to(weight.dtype))
        elif trained:
            ctx.save_for_backward(hidden, weight, *([bias] if bias is not None else []), targets, log_total)
        scores = found.scores(log_total, weight.shape[0])
        ctx.mark_non_differentiable(*scores[1:])
        return tuple(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logps = grads[0]
        hidden_dtype, weight_dtype = ctx.dtypes
        if not ctx.trained:
            (direction,) = ctx.saved_tensors
            return (direction * grad_logps[:, None]).to(hidden_dtype), None, None, None, None, None
        hidden, weight, *rest = ctx.saved_tensors
        bias, targets, log_total = rest[0] if ctx.has_bias else None, rest[-2], rest[-1]
        grad_hidden = torch.zeros_like(hidden, dtype=_wide(hidden.dtype))
        grad_weight = torch.empty_like(weight, dtype=weight_dtype)
        grad_bias = torch.empty_like(grad_weight[:, 0]) if bias is not None else None
        for columns in _tiles(weight.shape[0], hidden):
            part = weight[columns]
            logits = ctx.form.apply(F.linear(hidden, part, None if bias is None else bias[columns]))
            grad = (logits - log_total[:, None]).exp_().mul_(-grad_logps[:, None])
            inside, places = _inside(targets, columns.start, len(part))
            grad.scatter_add_(1, places[:, None], (grad_logps * inside)[:, None])
            grad = ctx.form.backward_(grad, logits)
            if grad_bias is not None:
                grad_bias[columns] = grad.sum(dim=0)
            grad = grad.to(weight.dtype)
            grad_hidden += grad @ part
            grad_weight[columns] = grad.T @ hidden
        return grad_hidden.to(hidden_dtype), grad_weight, grad_bias, None, None, None


class _Running:
    """Sums over the tiles of the vocabulary seen so far, for M positions; sums of exp are relative to ``top``."""

    def __init__(self, hidden: Tensor, *, direction: bool, metrics: bool) -> None:
        wide, rows = _wide(hidden.dtype), len(hidden)
        self.top = hidden.new_full((rows,), float("-inf"), dtype=wide)
        self.total = hidden.new_zeros(rows, dtype=wide)
        self.target = hidden.new_zeros(rows, dtype=wide)
        self.metrics = metrics
        self.logit_sum, self.weighted = self.total.clone(), self.total.clone()
        """Sum of the logits; sum of exp(logit - top) (logit - top), for the entropy."""
        self.squares = self.total.clone()
        """Sum of exp(logit - top)^2."""
        self.direction = torch.zeros_like(hidden, dtype=wide) if direction else None
        """[M, D], sum of exp(logit - top) d logit / d hidden."""

    def add(self, logits: Tensor, weight: Tensor, start: int, targets: Tensor, form: LogitForm) -> None:
        """Add a tile: logits [M, C] of the tokens ``start`` to ``start + C``, from ``weight`` [C, D]."""
        inside, places = _inside(targets, start, logits.shape[1])
        self.target = torch.where(inside, logits.gather(1, places[:, None])[:, 0], self.target)
        top = torch.maximum(self.top, logits.amax(dim=1))
        shrink = (self.top - top).exp_()
        if self.metrics:
            self.logit_sum += logits.sum(dim=1)
            moved = torch.where(shrink > 0, self.total * (self.top - top), 0.0)
            self.weighted = (self.weighted + moved) * shrink
        shifted = logits - top[:, None]
        share = shifted.exp()
        self.total = self.total * shrink + share.sum(dim=1)
        if self.metrics:
            self.weighted += torch.bmm(share[:, None], shifted[:, :, None]).flatten()
            self.squares = self.squares * shrink.square() + torch.bmm(share[:, None], share[:, :, None]).flatten()
        if self.direction is not None:
            self.direction.mul_(shrink[:, None]).add_(form.backward_(share, logits).to(weight.dtype) @ weight)
        self.top = top

    def log_total(self) -> Tensor:
        """[M], log of the sum of exp(logit) over the vocabulary."""
        return self.top + self.total.log()

    def scores(self, log_total: Tensor, vocabulary: int) -> list[Tensor]:
        """The columns of ``TokenScores``; without ``metrics`` those beside the log-probs are NaN."""
        logps = self.target - log_total
        if not self.metrics:
            return [logps, *torch.full_like(logps, float("nan")).repeat(4, 1)]
        entropy = self.total.log() - self.weighted / self.total
        top1 = (self.target >= self.top).to(logps.dtype)
        return [logps, entropy, self.logit_sum / vocabulary, top1, self.squares.log() - 2 * self.total.log()]


def _tiles(vocabulary: int, hidden: Tensor) -> list[slice]:
    """Parts of the vocabulary whose logits for all M positions stay within ``TILE_LOGITS``."""
    most = TILE_LOGITS.get(hidden.device.type, TILE_LOGITS["cuda"])
    size = min(vocabulary, max(most // max(len(hidden), 1), min(FEWEST_COLUMNS, most)))
    return [slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)]


def _inside(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Return whether each target lies in a tile, bool [M], and its column there, int64 [M], 0 or the last if not."""
    places = targets - start
    return (places >= 0) & (places < size), places.clamp(0, size - 1)
