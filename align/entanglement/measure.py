"""A shard of pairs -> a row of measurements for each."""

from contextlib import nullcontext
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Value
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align.distributed import local_device
from align.entanglement.conditions import changes, loss_weights, slack
from align.entanglement.products import GradientProducts
from align.entanglement.screening import screen
from align.losses.pairwise import PairLogps
from align.losses.registry import BoundLoss
from align.models.batching import token_batches
from align.models.layout import base_model
from align.models.loading import load_policy, load_tokenizer
from align.models.logps import add_completion_head, pair_logps
from align.models.tokenization import collate
from align.sharding.jobs import Work

SHARD = 32
"""Pairs that a stopped measurement loses at most, and that a process or a worker is given at a time."""


@dataclass(frozen=True, slots=True)
class MeasureJob:
    """One row per pair: gradient products, the loss's weights, first-order changes, the verdict, screening scores."""

    model: str
    """Policy; its trained parameters are measured."""
    reference: str | None
    """Reference model; None: the policy with its adapter off, or the policy itself without one."""
    loss: BoundLoss
    """Any registered loss but beta_dpo."""
    parameters: str | None
    """See ``GradientProducts``."""
    batch_tokens: int
    """Padded tokens of a batch."""
    max_length: int
    """Tokens of prompt and response together."""

    def start(self) -> Work:
        """Load the models; the work takes tokenized pairs, with ``margin`` where the loss needs one."""
        return measuring(load_measured(self.model), self)


def measuring(policy: nn.Module, job: MeasureJob) -> Work:
    """What ``job`` does, with a policy that is loaded already."""
    measure = GradientProducts(policy, job.parameters)
    tokenizer = load_tokenizer(job.model)
    add_completion_head(base_model(policy))
    reference = None
    if job.reference is not None:
        reference = load_policy(job.reference, dtype="float32").to(local_device()).eval()
        add_completion_head(base_model(reference))
    return lambda rows: _measure_part(rows, measure, tokenizer, job.loss, reference, job.batch_tokens, job.max_length)


def load_measured(model: str) -> nn.Module:
    """A policy in float32 on this process's device, an adapter's parameters trainable."""
    return load_policy(model, trainable=True, dtype="float32").to(local_device()).eval()


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
        margin = torch.tensor(chosen["margin"]) if loss.spec.needs_margin else None
        for name, values in _columns(measure, batch, loss, reference, margin).items():
            columns.setdefault(name, np.zeros(len(rows), dtype=values.dtype))[index] = values
    table: dict[str, Any] = {"id": rows["id"], **columns}
    table["token_difference"] = [token_difference(r["chosen_ids"], r["rejected_ids"]) for r in rows]
    if "margin" not in rows.column_names:
        return Dataset.from_dict(table)
    return Dataset.from_dict(table | {"margin": rows["margin"]}).cast_column("margin", Value("float64"))


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
