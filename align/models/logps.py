"""Log-probabilities of the completions of a batch of pairs, in one of two exact layouts.

Legend: B pairs, T padded tokens of the longest of the 2B sequences, N packed tokens, M scored positions.
"""

import functools
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from align.config.columns import PAIR_COLUMNS, REFERENCE_COLUMNS
from align.errors import ModelError
from align.models import attention
from align.models.collator import REAL, ROW
from align.models.exact_kl import ReferenceStates, exact_kl
from align.models.expert_balance import balance_loss
from align.models.lm_head import LogitForm, TokenScores, score_tokens
from align.models.packing import pack

Layout = Literal["concatenated", "shared_prefix"]
TRIAL_TOKENS = 8
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF_HEAD_TOLERANCE = 0.25
"""Largest mean difference of log-probs (nats) due to rounding; 16 bits round logits near 30 by 0.1."""
FORWARD_BEFORE = "_forward_without_completion_head"
NOT_MODEL_INPUTS = frozenset({"completion_mask", *REFERENCE_COLUMNS, *PAIR_COLUMNS, ROW, REAL})


class SequenceLogps(NamedTuple):
    """Log-probabilities of the completions of one batch under one model."""

    chosen: Tensor
    """[B], nats, summed over completion tokens."""
    rejected: Tensor
    """[B], nats, summed over completion tokens."""
    chosen_length: Tensor
    """[B], completion tokens."""
    rejected_length: Tensor
    """[B], completion tokens."""
    tokens: TokenScores
    """Scores of the completion tokens, each [2B, T - 1], at index t - 1 for the token at t; 0 elsewhere."""
    kl: Tensor | None = None
    """KL(policy || reference) summed over the completion tokens, nats, [2B]; None unless asked for."""
    balance: Tensor | None = None
    """Load-balancing loss of a mixture of experts; None unless asked for."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Which hidden states predict which tokens: indices ``places`` [M] of flattened hidden states, ``targets`` [M]."""

    places: Tensor
    targets: Tensor
    width: int
    """Tokens per row of the input; virtual tokens that an adapter puts before them are skipped."""
    temperature: float = 1.0
    """Divisor of the logits."""
    metrics: bool = True
    """Whether entropy, mean logit and top-1 are computed; without, they may be NaN."""
    reference: ReferenceStates | None = None
    """The reference at these places, if the KL to it is computed."""
    keep_states: bool = False
    """Whether the hidden states [M, D] are returned."""
    balanced: Tensor | None = None
    """Mask [2B, T] of the tokens over which experts are balanced, if their loss is computed."""


@dataclass
class ScoredOutput(ModelOutput):
    """Output of a model with a completion head, each [M]; see ``TokenScores``."""

    logps: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    top1: Tensor | None = None
    log_sum_squares: Tensor | None = None
    kl: Tensor | None = None
    states: Tensor | None = None
    balance: Tensor | None = None


def add_completion_head(model: PreTrainedModel) -> None:
    """Make ``model(..., scored=Scored(...))`` return the scores of these tokens only, without full logits.

    This replaces ``model.forward``, so wrappers (PEFT, DDP, FSDP) and their hooks stay in place.

    Raises:
        ModelError: the head does not give the model's own log-probs.
    """
    if hasattr(model, FORWARD_BEFORE):
        return
    setattr(model, FORWARD_BEFORE, model.forward)
    model.forward = MethodType(functools.wraps(type(model).forward)(_forward), model)
    _check_head(model)


def _check_head(model: PreTrainedModel) -> None:
    """Compare the head's log-probs with the model's own on two short random rows.

    Raises:
        ModelError: they differ, because the model does more to its last hidden state than ``LogitForm`` describes.
    """
    embedded = model.get_input_embeddings().weight
    if hasattr(embedded, "ds_id") or isinstance(embedded, DTensor):  # sharded over processes
        return
    ids = torch.randint(embedded.shape[0], (2, TRIAL_TOKENS), generator=torch.Generator().manual_seed(0))
    ids, training = ids.to(embedded.device), model.training
    model.eval()
    with torch.no_grad():
        # forward of the class: accelerate may have wrapped the instance's in autocast, which does not cover the head
        logits = type(model).forward(model, input_ids=ids, use_cache=False).logits.flatten(0, 1)
        targets = ids.flatten().clamp(max=logits.shape[1] - 1)
        places = torch.arange(ids.numel(), device=ids.device)
        found = model(input_ids=ids, use_cache=False, scored=Scored(places, targets, TRIAL_TOKENS)).logps
    model.train(training)
    own = logits.double().log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    difference = float((found - own).abs().mean())
    if difference > HEAD_TOLERANCE.get(model.dtype, HALF_HEAD_TOLERANCE):
        name = model.name_or_path or type(model).__name__
        raise ModelError(
            f"{name}: the log-probs of its output embeddings differ from its own by {difference:.2g} nats a token: "
            f"{type(model).__name__} does more to its last hidden state than is known here",
            code="model-logits",
            hint="use a model of another architecture",
        )


def _forward(self: PreTrainedModel, *args: Any, scored: Scored | None = None, **kwargs: Any) -> Any:
    """``model.forward`` with a completion head; a bound method, so that a copy of the model runs its own weights."""
    if scored is None:
        return getattr(self, FORWARD_BEFORE)(*args, **kwargs)
    if scored.balanced is not None:
        kwargs["output_router_logits"] = True
    found = self.base_model(*args, **kwargs)
    hidden = found.last_hidden_state[:, -scored.width :]
    picked = hidden.flatten(0, 1).index_select(0, scored.places)
    form = replace(LogitForm.of(self.config), temperature=scored.temperature)
    head = self.get_output_embeddings()
    states = picked if scored.keep_states else None
    balance = None
    if scored.balanced is not None:
        packed = kwargs.get("packed_pairs")
        source = None if packed is None else packed.source
        balance = balance_loss(found.router_logits, self.config, scored.balanced, source)
    if scored.reference is None or scored.metrics:
        scores = score_tokens(picked, head, scored.targets, form, metrics=scored.metrics)
        kl = None if scored.reference is None else exact_kl(picked, head, scored.targets, form, scored.reference)[1]
        return ScoredOutput(*scores, kl=kl, states=states, balance=balance)
    logps, kl = exact_kl(picked, head, scored.targets, form, scored.reference)
    empty = torch.full_like(logps, float("nan")).repeat(4, 1)
    return ScoredOutput(logps, *empty, kl=kl, states=states, balance=balance)


def pair_logps(
    model: torch.nn.Module,
    batch: dict[str, Any],
    layout: Layout,
    *,
    metrics: bool = True,
    reference: ReferenceStates | None = None,
    balance: bool = False,
) -> SequenceLogps:
    """Log-probabilities of a batch of pairs.

    Args:
        model: causal language model after ``add_completion_head``, and for ``shared_prefix`` also after
            ``attention.enable``; it may be wrapped by PEFT and by a launcher.
        batch: right-padded, from ``PairCollator``.
        layout: ``concatenated`` runs the 2B sequences as they are; ``shared_prefix`` packs the pairs into one row that
            holds each common prefix of sequences once. Both give the same numbers up to rounding.
        metrics: whether entropy, mean logit and top-1 of the tokens are computed; without, they may be NaN.
        reference: ``pair_states`` of the reference for this batch and layout, if the KL to it is computed.
        balance: whether the load-balancing loss of a mixture of experts is computed, over all tokens of the 2B rows.
    """
    run = _shared_prefix if layout == "shared_prefix" else _concatenated
    balanced = batch["attention_mask"] if balance else None
    return _collect(*run(model, batch, metrics=metrics, reference=reference, balanced=balanced))


def pair_states(model: torch.nn.Module, batch: dict[str, Any], layout: Layout) -> Tensor:
    """Last hidden states [M, D] at the positions of a batch that ``pair_logps`` scores; the arguments are the same."""
    run = _shared_prefix if layout == "shared_prefix" else _concatenated
    states: Tensor = run(model, batch, metrics=False, keep_states=True)[0].states
    return states


Scores = tuple[Any, Tensor, Tensor, Tensor | None]
"""Scores [M]; where they belong, int64 [M], in the flattened [2B, T - 1] tokens; completion tokens, bool [2B, T]; and
``PackedPairs.owner`` if tokens of several rows are computed once."""


def _concatenated(model: torch.nn.Module, batch: dict[str, Any], **options: Any) -> Scores:
    mask = batch["completion_mask"].bool()
    inputs = {key: value for key, value in batch.items() if key not in NOT_MODEL_INPUTS}
    width = mask.shape[1]
    ends = mask[:, 1:].flatten().nonzero().squeeze(1)
    rows, columns = ends // (width - 1), ends % (width - 1)
    scored = Scored(rows * width + columns, batch["input_ids"][:, 1:].flatten()[ends], width, **options)
    return model(**inputs, use_cache=False, scored=scored), ends, mask, None


def _shared_prefix(model: torch.nn.Module, batch: dict[str, Any], **options: Any) -> Scores:
    mask = batch["completion_mask"].bool()
    packed = pack(batch)
    owned = torch.zeros_like(mask).flatten()
    owned[packed.own] = True
    ends = (mask & owned.view_as(mask))[:, 1:].flatten().nonzero().squeeze(1)
    targets = batch["input_ids"][:, 1:].flatten()[ends]
    places = packed.source[:, :-1].flatten()[ends]
    output = model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        attention_mask=attention.no_mask(mask.device),
        packed_pairs=packed,
        use_cache=False,
        scored=Scored(places, targets, packed.input_ids.shape[1], **options),
    )
    return output, ends, mask, packed.owner


def _collect(output: Any, ends: Tensor, mask: Tensor, owner: Tensor | None) -> SequenceLogps:
    """Scatter scores to the positions of their tokens; the arguments are ``Scores``."""
    scored, width = mask[:, 1:], mask.shape[1]
    if owner is not None:
        scorer = (owner // width * (width - 1) + owner % width - 1)[:, 1:].flatten()

    def placed(values: Tensor) -> Tensor:
        column = values.new_zeros(scored.numel()).index_copy(0, ends, values)
        if owner is None:
            return column.view_as(scored)
        return column.index_select(0, scorer).view_as(scored).masked_fill(~scored, 0)

    columns = (output.logps, output.entropy, output.mean_logit, output.top1, output.log_sum_squares)
    tokens = TokenScores(*(placed(values) for values in columns))
    chosen, rejected = tokens.logps.sum(dim=1).chunk(2)
    chosen_length, rejected_length = scored.sum(dim=1).chunk(2)
    kl = None if output.kl is None else placed(output.kl).sum(dim=1)
    return SequenceLogps(chosen, rejected, chosen_length, rejected_length, tokens, kl, output.balance)
