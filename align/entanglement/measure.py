"""A table of pairs -> a table of measurements, in resumable parts."""

from contextlib import nullcontext
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align.batching import token_batches
from align.console import progress
from align.entanglement.batch import collate
from align.entanglement.conditions import changes, loss_weights, slack
from align.entanglement.products import GradientProducts
from align.entanglement.screening import screen
from align.loss_registry import BoundLoss
from align.losses import PairLogps
from align.processes import own_share, wait_until
from align.training.layout import base_model
from align.training.logps import add_completion_head, pair_logps

PART = 32
"""Pairs per part; a stopped measurement loses at most one, and processes share the parts."""


def measure_pairs(
    pairs: Dataset,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    loss: BoundLoss,
    *,
    reference: nn.Module | None,
    parameters: str | None,
    batch_tokens: int,
    max_length: int,
    parts: Path,
) -> None:
    """One row per pair: gradient products, the loss's weights, first-order changes, the verdict, screening scores.

    Under a launcher each process measures its share of the parts; ``measured`` gives the whole.

    Args:
        pairs: tokenized pair table (``tokenize_pairs``), with ``margin`` where the loss needs one.
        model: policy; its trained parameters are measured.
        tokenizer: of the policy.
        loss: any registered loss but beta_dpo.
        reference: reference model; None: the policy with its adapter off, or the policy itself without one.
        parameters: see ``GradientProducts``.
        batch_tokens: padded tokens of a batch.
        max_length: tokens of prompt and response together.
        parts: folder for finished parts.
    """
    parts.mkdir(parents=True, exist_ok=True)
    measure = GradientProducts(model, parameters)
    add_completion_head(base_model(model))
    if reference is not None:
        add_completion_head(base_model(reference))
    starts = range(0, len(pairs), PART)
    own = own_share(starts)
    for start in progress(own, what="entanglement", total=len(own), unit="parts"):
        file = _part(parts, start)
        if not file.exists():
            rows = pairs.select(range(start, min(start + PART, len(pairs))))
            made = _measure_part(rows, measure, tokenizer, loss, reference, batch_tokens, max_length)
            temporary = file.with_suffix(".tmp")
            made.to_parquet(str(temporary))
            temporary.replace(file)


def measured(parts: Path, pairs: int) -> Dataset:
    """The measurements of all pairs, once every process has finished its parts.

    Args:
        parts: folder of the parts.
        pairs: how many were to be measured.
    """
    files = [_part(parts, start) for start in range(0, pairs, PART)]
    wait_until(lambda: all(file.exists() for file in files))
    return concatenate_datasets([Dataset.from_parquet(str(file), keep_in_memory=True) for file in files])


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:08d}.parquet"


def _measure_part(
    rows: Dataset,
    measure: GradientProducts,
    tokenizer: PreTrainedTokenizerBase,
    loss: BoundLoss,
    reference: nn.Module | None,
    batch_tokens: int,
    max_length: int,
) -> Dataset:
    lengths = [2 * (len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"]))) for r in rows]
    columns: dict[str, np.ndarray] = {}
    device = next(measure.model.parameters()).device
    for index in token_batches(lengths, batch_tokens):
        chosen = rows.select(index)
        batch = collate(chosen, tokenizer.pad_token_id, max_length=max_length)
        batch = {name: value.to(device) for name, value in batch.items()}
        margin = torch.tensor(chosen["margin"]) if "margin" in rows.column_names else None
        for name, values in _columns(measure, batch, loss, reference, margin).items():
            columns.setdefault(name, np.zeros(len(rows), dtype=values.dtype))[index] = values
    table: dict[str, Any] = {"id": rows["id"], **columns}
    table["token_difference"] = [token_difference(r["chosen_ids"], r["rejected_ids"]) for r in rows]
    if "margin" in rows.column_names:
        table["margin"] = rows["margin"]
    return Dataset.from_dict(table)


def _columns(
    measure: GradientProducts,
    batch: dict[str, Tensor],
    loss: BoundLoss,
    reference: nn.Module | None,
    margin: Tensor | None,
) -> dict[str, np.ndarray]:
    found = measure(batch)
    ref_chosen, ref_rejected = _reference_logps(measure.model, reference, batch)
    logps = PairLogps(
        found.chosen_logps, found.rejected_logps, ref_chosen, ref_rejected, found.chosen_length, found.rejected_length
    )
    d_w, d_l = loss_weights(loss, logps, margin)
    moved = changes(found.chosen_sq, found.rejected_sq, found.inner, d_w, d_l)
    verdicts = moved.verdicts()
    return {
        "chosen_sq": found.chosen_sq.numpy(),
        "rejected_sq": found.rejected_sq.numpy(),
        "inner": found.inner.numpy(),
        "cosine": found.cosine.numpy(),
        "norm_ratio": found.norm_ratio.numpy(),
        "logp_chosen": found.chosen_logps.numpy(),
        "logp_rejected": found.rejected_logps.numpy(),
        "logp_chosen_change": (found.chosen_logps - ref_chosen).numpy(),
        "logp_rejected_change": (found.rejected_logps - ref_rejected).numpy(),
        "tokens_chosen": found.chosen_length.numpy(),
        "tokens_rejected": found.rejected_length.numpy(),
        "d_w": d_w.numpy(),
        "d_l": d_l.numpy(),
        "step_chosen": moved.chosen.numpy(),
        "step_rejected": moved.rejected.numpy(),
        "slack": slack(found.chosen_sq, found.rejected_sq, found.inner, d_w, d_l).numpy(),
        "verdict": np.array(verdicts, dtype=object),
        "entangled": np.array([verdict in {"both fall", "both rise", "reversed"} for verdict in verdicts]),
        **{name: values.numpy() for name, values in screen(measure.model, batch)._asdict().items()},
    }


def _reference_logps(model: nn.Module, reference: nn.Module | None, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probs [B], [B] under the reference, float64 on the CPU."""
    off = model.disable_adapter() if reference is None and hasattr(model, "disable_adapter") else nullcontext()  # type: ignore[operator]
    runner = model if reference is None else reference
    training = runner.training
    runner.eval()
    with torch.no_grad(), off:
        found = pair_logps(runner, batch, "concatenated")
    runner.train(training)
    return found.chosen.double().cpu(), found.rejected.double().cpu()


def token_difference(chosen: list[int], rejected: list[int]) -> float:
    """0 for equal responses, 1 for responses without a common run of tokens."""
    return 1.0 - SequenceMatcher(None, chosen, rejected, autojunk=False).ratio()
