"""Gradient products, loss weights, first-order changes and verdict of every pair, under a model that is loaded."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Value
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align.data.statistics import missing_values
from align.entanglement.conditions import ENTANGLED, changes, loss_weights, products_noise, slack
from align.entanglement.padding_lookups import report_padding_lookups
from align.entanglement.products import GradientProducts
from align.entanglement.screening import screening_scores
from align.errors import ConfigError, DataError, ModelError
from align.losses.registry import BoundLoss, resolve
from align.models.adapters import adapter_of_the_start, stays_when_off
from align.models.batching import token_batches
from align.models.layout import base_model, has_adapter
from align.models.logps import add_completion_head, pair_logps
from align.models.positions import check_positions
from align.models.tokenization import MAX_LENGTH, collate, tokenize_pairs

BATCH_TOKENS = 2048
"""Padded tokens of a batch."""


def measure_entanglement(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    *,
    loss: str | BoundLoss = "dpo",
    max_length: int = MAX_LENGTH,
    reference: nn.Module | None = None,
) -> Dataset:
    """Measure how the gradients of the chosen and the rejected response of each pair interact (arXiv 2410.13828).

    gw and gl are the gradients of the summed log-probs of the chosen and of the rejected response over the trainable
    parameters. The reference of the loss is what the model's adapter was trained from: the model with the adapter off,
    or the adapter ``ref`` where trl keeps the start of one that is trained further. A model without adapter is its own.

    Args:
        model: causal language model, with its adapter if it has one. Its weights, gradients and mode stay as they are.
        tokenizer: the model's.
        pairs: rows with ``prompt``, ``chosen`` and ``rejected``; ``margin`` where the loss needs one. ``id`` is
            optional and defaults to the number of the row.
        loss: name in ``align.losses.registry.LOSSES`` with its default parameters, or what ``resolve`` returned;
            a loss of the log-probs of one pair.
        max_length: tokens of prompt and response together; the rest is truncated.
        reference: another reference of the loss.

    Returns:
        One row per pair, in the order of ``pairs``: ``chosen_sq`` |gw|^2, ``rejected_sq`` |gl|^2, ``inner``
        <gw, gl>, ``cosine``, ``norm_ratio`` |gl| / |gw|; log-probs (nats) and their changes since the reference;
        ``d_w`` and ``d_l``, the loss's weights of the two gradients; ``step_chosen`` and ``step_rejected``, the
        first-order changes of the log-probs per unit of step size; ``slack``, ``verdict`` and ``entangled``; and the
        scores of align/entanglement/screening.py.

    Raises:
        ConfigError: the loss is not known, or has no verdict for one pair alone.
        DataError: a margin is missing, or truncation leaves nothing of a response.
        ModelError: a parameter cannot be measured, or turning the adapter off does not give the reference.
    """
    bound = checked_loss(loss, pairs)
    if "id" not in pairs.column_names:
        pairs = pairs.add_column("id", [str(number) for number in range(len(pairs))])
    tokens = tokenize_pairs(pairs, tokenizer, max_length=max_length)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    report_padding_lookups(model, tokens)
    return PairMeasurement(GradientProducts(model), bound, padding or 0, reference, max_length=max_length)(tokens)


@dataclass(frozen=True, slots=True)
class PairMeasurement:
    """Measures tokenized pairs under one model; one row per pair, see ``measure_entanglement``."""

    products: GradientProducts
    """Holds the model."""
    loss: BoundLoss
    """A loss of the log-probs of one pair (``from_logps``)."""
    pad_token_id: int
    reference: nn.Module | None = None
    """None: what the model's adapter was trained from, or the model itself without one."""
    batch_tokens: int = BATCH_TOKENS
    """Padded tokens of a batch."""
    max_length: int = MAX_LENGTH
    """Tokens of prompt and response together."""
    is_reference: bool = False
    """Whether the model is its own reference, with its adapter if it has one."""

    def __post_init__(self) -> None:
        """Let the models score completion tokens.

        Raises:
            ModelError: the head of one does more than is known here, or the reference is the model with its adapter
                off and something of the adapter stays.
        """
        stays = None if self.reference is not None or self.is_reference else stays_when_off(self.products.model)
        if stays is not None:
            raise ModelError(
                f"{stays}: the model with this adapter off is not the model that the adapter was trained from",
                code="adapter",
                hint="measure the adapter's folder with `align entangle report`, which loads that model too",
            )
        for model in (self.products.model, self.reference):
            if model is not None:
                add_completion_head(base_model(model))

    def batches(self, rows: Dataset) -> Iterator[tuple[list[int], dict[str, Tensor], Tensor | None]]:
        """Rows of ``tokenize_pairs`` in batches of like lengths: their places, a batch in trl's layout, margins [B].

        Raises:
            ModelError: the longest pair has more tokens than a model has positions.
        """
        lengths = [2 * (len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"]))) for r in rows]
        longest = max((min(length // 2, self.max_length) for length in lengths), default=0)
        for model in (self.products.model, self.reference):
            if model is not None:
                check_positions(base_model(model), longest, "the longest pair", "lower --max-length")
        device = next(self.products.model.parameters()).device
        for index in token_batches(lengths, self.batch_tokens):
            selected = rows.select(index)
            batch = collate(selected, self.pad_token_id, max_length=self.max_length)
            batch = {name: value.to(device) for name, value in batch.items()}
            yield index, batch, torch.tensor(selected["margin"]) if self.loss.spec.needs_margin else None

    def __call__(self, rows: Dataset) -> Dataset:
        """Measure rows of ``tokenize_pairs``, with ``margin`` where the loss needs one."""
        columns: dict[str, np.ndarray] = {}
        for index, batch, margin in self.batches(rows):
            for name, values in self._columns(batch, margin).items():
                columns.setdefault(name, np.zeros(len(rows), dtype=values.dtype))[index] = values
        table: dict[str, Any] = {"id": rows["id"], **columns}
        table["token_difference"] = [token_difference(r["chosen_ids"], r["rejected_ids"]) for r in rows]
        if "margin" not in rows.column_names:
            return Dataset.from_dict(table)
        return Dataset.from_dict(table | {"margin": rows["margin"]}).cast_column("margin", Value("float64"))

    def _columns(self, batch: dict[str, Tensor], margin: Tensor | None) -> dict[str, np.ndarray]:
        """Columns [B] of one batch in trl's layout."""
        model, products = self.products.model, self.products(batch)
        ref_chosen, ref_rejected = self.reference_logps(batch) or (products.chosen_logps, products.rejected_logps)
        d_w, d_l = loss_weights(self.loss, products.with_reference(ref_chosen, ref_rejected), margin)
        squares = (products.chosen_sq, products.rejected_sq, products.inner)
        step = changes(*squares, d_w, d_l, noise=products_noise(model))
        verdicts = step.verdicts()
        measured = {
            "chosen_sq": products.chosen_sq,
            "rejected_sq": products.rejected_sq,
            "inner": products.inner,
            "cosine": products.cosine,
            "norm_ratio": products.norm_ratio,
            "logp_chosen": products.chosen_logps,
            "logp_rejected": products.rejected_logps,
            "logp_chosen_change": products.chosen_logps - ref_chosen,
            "logp_rejected_change": products.rejected_logps - ref_rejected,
            "tokens_chosen": products.chosen_length,
            "tokens_rejected": products.rejected_length,
            "d_w": d_w,
            "d_l": d_l,
            "step_chosen": step.chosen,
            "step_rejected": step.rejected,
            "slack": slack(*squares, d_w, d_l),
        }
        return {
            **{name: values.numpy() for name, values in measured.items()},
            "verdict": np.array(verdicts, dtype=object),
            "entangled": np.array([verdict in ENTANGLED for verdict in verdicts]),
            **{name: values.numpy() for name, values in screening_scores(model, batch)._asdict().items()},
        }

    def reference_logps(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Log-probs [B] of the chosen and of the rejected responses under the reference, nats, float64 on the CPU.

        None if the model is its own reference: its log-probs have not changed, to the bit.
        """
        model = self.products.model if self.reference is None else self.reference
        with_adapter = self.reference is None and has_adapter(model)
        if self.is_reference or (self.reference is None and not with_adapter):
            return None
        training = model.training
        model.eval()
        with torch.no_grad(), adapter_of_the_start(model) if with_adapter else nullcontext():
            logps = pair_logps(model, batch, "concatenated")
        model.train(training)
        return logps.chosen.double().cpu(), logps.rejected.double().cpu()


def checked_loss(loss: str | BoundLoss, pairs: Dataset) -> BoundLoss:
    """The loss with its parameters, once it is known that these pairs can be measured under it.

    Raises:
        ConfigError, DataError: see ``measure_entanglement``.
    """
    if not isinstance(loss, str | BoundLoss):
        raise ConfigError(
            f"loss: found {loss!r}, expected the name of a loss",
            code="entanglement-loss",
            hint="measure the terms of a sum one by one, or compare them with `align entangle losses --sum`",
        )
    bound = resolve(loss, {}) if isinstance(loss, str) else loss
    if not bound.spec.from_logps:
        raise ConfigError(
            f"loss {bound.spec.name}: compares the pairs of a step or reads tokens: a pair alone has no verdict",
            code="entanglement-loss",
            hint="measure with loss dpo",
        )
    if bound.spec.needs_margin:
        missing = len(missing_values(pairs, "margin") if "margin" in pairs.column_names else pairs)
        if missing:
            raise DataError(
                f"loss {bound.spec.name} needs a `margin` of every pair, found {missing} of {len(pairs)} without one",
                code="loss-needs-margin",
                hint="score the pairs with a reward model first, or measure with loss dpo",
            )
    return bound


def token_difference(chosen: list[int], rejected: list[int]) -> float:
    """Difference of two responses: 0 for equal ones, 1 for responses without a common run of tokens."""
    return 1.0 - SequenceMatcher(None, chosen, rejected, autojunk=False).ratio()
