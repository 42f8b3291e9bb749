"""``measure_entanglement`` and ``measure_influence``: what a step on each pair does, to itself and to others."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from align.data.held_out_pairs import distinct, groups_of
from align.data.in_memory import pairs_from_dataset
from align.entanglement import compare_losses as incentives
from align.entanglement import influence, measure_pairs
from align.entanglement.adam_states import read_adam_state
from align.entanglement.measure import load_measured, load_reference
from align.entanglement.products import GradientProducts
from align.errors import ConfigError, ModelError, python_words
from align.io.console import log
from align.losses.registry import LOSSES, BoundLoss, resolve
from align.losses.sums import resolve_sum
from align.models.loading import load_tokenizer
from align.models.tokenization import MAX_LENGTH, tokenize_pairs

NAMES = {"step_chosen": "chosen_change", "step_rejected": "rejected_change"}
"""Columns of the command's table -> their names here."""
HINTS = {
    "loss-needs-margin": "score the pairs first: reward_models.RewardModel.from_pretrained(...).score_pairs(pairs), or "
    'measure with loss="dpo"',
    "entanglement-loss": 'measure with loss="dpo"',
    "empty-completion": "raise max_length, or leave the pairs out",
}


def measure_entanglement(
    model: str | Path | nn.Module,
    tokenizer: PreTrainedTokenizerBase | str | None,
    pairs: Any,
    *,
    loss: str | BoundLoss = "dpo",
    max_length: int = MAX_LENGTH,
) -> Dataset:
    """Measure exactly how a training step on each pair changes the log-probs of its two responses.

    gw and gl are the gradients of the summed log-probs of the chosen and of the rejected response over the trainable
    parameters (arXiv 2410.13828). `align entangle report` measures the same.

    Args:
        model: causal language model, with its adapter if it has one; or a folder or hub id. The reference of the loss
            is what the adapter was trained from (its base, or the adapter that its training started from), or the
            model itself. Weights, gradients and mode of a loaded model stay
            as they are. Everything is computed in float32: of a model in 16 bits a copy is made.
        tokenizer: the model's, or its folder or hub id; None: that of ``model``, if it is a folder or hub id.
        pairs: what ``pairs_from_dataset`` takes, with ``margin`` where the loss needs one.
        loss: a name of ``align.LOSSES`` with its default parameters, or a bound loss; not beta_dpo.
        max_length: tokens of prompt and response together; the rest is truncated.

    Returns:
        One row per pair, in their order: ``id``; ``chosen_sq`` |gw|^2, ``rejected_sq`` |gl|^2, ``inner`` <gw, gl>,
        ``cosine``, ``norm_ratio`` |gl| / |gw|; ``chosen_change`` and ``rejected_change``, the first-order changes of
        the log-probs (nats) by a gradient step on the pair, per unit of learning rate; ``verdict`` (``separated``,
        ``both fall``, ``both rise``, ``reversed``, ``no signal``, ``undecided``), ``entangled`` and ``slack``;
        ``d_w`` and ``d_l``, the loss's weights of the two gradients; log-probs, their changes since the reference,
        numbers of tokens, and the scores of align/entanglement/screening.py.

    Raises:
        ConfigError: the loss is not known or has no verdict for one pair, or the model is none.
        DataError: the pairs cannot be used, a margin is missing, or truncation leaves nothing of a response.
        ModelError: the model or the tokenizer cannot be loaded, or a parameter cannot be measured.
    """
    table = pairs_from_dataset(pairs)
    with python_words(HINTS):
        if not isinstance(model, str | Path | nn.Module):
            raise ConfigError(
                f"model: found {model!r}, expected a loaded model, its folder or hub id", code="config-option"
            )
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
            raise ConfigError(f"max_length: found {max_length!r}, expected at least 2 tokens", code="config-option")
        bound = measure_pairs.checked_loss(loss, table)
        found = measure_pairs.measure_entanglement(
            load_measured(str(model)) if isinstance(model, str | Path) else _in_float32(model),
            _tokenizer(tokenizer, model),
            table,
            loss=bound,
            max_length=max_length,
            reference=load_reference(str(model)) if isinstance(model, str | Path) else None,
        )
    return found.rename_columns(NAMES)


def compare_losses(
    model: str | Path | nn.Module,
    tokenizer: PreTrainedTokenizerBase | str | None,
    pairs: Any,
    *,
    losses: Sequence[str | Mapping[str, Any] | BoundLoss] | None = None,
    max_length: int = MAX_LENGTH,
) -> Dataset:
    """Compare what a training step under each loss does to the same pairs: one measurement, whatever the number.

    `align entangle losses` prints the same table.

    Args:
        model: see ``measure_entanglement``.
        tokenizer: see ``measure_entanglement``.
        pairs: see ``measure_entanglement``; losses that need a margin are left out if a pair has none.
        losses: names of ``align.LOSSES``, sums such as ``{"dpo": 1.0, "nll": 0.1}``, or bound losses; None: every loss.
        max_length: see ``measure_entanglement``.

    Returns:
        One row per loss, the one that lowers the fewest chosen responses first: ``loss``; ``d_w`` and ``d_l``, medians
        of its weights of the two gradients; ``falls``, the share of the pairs whose chosen response a step on the pair
        lowers, with ``falls_low`` and ``falls_high``, its 95% interval (None if too few pairs); ``rejected_rises``;
        ``nll_for_most`` and ``nll_for_all``, the smallest weights of an ``nll`` term under which the chosen response
        falls in at most 5%, and in none, of the pairs. Losses that read tokens are left out, which is logged.

    Raises:
        ConfigError: a loss or a sum is not known, or ``losses`` is empty.
        DataError, ModelError: see ``measure_entanglement``.
    """
    if isinstance(losses, str) or (losses is not None and not losses):
        raise ConfigError(f"losses: found {losses!r}, expected a list of names of align.LOSSES", code="config-option")
    with python_words(HINTS):
        bound = [_bound(loss) for loss in (LOSSES if losses is None else losses)]
    measured = measure_entanglement(model, tokenizer, pairs, max_length=max_length)
    found, left_out = incentives.compare_losses(measured, bound)
    for name, why in left_out.items():
        log.info("compare_losses: %s is left out: it %s", name, why)
    rows = []
    for item in found:
        interval = {"falls": item.falls["value"], "falls_low": item.falls["low"], "falls_high": item.falls["high"]}
        rows.append(item.to_dict() | interval)
    return Dataset.from_list(rows)


def _bound(loss: str | Mapping[str, Any] | BoundLoss) -> BoundLoss:
    if isinstance(loss, BoundLoss):
        return loss
    if isinstance(loss, Mapping):
        return resolve_sum(dict(loss), {})
    return resolve(loss, {})


def measure_influence(
    model: str | Path | nn.Module,
    tokenizer: PreTrainedTokenizerBase | str | None,
    pairs: Any,
    held_out: Any,
    *,
    loss: str | BoundLoss = "dpo",
    target: str | BoundLoss | None = None,
    adam_state: str | Path | None = None,
    max_length: int = MAX_LENGTH,
) -> Dataset:
    """Measure what a training step on each pair alone does to a held-out loss, to first order.

    It explains which pairs moved a model; it is not a filter score and not a weight (docs/influence.md). `align
    entangle influence` measures the same, sums it over the checkpoints of a run, and writes a page.

    Args:
        model: see ``measure_entanglement``.
        tokenizer: see there.
        pairs: training pairs.
        held_out: held-out pairs, with ``group`` for an influence on each group. Those that are in ``pairs`` too are
            left out, with a warning.
        loss: training loss; see ``measure_entanglement``.
        target: held-out loss; None: the training loss. ``"nll"`` reads the chosen responses alone.
        adam_state: folder of a checkpoint of transformers' ``Trainer`` with the state of AdamW.
        max_length: tokens of prompt and response together; the rest is truncated.

    Returns:
        One row per pair, in their order: ``id``; ``influence``, the change of the mean held-out loss per unit of
        learning rate by a plain gradient step on the pair, ``influence_chosen`` and ``influence_rejected``, what of it
        came from the two responses; the same for each held-out group as ``influence@GROUP``, ...; with ``adam_state``
        ``adamw``, ... for steps scaled as AdamW scales them; ``d_w`` and ``d_l``. Negative: the step lowers the loss.

    Raises:
        ConfigError, DataError, ModelError: see ``measure_entanglement``; all held-out pairs are training pairs, or the
            optimizer's state is missing or that of another model.
    """
    table, held = pairs_from_dataset(pairs), pairs_from_dataset(held_out)
    with python_words(HINTS):
        bound = measure_pairs.checked_loss(loss, table)
        target_loss = bound if target is None else measure_pairs.checked_loss(target, held)
        if target is None:
            measure_pairs.checked_loss(bound, held)
        held, told = distinct(held, table, "held_out")
        groups, more = groups_of(held)
        for line in told + more:
            log.warning("measure_influence: %s", line)
        loaded = load_measured(str(model)) if isinstance(model, str | Path) else _in_float32(model)
        reads = _tokenizer(tokenizer, model)
        products = GradientProducts(loaded)
        state = None if adam_state is None else read_adam_state(Path(adam_state), loaded, products.measured)
        if isinstance(state, str):
            raise ModelError(f"adam_state: {state}", code="influence-checkpoint", hint="give the checkpoint's folder")
        reference = load_reference(str(model)) if isinstance(model, str | Path) else None
        padding = reads.eos_token_id if reads.pad_token_id is None else reads.pad_token_id
        training = measure_pairs.PairMeasurement(products, bound, padding or 0, reference, max_length=max_length)
        tokens, held_tokens = (tokenize_pairs(rows, reads, max_length=max_length) for rows in (table, held))
        found = influence.held_out(replace(training, loss=target_loss), held_tokens, groups)
        measured = influence.InfluenceMeasurement(training, influence.directions_of(found, state))(tokens)
        return influence.with_whole(measured, {group.name: group.pairs for group in found})


def _in_float32(model: nn.Module) -> nn.Module:
    """The model, or a copy in float32 if it has weights in 16 bits, whose products would be too inexact for verdicts.

    A quantized model stays as it is; what of it can be measured, its adapter, is checked later.
    """
    sixteen = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters())
    if not sixteen or getattr(model, "is_quantized", False):
        return model
    log.info("measure_entanglement: the model has 16-bit weights; a copy in float32 is measured")
    return copy.deepcopy(model).float()


def _tokenizer(tokenizer: PreTrainedTokenizerBase | str | None, model: str | Path | nn.Module) -> Any:
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        return tokenizer
    if tokenizer is None and isinstance(model, nn.Module):
        raise ConfigError(
            "tokenizer: found None, expected that of the loaded model",
            code="config-option",
            hint="AutoTokenizer.from_pretrained loads it",
        )
    return load_tokenizer(str(model if tokenizer is None else tokenizer))
