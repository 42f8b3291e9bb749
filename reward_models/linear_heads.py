"""Linear heads on frozen features: reward models that train in seconds, and the baseline for fine-tuning.

Legend: N pairs, D features; a head is a vector w [D] and the reward of a text with features e is e w.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from scipy.optimize import minimize
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.config import RewardSection
from align.data.splits import folds_by_prompt
from align.errors import ModelError
from align.io.console import log
from reward_models.covariates import covariate_values
from reward_models.features import FeatureStore, features_of, head_layer
from reward_models.loading import load_options, note_text_pair
from reward_models.pair_weights import pair_weights
from reward_models.score import RewardScorer
from reward_models.tokenization import pair_tokens, told_apart

Loss = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(rewards of chosen [N], of rejected [N], columns) -> loss [N]."""
PENALTIES = tuple(float(value) for value in 10.0 ** np.arange(4, -3, -1))
CAUTIOUS = 1000.0
FOLDS = 5
NOISE = 1e-9
LIGHT = 1.0
"""Penalty of covariates: that of one pair, so that next to nothing of their effect is left to the other features."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, sums and sums of squares of feature differences; moments of two sets of pairs can be added."""

    count: float
    """Number of pairs, or the sum of their weights."""
    sums: np.ndarray
    """[D]."""
    squares: np.ndarray
    """[D]."""

    @classmethod
    def of(cls, differences: np.ndarray, weights: np.ndarray | None = None) -> "Moments":
        """Moments of differences [N, D], chosen minus rejected; of pairs with weights [N] if they are given."""
        w = np.ones(len(differences)) if weights is None else weights
        return cls(float(w.sum()), w @ differences, w @ np.square(differences))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.sums + other.sums, self.squares + other.squares)

    def naive_bayes(self) -> np.ndarray:
        """Head [D] of Gaussian naive Bayes on differences in both orders: w_j = 2 mean_j / variance_j.

        The classes d and -d have the means +mean and -mean and the same variance, so the log-odds of "the first is
        better" are 2 sum_j mean_j d_j / variance_j (arXiv 2302.02334 compares it with logistic regression).
        """
        mean = self.sums / self.count
        variance = self.squares / self.count - mean**2
        floor = NOISE * max(float(variance.max()), np.finfo(np.float64).tiny)
        head: np.ndarray = 2 * mean / np.maximum(variance, floor)
        return head


def fit_linear(
    chosen: np.ndarray,
    rejected: np.ndarray,
    loss: Loss,
    columns: Mapping[str, Tensor],
    *,
    penalty: float,
    start: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    free: int = 0,
) -> np.ndarray:
    """Head [D] that minimizes the sum of the loss + penalty |w s|^2 / 2; s: root mean squares of the differences.

    Args:
        chosen: features [N, D].
        rejected: features [N, D].
        loss: loss of two rewards.
        columns: other columns that the loss reads.
        penalty: L2 penalty, above 0.
        start: initial head, [D]; None: zeros.
        weights: factor of each pair's loss, [N]; None: 1.
        free: number of last features that have the penalty ``LIGHT`` instead.
    """
    scale = _scale(chosen - rejected)
    high, low = (torch.from_numpy(features / scale) for features in (chosen, rejected))
    factor = torch.ones(len(high), dtype=high.dtype) if weights is None else torch.from_numpy(weights)
    ridge = torch.full((chosen.shape[1],), penalty, dtype=high.dtype)
    ridge[chosen.shape[1] - free :] = LIGHT

    def value(point: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(point).requires_grad_()
        total = (factor * loss(high @ w, low @ w, columns)).sum() + (ridge * w * w).sum() / 2
        (gradient,) = torch.autograd.grad(total, w)
        return float(total.detach()), gradient.numpy()

    first = np.zeros(chosen.shape[1]) if start is None else start * scale
    found: np.ndarray = minimize(value, first, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    return found / scale


def fit_logistic(
    chosen: np.ndarray, rejected: np.ndarray, fold: np.ndarray, weights: np.ndarray | None = None, *, free: int = 0
) -> tuple[np.ndarray, float]:
    """Head [D] of L2-penalized logistic regression, and its penalty, chosen by cross-validated log-loss (fold [N]).

    The penalty is chosen on all pairs with weight 1, whatever their weights are; the head is fitted with it per unit of
    weight. Pairs that a rule kept because a head agrees with them look separable: cross-validated on them alone, the
    smallest penalty wins, and the head is wrong on all others. Give the pairs that were left out the weight 0.

    If all pairs are in one fold, nothing can choose the penalty, and it is ``CAUTIOUS``.

    Args:
        chosen: features [N, D].
        rejected: features [N, D].
        fold: [N].
        weights: factor of each pair's loss, [N]; None: 1.
        free: number of last features that are covariates, see ``fit_linear``.
    """
    share = 1.0 if weights is None else float(weights.mean())

    def fitted(penalty: float) -> tuple[np.ndarray, float]:
        head = fit_linear(chosen, rejected, _logistic, {}, penalty=penalty * share, weights=weights, free=free)
        return head, penalty

    if len(np.unique(fold)) < 2:
        return fitted(CAUTIOUS)
    losses = np.zeros(len(PENALTIES))
    for number in np.unique(fold):
        inside = fold == number
        head: np.ndarray | None = None
        for k, penalty in enumerate(PENALTIES):
            head = fit_linear(chosen[~inside], rejected[~inside], _logistic, {}, penalty=penalty, start=head, free=free)
            losses[k] += np.logaddexp(0.0, -(chosen[inside] - rejected[inside]) @ head).sum()
    return fitted(PENALTIES[int(losses.argmin())])


def train_head(
    train: Dataset, config: RewardSection, *, seed: int, cache: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The backbone with a fitted head instead of its own, and its tokenizer.

    Args:
        train: pair table.
        config: ``model``, ``head`` (logistic or naive-bayes), batch size and length.
        seed: seed of the folds, and of layers that the backbone lacks.
        cache: folder for the features, which trainings on the same backbone share, and from which a stopped pass
            resumes; None: no cache.

    Raises:
        ModelError: the model's head is not one linear layer.
    """
    transformers.set_seed(seed)
    scorer = RewardScorer(
        config.model,
        batch_tokens=config.batch_tokens,
        max_length=config.max_length,
        options=load_options(config),
        new_head=True,
    )
    layer = head_layer(scorer.model)
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"{config.model}: its head is a {type(layer).__name__}, expected one linear layer, for reward.head",
            code="reward-head",
            hint="use `reward.head: full`",
        )
    read = pair_tokens(train, scorer.tokenizer, scorer.max_length, text_pair=scorer.text_pair)
    kept = told_apart(train, read.alike, scorer.max_length)
    train, read = train.select(kept), read.of(kept)
    store = None if cache is None else FeatureStore(cache, scorer)
    chosen, rejected = np.split(features_of(scorer, [*read.chosen, *read.rejected], store), 2)
    weights = pair_weights(train)
    if config.head == "naive-bayes":
        head = Moments.of(chosen - rejected, weights).naive_bayes()
    else:
        z = covariate_values(train, config.covariates)
        fold = folds_by_prompt(train, min(FOLDS, len(train)), seed)
        found, penalty = fit_logistic(
            np.hstack([chosen, z]), np.hstack([rejected, 0 * z]), fold, weights, free=z.shape[1]
        )
        head = found[: chosen.shape[1]]
        log.info("logistic head on %d features: penalty %g by %d folds", len(head), penalty, len(np.unique(fold)))
        for name, value in zip(config.covariates, found[len(head) :], strict=True):
            log.info("covariate %s: %.3g log-odds per root mean square, left out of the score", name, value)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(head).to(layer.weight)[None])
        if layer.bias is not None:
            layer.bias.zero_()
    note_text_pair(scorer.model, scorer.text_pair)
    return scorer.model.cpu(), scorer.tokenizer


def _logistic(chosen: Tensor, rejected: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    return -nn.functional.logsigmoid(chosen - rejected)


def _scale(differences: np.ndarray) -> np.ndarray:
    spread: np.ndarray = np.sqrt(np.square(differences).mean(axis=0))
    return np.where(spread > NOISE * max(float(spread.max()), np.finfo(np.float64).tiny), spread, 1.0)
