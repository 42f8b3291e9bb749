"""The rows of scripts/study/reward_models.py: every objective as a way to fit a linear head to pairs of snippets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from align.config import ObjectiveSection, SharpnessSection
from align.losses.pair_weights import Shape, shaped
from reward_models import objectives
from reward_models.linear_heads import Loss, Moments, fit_linear
from reward_models.registry import resolve_objective

BAG, LIST, AUC_BATCH, MEMBERS, ROUNDS = 4, 4, 100, 5, 6
TEACHER_PENALTY = 1000.0
"""Penalty of the heads whose margins are distilled; cross-validation mostly chooses it for Bradley-Terry."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """N labeled pairs of snippets, as rows of the feature table."""

    chosen: np.ndarray
    rejected: np.ndarray
    strength: np.ndarray
    """Difference of the rater's two ratings, above 0."""
    gold: np.ndarray
    """Mean rating of chosen minus mean rating of rejected."""

    def __getitem__(self, rows: np.ndarray) -> "Pairs":
        return Pairs(self.chosen[rows], self.rejected[rows], self.strength[rows], self.gold[rows])

    def flipped(self, wrong: np.ndarray) -> "Pairs":
        """The pairs with the labels of those in ``wrong`` flipped."""
        chosen, rejected = np.where(wrong, self.rejected, self.chosen), np.where(wrong, self.chosen, self.rejected)
        return Pairs(chosen, rejected, self.strength, np.where(wrong, -self.gold, self.gold))


@dataclass(frozen=True, slots=True)
class Data:
    """Features and pairs of a cell."""

    features: np.ndarray
    train: Pairs
    teacher: Pairs
    test: Pairs
    rng: np.random.Generator


Fit = Callable[[Data, Pairs, float], np.ndarray]
"""Function of (data, pairs to train on, penalty) that returns a head [D]."""


def by_loss(loss: Loss, columns: Callable[[Data, Pairs], Mapping[str, Tensor]] = lambda data, pairs: {}) -> Fit:
    """Fit a head that minimizes a loss of the two rewards."""

    def fit(data: Data, pairs: Pairs, penalty: float) -> np.ndarray:
        high, low = data.features[pairs.chosen], data.features[pairs.rejected]
        return fit_linear(high, low, loss, columns(data, pairs), penalty=penalty)

    return fit


def by_name(name: str, columns: Any = None, **parameters: float | bool) -> Fit:
    """Fit a head under an objective of the registry."""
    objective = resolve_objective(ObjectiveSection(name=name, parameters=parameters))
    return by_loss(objective) if columns is None else by_loss(objective, columns)


def in_batches(loss: Loss) -> Loss:
    """Apply a loss that couples the pairs of a batch to batches of ``AUC_BATCH`` pairs in their order."""

    def batched(chosen: Tensor, rejected: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        parts = zip(chosen.split(AUC_BATCH), rejected.split(AUC_BATCH), strict=True)
        return torch.cat([loss(high, low, {}) for high, low in parts])

    return batched


def robust(sign: int, temperature: float) -> Loss:
    """The loss whose gradient weights the pairs by the signed tilt."""

    def loss(chosen: Tensor, rejected: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        costs = objectives.bradley_terry(chosen, rejected)
        mean = torch.logsumexp(sign * costs / temperature, 0) - np.log(len(costs))
        return (sign * temperature * mean).expand(len(costs))

    return loss


def reweighted(shape: Shape) -> Fit:
    """Bradley-Terry with weights from the losses of the previous head, ``ROUNDS`` times."""

    def fit(data: Data, pairs: Pairs, penalty: float) -> np.ndarray:
        high, low = data.features[pairs.chosen], data.features[pairs.rejected]
        weight, head = torch.ones(len(high), dtype=torch.float64), None
        for _ in range(ROUNDS):
            head = fit_linear(
                high, low, lambda a, b, columns: columns["w"] * objectives.bradley_terry(a, b), {"w": weight},
                penalty=penalty, start=head,
            )  # fmt: skip
            costs = torch.from_numpy(np.logaddexp(0.0, -(high - low) @ head))
            weight = shaped(costs, shape=shape, temperature=0.4)
        assert head is not None
        return head

    return fit


def margins_of_teacher(data: Data, pairs: Pairs) -> dict[str, Tensor]:
    """Margins of a Bradley-Terry head that was trained on other pairs."""
    return {"teacher_margin": torch.from_numpy(apart(data, pairs) @ BRADLEY_TERRY(data, data.teacher, TEACHER_PENALTY))}


def margins_of_ensemble(data: Data, pairs: Pairs) -> dict[str, Tensor]:
    """Mean margins of ``MEMBERS`` Bradley-Terry heads on resamples of the same pairs."""
    count = len(pairs.gold)
    rng = np.random.default_rng(count)
    resamples = [pairs[rng.integers(0, count, count)] for _ in range(MEMBERS)]
    heads = [BRADLEY_TERRY(data, resample, TEACHER_PENALTY) for resample in resamples]
    return {"teacher_margin": torch.from_numpy(apart(data, pairs) @ np.mean(heads, axis=0))}


def rating_difference(data: Data, pairs: Pairs) -> dict[str, Tensor]:
    """A quarter of the difference of the rater's two ratings."""
    return {"teacher_margin": torch.from_numpy(pairs.strength / 4)}


def bagged(rho: float) -> Fit:
    """Train on bags of ``BAG`` pairs in random order, whose only label is the share of first snippets that won."""

    def fit(data: Data, pairs: Pairs, penalty: float) -> np.ndarray:
        rng = np.random.default_rng(len(pairs.gold))
        first_won = rng.random(len(pairs.gold)) < 0.5
        ordered = pairs.flipped(~first_won)
        bag = np.arange(len(first_won)) // BAG
        share = (np.bincount(bag, first_won) / np.bincount(bag))[bag]
        columns = {"bag": torch.from_numpy(bag), "vote_share": torch.from_numpy(share)}
        loss = resolve_objective(ObjectiveSection(name="aggregated", parameters={"rho": rho}))
        high, low = data.features[ordered.chosen], data.features[ordered.rejected]
        return fit_linear(high, low, loss, columns, penalty=penalty)

    return fit


def decoupled_listwise(acceptable: Tensor, unacceptable: Tensor) -> Tensor:
    """Mean over p of -log(e^r_p / (e^r_p + sum over n of e^r_n)), [P] (arXiv 2310.10636).

    Other acceptable responses are not in the denominator, so two good answers do not compete. With one response each
    it is Bradley-Terry.

    Args:
        acceptable: rewards r_p [P, G] of the acceptable responses to each of P prompts.
        unacceptable: rewards r_n [P, H] of the others.
    """
    return F.softplus(unacceptable.logsumexp(dim=1, keepdim=True) - acceptable).mean(dim=1)


def listwise(data: Data, pairs: Pairs, penalty: float) -> np.ndarray:
    """The same labels as lists of ``LIST`` snippets: winners of ``LIST`` / 2 pairs are acceptable, losers are not."""
    half = LIST // 2
    whole = len(pairs.gold) // half * half
    good, bad = (rows[:whole].reshape(-1, half) for rows in (pairs.chosen, pairs.rejected))

    def loss(chosen: Tensor, rejected: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        return half * decoupled_listwise(chosen.view(-1, half), rejected.view(-1, half))

    return fit_linear(data.features[good.ravel()], data.features[bad.ravel()], loss, {}, penalty=penalty)


def naive_bayes(data: Data, pairs: Pairs, penalty: float) -> np.ndarray:
    """Naive Bayes in closed form; the penalty has no effect."""
    return Moments.of(apart(data, pairs)).naive_bayes()


BRADLEY_TERRY = by_name("bradley_terry")
ROWS: dict[str, Fit] = {
    "bradley_terry": BRADLEY_TERRY,
    "bradley_terry, centring 0.01": by_loss(lambda a, b, columns: objectives.bradley_terry(a, b, centering=0.01)),
    "bradley_terry_margin, rating apart / 4": by_name("bradley_terry_margin", rating_difference),
    "comp_sum, tau 0 (exponential)": by_name("comp_sum", tau=0.0),
    "comp_sum, tau 0.5": by_name("comp_sum", tau=0.5),
    "comp_sum, tau 1.3": by_name("comp_sum", tau=1.3),
    "comp_sum, tau 1.7": by_name("comp_sum", tau=1.7),
    "comp_sum, tau 2 (absolute error)": by_name("comp_sum", tau=2.0),
    "margin_mse, teacher of 3,000 other pairs": by_name("margin_mse", margins_of_teacher),
    "margin_mse, ensemble on the same pairs": by_name("margin_mse", margins_of_ensemble),
    "auc": by_loss(in_batches(resolve_objective(ObjectiveSection(name="auc")))),
    "auc, share 0.1": by_loss(in_batches(resolve_objective(ObjectiveSection(name="auc", parameters={"share": 0.1})))),
    "ldr_kl, lam 0.3": by_name("ldr_kl", lam=0.3),
    "ldr_kl, lam 3": by_name("ldr_kl", lam=3.0),
    "ldr_kl, adaptive": by_name("ldr_kl", adaptive=True),
    "tilt up, t 0.5": by_loss(robust(1, 0.5)),
    "tilt down, t 0.5": by_loss(robust(-1, 0.5)),
    "lin_upper": reweighted("lin_upper"),
    "quadratic": reweighted("quadratic"),
    "extremes": reweighted("extremes"),
    "decoupled_listwise, lists of 4": listwise,
    "aggregated, bags of 4, rho 0": bagged(0.0),
    "aggregated, bags of 4, rho 0.5": bagged(0.5),
    "aggregated, bags of 4, rho 1": bagged(1.0),
    "naive-bayes head": naive_bayes,
}


TUNED: dict[str, tuple[dict[str, Any], Callable[[Data, Pairs], Mapping[str, Tensor]] | None]] = {
    "bradley_terry": ({}, None),
    "bradley_terry_margin, rating apart / 4": (
        {"objective": ObjectiveSection(name="bradley_terry_margin")},
        rating_difference,
    ),
    "comp_sum, tau 1.3": ({"objective": ObjectiveSection(name="comp_sum", parameters={"tau": 1.3})}, None),
    "margin_mse, teacher of 3,000 other pairs": (
        {"objective": ObjectiveSection(name="margin_mse")},
        margins_of_teacher,
    ),
    "bradley_terry, sharpness": ({"sharpness": SharpnessSection()}, None),
}
"""Rows that are also trained with LoRA: fields of the section ``reward``, and the columns that the objective reads.

The penalty on sharpness has no row in ``ROWS``: the mean margin of a linear head has the same gradient everywhere.
"""


def apart(data: Data, pairs: Pairs) -> np.ndarray:
    """Features of chosen minus features of rejected [N, D]."""
    found: np.ndarray = data.features[pairs.chosen] - data.features[pairs.rejected]
    return found
