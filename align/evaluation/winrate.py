"""Win rate of policy A over policy B from judgements in both orders, plain and length-controlled. Pure.

Length control follows AlpacaEval 2 (Dubois et al., arXiv 2404.04475; tatsu-lab/alpaca_eval, ``glm_winrate.py``): fit a
logistic regression of the preference on tanh(d / std(d)), d the difference of the lengths in characters, and predict
the mean preference at d = 0. AlpacaEval's regression has two more terms, a difficulty of each instruction and a verbose
and a concise variant of the baseline. Both are estimated from many models on one fixed set of instructions, which an
evaluation on the user's own prompts lacks. The model here is P(A preferred) = sigmoid(a + b tanh(d / std(d))), and the
length-controlled win rate is sigmoid(a).
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from align.stats import Estimate, influence_interval, mean_interval, share_interval

ROUNDING = 1e-5
"""A preference over both orders this close to one half is a tie: probabilities in float32 differ by as much between
batches."""
RIDGE = (0.01, 0.1)
"""Penalties on a and b: too weak to change an estimate, strong enough to keep it finite if A always wins."""
NEWTON_STEPS = 60
LARGEST_STEP = 4.0


@dataclass(frozen=True, slots=True)
class LengthControl:
    """The win rate at equal lengths."""

    rate: Estimate
    slope: float
    """b: change of the log-odds of A per unit of tanh(d / std(d)); above 0 the judge prefers longer responses."""
    extrapolated: bool
    """A was longer (or shorter) on every prompt, so equal lengths are outside the data."""


@dataclass(frozen=True, slots=True)
class WinRate:
    """Head-to-head result of A against B."""

    rate: Estimate
    """Mean preference for A over both orders; a tie counts half."""
    wins: int
    ties: int
    losses: int
    position_bias: Estimate
    """Amount that being shown first adds to the preference; it cancels in ``rate``."""
    consistent: float
    """Share of prompts on which both orders give the same verdict."""
    length_controlled: LengthControl | None
    """None if all length differences are equal and not 0: length and policy cannot be separated."""
    length_difference: Estimate
    """Characters of A minus characters of B."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def win_rate(
    shown_first: ArrayLike,
    shown_second: ArrayLike,
    length_a: ArrayLike,
    length_b: ArrayLike,
) -> WinRate:
    """Win rate of A over B with 95% intervals over the N prompts.

    Args:
        shown_first: preference for A when A is shown first, [N]: 1 A, 0 B, 0.5 a tie; probabilities are allowed.
        shown_second: preference for A (not for the first) when A is shown second, [N].
        length_a: characters of A's responses, [N].
        length_b: characters of B's responses, [N].

    Raises:
        ValueError: there are no prompts, the shapes differ, or a preference is outside [0, 1].
    """
    first, second = np.asarray(shown_first, dtype=np.float64), np.asarray(shown_second, dtype=np.float64)
    difference = np.asarray(length_a, dtype=np.float64) - np.asarray(length_b, dtype=np.float64)
    if first.ndim != 1 or first.size == 0 or not first.shape == second.shape == difference.shape:
        raise ValueError(f"expected equal shapes [N], got {first.shape}, {second.shape}, {difference.shape}")
    both = np.stack([first, second])
    if not ((both >= 0) & (both <= 1)).all():
        raise ValueError("preferences must lie in [0, 1]")
    outcome = (first + second) / 2
    lead = np.where(np.abs(outcome - 0.5) <= ROUNDING, 0.0, outcome - 0.5)
    return WinRate(
        rate=share_interval(outcome),
        wins=int((lead > 0).sum()),
        ties=int((lead == 0).sum()),
        losses=int((lead < 0).sum()),
        position_bias=mean_interval((first - second) / 2),
        consistent=float((np.sign(first - 0.5) == np.sign(second - 0.5)).mean()),
        length_controlled=length_control(outcome, difference),
        length_difference=mean_interval(difference),
    )


def length_control(outcome: np.ndarray, difference: np.ndarray) -> LengthControl | None:
    """The win rate at equal lengths with its 95% interval; see the top of this file.

    The interval is that of the intercept from the influence of each prompt on the fit, on the scale of log-odds. Where
    A wins, or loses, every prompt, the interval is that of the plain win rate: the fit adds nothing to it.

    Args:
        outcome: preference for A, [N], in [0, 1].
        difference: length of A minus length of B, [N].
    """
    spread = float(difference.std())
    if spread == 0 and difference[0] != 0:
        return None
    feature = np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)
    size = outcome.size
    intercept, slope = fit_weighted_logistic(outcome, feature, np.ones((1, size)))[0]
    rate, plain = float(_sigmoid(intercept)), share_interval(outcome)
    if outcome.min() == outcome.max():
        estimate = Estimate(rate, plain.low, plain.high, size)
    else:
        found = influence_interval(float(intercept), _influence(outcome, feature, intercept, slope), n=size)
        low, high = (None if end is None else float(_sigmoid(end)) for end in (found.low, found.high))
        estimate = Estimate(rate, low, high, size)
    return LengthControl(
        rate=estimate,
        slope=float(slope),
        extrapolated=bool((difference > 0).all() or (difference < 0).all()),
    )


def _influence(outcome: np.ndarray, feature: np.ndarray, intercept: float, slope: float) -> np.ndarray:
    """Influence [N] of each prompt on the intercept: its part of a Newton step at the fit, times N."""
    predicted = _sigmoid(intercept + slope * feature)
    curvature, residual = predicted * (1 - predicted), outcome - predicted
    aa, ab, bb = curvature.sum() + RIDGE[0], curvature @ feature, curvature @ feature**2 + RIDGE[1]
    influence: np.ndarray = outcome.size * residual * (bb - ab * feature) / (aa * bb - ab**2)
    return influence


def fit_weighted_logistic(target: np.ndarray, feature: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Fit sigmoid(a + b feature) by Newton's method for each row of weights; return (a, b), [R, 2].

    Args:
        target: [N], in [0, 1].
        feature: [N].
        weights: [R, N], weight of each observation in each fit.
    """
    found = np.zeros((weights.shape[0], 2))
    for _ in range(NEWTON_STEPS):
        predicted = _sigmoid(found[:, :1] + found[:, 1:] * feature)
        residual = weights * (predicted - target)
        curvature = weights * predicted * (1 - predicted)
        slope_a = residual.sum(axis=1) + RIDGE[0] * found[:, 0]
        slope_b = residual @ feature + RIDGE[1] * found[:, 1]
        aa = curvature.sum(axis=1) + RIDGE[0]
        ab = curvature @ feature
        bb = curvature @ feature**2 + RIDGE[1]
        determinant = aa * bb - ab**2
        step = np.stack([bb * slope_a - ab * slope_b, aa * slope_b - ab * slope_a], axis=1) / determinant[:, None]
        found -= np.clip(step, -LARGEST_STEP, LARGEST_STEP)
        if np.abs(step).max() < 1e-9:
            break
    return found


def _sigmoid(value: Any) -> Any:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(value)))
