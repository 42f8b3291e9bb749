"""``measure_entanglement``: how the gradients of the two responses of each pair interact."""

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from align.data.in_memory import pairs_from_dataset
from align.entanglement import measure_pairs
from align.entanglement.measure import load_measured, load_reference
from align.errors import ConfigError, python_words
from align.io.console import log
from align.losses.registry import BoundLoss
from align.models.loading import load_tokenizer
from align.models.tokenization import MAX_LENGTH

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
