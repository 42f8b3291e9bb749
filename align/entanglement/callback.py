"""Entanglement along training: every N steps the step's batch, and fixed probe pairs with what it did to them."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.entanglement.conditions import ENTANGLED, FALLS, RISES, changes, loss_weights, products_noise, shares
from align.entanglement.fused import StepProducts, joined, why_not
from align.entanglement.pair_products import PairProducts
from align.entanglement.products import GradientProducts
from align.io.console import log
from align.io.files import read_json, write_json
from align.losses.registry import BoundLoss
from align.models.layout import trim
from align.models.logps import Layout, pair_logps

FEW = 8
"""Pairs of a batch that are measured by a pass of their own where there are no probes."""


class EntanglementCallback(TrainerCallback):
    """Measures the batch of every ``every``-th optimizer step, and probe pairs before and after it.

    Each measurement is one dictionary in ``records``, for the probes and (``batch_...``) for the step's batch. It holds
    the medians of cosine and |gl|/|gw|, the shares of verdicts under the loss in use, and the mean change of log
    p(chosen) and log p(rejected) since the reference. With probes it also holds, for them and for as many pairs of the
    batch, the predicted and the realized mean change of this step, the share of chosen responses that fell, and how
    often predicted and realized signs agree.

    The batch is measured by the step's own passes where they allow it (``StepProducts``): all its pairs. Else as many
    of its pairs as there are probes are measured by a pass of their own, which the log says once with the reason.

    Args:
        model: the policy, not wrapped by a launcher.
        probes: pairs in trl's layout with ``ref_chosen_logps`` and ``ref_rejected_logps``, on the model's device; None:
            only the batch is measured.
        loss: the loss in use, of the log-probs of one pair.
        every: optimizer steps from one measurement to the next.
        file: JSON file of ``records``; a resumed training appends to it.
        batch: returns pairs of the last batch that was trained on, in the same layout.
        layout: layout of the realized log-probs; the trainer's.
        apart: why a step's own passes cannot measure its batch; None if they can, as far as the trainer knows.
    """

    def __init__(
        self,
        model: nn.Module,
        probes: dict[str, Tensor] | None,
        loss: BoundLoss,
        every: int,
        file: Path,
        batch: Callable[[], dict[str, Tensor]],
        layout: Layout = "concatenated",
        apart: str | None = None,
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
        self._of_batch: dict[str, float] | None = None
        self._spent = 0.0
        self._count = FEW if probes is None else len(probes["input_ids"]) // 2
        apart = apart or why_not(model, self.measure)
        if apart is not None:
            log.warning(
                "entanglement: %s, so a step cannot measure its own batch: %d of its pairs are measured by one more "
                "forward and backward pass", apart, self._count,
            )  # fmt: skip
        self.step = StepProducts(self.measure, batch) if apart is None else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Resume: keep the records up to the checkpoint's step."""
        if self.file.exists():
            self.records = [record for record in read_json(self.file) if record["step"] <= state.global_step]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the step measure its own batch."""
        if self.step is not None and state.global_step % self.every == 0:
            self.step.begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the batch at the parameters before the step, and copy these for the probes."""
        if state.global_step % self.every != 0:
            return
        start = time.monotonic()
        if self.step is None:
            batch = _first(self.batch(), self._count)
            parts = [(batch, self.measure(_inputs(batch)))]
        else:
            parts = self.step.end()
        self._of_batch = self._geometry("batch_", _columns([batch for batch, _ in parts]), joined(parts))
        if self.probes is not None:
            self._before = {name: p.detach().clone() for name, p in self.measure.measured.items()}
        self._spent = time.monotonic() - start + (0.0 if self.step is None else self.step.seconds)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the probes at the parameters before the step, then compare with those after it."""
        if self._of_batch is None:
            return
        start = time.monotonic()
        record, self._of_batch = self._of_batch, None
        if self.probes is not None and self._before is not None:
            record |= self._before_and_after(self.probes, self._before)
            self._before = None
        record |= {"step": state.global_step, "seconds": self._spent + time.monotonic() - start}
        self.records.append(record)
        write_json(self.file, self.records)
        which, key = ("batch", "batch_") if self.probes is None else ("probes", "")
        log.info(
            "entanglement at step %d: %.0f%% of the %s entangled, cosine %.2f, |gl|/|gw| %.2f",
            state.global_step, 100 * record[f"{key}entangled"], which, record[f"{key}cosine"],
            record[f"{key}norm_ratio"],
        )  # fmt: skip

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching a step that did not end."""
        if self.step is not None:
            self.step.end()

    def _before_and_after(self, probes: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, float]:
        """Geometry of the probes, and what the step did to them and to pairs of its batch."""
        after = {name: p.detach().clone() for name, p in self.measure.measured.items()}
        self._load(before)
        update = {name: after[name] - before[name] for name in after}
        pairs = {"": probes, "batch_": _first(self.batch(), self._count)}
        products = {key: self.measure(_inputs(batch), update, squares=not key) for key, batch in pairs.items()}
        old = {key: self._logps(batch) for key, batch in pairs.items()}
        self._load(after)
        record = self._geometry("", probes, products[""])
        for key, batch in pairs.items():
            predicted = torch.cat([products[key].chosen_jvp, products[key].rejected_jvp])
            record |= _predicted_and_realized(key, predicted, self._logps(batch) - old[key])
        return record

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


def _columns(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The columns of the pairs of all (micro-)batches of a step, [B] each."""
    names = ("ref_chosen_logps", "ref_rejected_logps", "margin", "trust")
    return {name: torch.cat([batch[name] for batch in batches]) for name in names if name in batches[0]}


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
