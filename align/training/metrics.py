"""Metrics of a step's pairs: trl's, by trl's names, and those of weight and margin."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from align.losses.margin_weights import madpo_weight, margin_regions, trusted_label
from align.losses.pairwise import PairLogps
from align.losses.registry import BoundLoss
from align.models.logps import SequenceLogps

Gather = Callable[[Tensor], Tensor]


class WeightTotals:
    """Weights of the pairs since the last log, which may be many steps of few pairs: sums, smallest and largest."""

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)
        """Number of pairs, sum of w, sum of w^2."""
        self._low, self._high = math.inf, -math.inf

    def add(self, weight: Tensor) -> None:
        """Add the weights [B] by which the losses of B pairs were multiplied."""
        w = weight.detach().double().cpu()
        self._sums += torch.stack([torch.ones_like(w), w, w.square()]).sum(dim=1)
        self._low, self._high = min(self._low, float(w.min())), max(self._high, float(w.max()))

    def flush(self) -> dict[str, float]:
        """Return mean, extremes and effective sample size (Kish, as a share of the pairs); nothing without pairs."""
        count, total, squares = self._sums.tolist()
        low, high = self._low, self._high
        self._sums.zero_()
        self._low, self._high = math.inf, -math.inf
        if not count:
            return {}
        share = total**2 / (count * squares) if squares else 0.0
        return {"weight/mean": total / count, "weight/min": low, "weight/max": high, "weight/ess_share": share}


def own_weight(loss: BoundLoss, margin: Tensor | None, trust: Tensor | None) -> Tensor | float:
    """Factor by which a loss itself multiplies each pair [B]; 1 where it has none.

    ``madpo`` multiplies DPO's loss by w(m), ``trust`` the cross-entropy to its label by ``trusted_label``'s weight.
    """
    parameters = {name: value for name, value in loss.parameters.items() if name != "beta"}
    if margin is not None and loss.spec.name == "madpo":
        return madpo_weight(margin, **parameters)
    if margin is not None and loss.spec.name == "trust":
        return trusted_label(margin, **(parameters if trust is None else parameters | {"trust": trust}))[1]
    return 1.0


class PairMetrics:
    """Collects the pairs of the micro-batches of one step; ``flush`` averages them over all processes.

    Log-probs, rewards and token scores are those of the pairs that a step computes; weights and margins are those of
    all its pairs, with the pairs of weight 0 that it leaves out.

    Args:
        beta: scale of the implicit rewards.
        tau: edge of the margin regions.
        reference: whether the log-probs of the reference are known. Without them a reward is beta log p(response), as
            in trl's CPOTrainer, and no change since the reference is reported.
    """

    def __init__(self, *, beta: float, tau: float, reference: bool = True) -> None:
        self.beta = beta
        self.tau = tau
        self.reference = reference
        self._pairs: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._has_margin = False
        self._single = False

    def add(
        self,
        policy: SequenceLogps,
        logps: PairLogps,
        weight: Tensor,
        margin: Tensor | None,
        real: Tensor | None = None,
    ) -> None:
        """Collect one micro-batch.

        Args:
            policy: log-probs and token scores of B pairs under the policy.
            logps: log-probs of the pairs as the loss saw them.
            weight: [B].
            margin: [B], or None.
            real: [B], False for duplicates that are left out; None: all pairs count.
        """
        of_models = (logps.chosen, logps.rejected, logps.ref_chosen, logps.ref_rejected)
        counts = self._add_rows(of_models, weight, margin, real, logps.thumb)
        self._single = logps.thumb is not None
        tokens = policy.tokens
        sides = [
            (values.detach() * counts.repeat(2)[:, None]).chunk(2)
            for values in (tokens.entropy, tokens.mean_logit, tokens.top1)
        ]
        (entropy_w, entropy_l), (logit_w, logit_l), (hit_w, _) = sides
        self._tokens.append(
            torch.stack(
                [
                    entropy_w.sum(),
                    entropy_l.sum(),
                    logit_w.sum(),
                    logit_l.sum(),
                    hit_w.sum(),
                    (policy.chosen_length * counts).sum().float(),
                    (policy.rejected_length * counts).sum().float(),
                ]
            )
        )

    def add_left_out(self, weight: Tensor, margin: Tensor | None, real: Tensor | None = None) -> None:
        """Collect the pairs of weight 0 that a step does not compute; see ``add``."""
        self._add_rows(None, weight, margin, real)

    def _add_rows(
        self,
        of_models: tuple[Tensor, ...] | None,
        weight: Tensor,
        margin: Tensor | None,
        real: Tensor | None,
        thumb: Tensor | None = None,
    ) -> Tensor:
        """Add a row per pair; return 1 for pairs that count and 0 for the others, [B]."""
        counts = torch.ones_like(weight) if real is None else real.to(weight)
        self._has_margin = margin is not None
        zeros = torch.zeros_like(weight)
        logps = [zeros] * 4 if of_models is None else [values.detach().float() for values in of_models]
        computed = zeros if of_models is None else torch.ones_like(weight)
        columns = [zeros if margin is None else margin, zeros if thumb is None else thumb.to(weight)]
        self._pairs.append(torch.stack([*logps, weight, *columns, computed, counts]).T)
        return counts

    def flush(self, gather: Gather, totals: "WeightTotals") -> dict[str, float]:
        """Return means over the pairs and tokens of all processes since the last flush.

        Args:
            gather: concatenates a tensor over processes along its first dimension (all_gather); called twice.
            totals: receives the weights of the pairs.
        """
        pairs = gather(torch.cat(self._pairs).contiguous())
        tokens = gather(torch.stack(self._tokens).sum(dim=0, keepdim=True)).sum(dim=0)
        self._pairs, self._tokens = [], []
        pairs = pairs[pairs[:, -1] > 0, :-1]
        weight, margin, thumb, computed = pairs[:, 4:].T
        thumb = thumb[computed > 0]
        chosen, rejected, ref_chosen, ref_rejected = pairs[computed > 0, :4].T
        chosen_change, rejected_change = chosen - ref_chosen, rejected - ref_rejected
        gap = chosen_change - rejected_change
        totals.add(weight)
        entropy_w, entropy_l, logits_w, logits_l, hits, n_w, n_l = tokens.tolist()
        if self._single:
            found = single_metrics(chosen, chosen_change, thumb, self.beta)
            return found | {"entropy": entropy_w / max(n_w, 1), "mean_token_accuracy": hits / max(n_w, 1)}
        values: dict[str, Tensor | float] = {
            "rewards/chosen": self.beta * chosen_change.mean(),
            "rewards/rejected": self.beta * rejected_change.mean(),
            "rewards/accuracies": (gap > 0).float().mean(),
            "rewards/margins": self.beta * gap.mean(),
            "logps/chosen": chosen.mean(),
            "logps/rejected": rejected.mean(),
            "entropy": (entropy_w + entropy_l) / max(n_w + n_l, 1),
            "logits/chosen": logits_w / max(n_w, 1),
            "logits/rejected": logits_l / max(n_l, 1),
            "mean_token_accuracy": hits / max(n_w, 1),
        }
        if self.reference:
            values["logps/chosen_change"] = chosen_change.mean()
            values["logps/rejected_change"] = rejected_change.mean()
        if self._has_margin:
            values["margin/disagreement"] = (margin < 0).float().mean()
            for region, share in margin_regions(margin, self.tau).items():
                values[f"margin/share {region}"] = share
        return {name: float(value) for name, value in values.items()}


def single_metrics(logps: Tensor, change: Tensor, thumb: Tensor, beta: float) -> dict[str, float]:
    """Means over the desirable (``chosen``) and the undesirable responses (``rejected``) of a step, by trl's names.

    Args:
        logps: log-probs of N responses under the policy.
        change: those less the reference's, [N].
        thumb: 1 or 0, [N].
        beta: scale of the implicit rewards.
    """
    found: dict[str, float] = {}
    for side, of in (("chosen", thumb > 0.5), ("rejected", thumb <= 0.5)):
        if of.any():
            found[f"rewards/{side}"] = float(beta * change[of].mean())
            found[f"logps/{side}"] = float(logps[of].mean())
            found[f"logps/{side}_change"] = float(change[of].mean())
    if {"rewards/chosen", "rewards/rejected"} <= set(found):
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found
