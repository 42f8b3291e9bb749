"""Entanglement along training: fixed probe pairs measured every N steps, and each prediction compared with its step."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.entanglement.conditions import ENTANGLED, FALLS, RISES, changes, loss_weights, products_noise, shares
from align.entanglement.products import GradientProducts, PairProducts
from align.io.console import log
from align.io.files import read_json, write_json
from align.losses.registry import BoundLoss
from align.models.layout import trim
from align.models.logps import Layout, pair_logps

PREFIX = "entanglement/"


class EntanglementCallback(TrainerCallback):
    """Measures probe pairs, and pairs of the batch, before and after every ``every``-th optimizer step.

    Each measurement is one dictionary in ``records``, for the probes and (``batch_...``) for as many pairs of the
    step's batch. It holds the medians of cosine and |gl|/|gw|, the shares of verdicts under the loss in use, and the
    mean change of log p(chosen) and log p(rejected) since the reference; for this step also the predicted and the
    realized mean change, the share of chosen responses that fell, and how often predicted and realized signs agree.

    Args:
        model: the policy, not wrapped by a launcher.
        probes: pairs in trl's layout with ``ref_chosen_logps`` and ``ref_rejected_logps``, on the model's device.
        loss: the loss in use, of the log-probs of one pair.
        every: optimizer steps from one measurement to the next.
        file: JSON file of ``records``; a resumed training appends to it.
        batch: returns pairs of the last batch that was trained on, in the same layout.
        layout: layout of the realized log-probs; the trainer's.
    """

    def __init__(
        self,
        model: nn.Module,
        probes: dict[str, Tensor],
        loss: BoundLoss,
        every: int,
        file: Path,
        batch: Callable[[], dict[str, Tensor]],
        layout: Layout = "concatenated",
    ) -> None:
        self.model = model
        self.probes = probes
        self.batch = batch
        self.loss = loss
        self.every = every
        self.file = file
        self.layout = layout
        self.measure = GradientProducts(model)
        self.records: list[dict[str, float]] = []
        self._before: dict[str, Tensor] | None = None
        self._copying = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Resume: keep the records up to the checkpoint's step."""
        if self.file.exists():
            self.records = [record for record in read_json(self.file) if record["step"] <= state.global_step]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy the parameters if the next step is to be measured."""
        if state.global_step % self.every == 0:
            start = time.monotonic()
            self._before = {name: p.detach().clone() for name, p in self.measure.measured.items()}
            self._copying = time.monotonic() - start

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure at the parameters before the step, then compare with those after it."""
        if self._before is None:
            return
        start = time.monotonic()
        after = {name: p.detach().clone() for name, p in self.measure.measured.items()}
        self._load(self._before)
        update = {name: after[name] - self._before[name] for name in after}
        count = len(self.probes["input_ids"]) // 2
        pairs = {"": self.probes, "batch_": _first(self.batch(), count)}
        products = {key: self.measure(_inputs(batch), update) for key, batch in pairs.items()}
        old = {key: self._logps(batch) for key, batch in pairs.items()}
        self._load(after)
        record: dict[str, float] = {}
        for key, batch in pairs.items():
            predicted = torch.cat([products[key].chosen_jvp, products[key].rejected_jvp])
            record |= self._geometry(key, batch, products[key])
            record |= _predicted_and_realized(key, predicted, self._logps(batch) - old[key])
        self._before = None
        record |= {"step": state.global_step, "seconds": self._copying + time.monotonic() - start}
        self.records.append(record)
        write_json(self.file, self.records)
        log.info(
            "entanglement at step %d: %.0f%% of the probes entangled, cosine %.2f, |gl|/|gw| %.2f",
            state.global_step, 100 * record["entangled"], record["cosine"], record["norm_ratio"],
        )  # fmt: skip

    def _geometry(self, key: str, pairs: dict[str, Tensor], products: PairProducts) -> dict[str, float]:
        ref_chosen, ref_rejected = (pairs[f"ref_{side}_logps"].double().cpu() for side in ("chosen", "rejected"))
        columns = {name: pairs[name].cpu() for name in ("margin", "trust") if name in pairs}
        d_w, d_l = loss_weights(self.loss, products.with_reference(ref_chosen, ref_rejected), **columns)
        squares = (products.chosen_sq, products.rejected_sq, products.inner)
        step = changes(*squares, d_w, d_l, noise=products_noise(self.model))
        share = shares(step.verdicts())
        return {
            f"{key}cosine": float(products.cosine.median()),
            f"{key}norm_ratio": float(products.norm_ratio.median()),
            f"{key}entangled": sum(share[verdict] for verdict in ENTANGLED),
            f"{key}chosen_falls": sum(share[verdict] for verdict in FALLS),
            f"{key}rejected_rises": sum(share[verdict] for verdict in RISES),
            f"{key}chosen_change": float((products.chosen_logps - ref_chosen).mean()),
            f"{key}rejected_change": float((products.rejected_logps - ref_rejected).mean()),
        }

    def _logps(self, batch: dict[str, Tensor]) -> Tensor:
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            logps = pair_logps(self.model, batch, self.layout)
        self.model.train(training)
        return torch.cat([logps.chosen, logps.rejected]).double().cpu()

    def _load(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.measure.measured.items():
                parameter.copy_(values[name])


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}


def _first(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Select the first ``count`` pairs of a batch."""
    count = min(count, len(batch["input_ids"]) // 2)
    return trim(batch, torch.arange(count, device=batch["input_ids"].device))


def _predicted_and_realized(key: str, predicted: Tensor, realized: Tensor) -> dict[str, float]:
    """Metrics of predicted and realized changes [2B], chosen first."""
    half = len(realized) // 2
    return {
        f"{key}predicted_chosen": float(predicted[:half].mean()),
        f"{key}predicted_rejected": float(predicted[half:].mean()),
        f"{key}realised_chosen": float(realized[:half].mean()),
        f"{key}realised_rejected": float(realized[half:].mean()),
        f"{key}fell": float((realized[:half] < 0).double().mean()),
        f"{key}sign_agreement": float((predicted.sign() == realized.sign()).double().mean()),
    }
