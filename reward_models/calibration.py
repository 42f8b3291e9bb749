"""Calibrate the margins of a reward model: remove length bias, then map the margin to the log-odds of the label.

A calibrated margin of 2 agrees with the label in 88% of the pairs, sigmoid(2). The map is fitted on held-out pairs,
saved in the model folder as ``calibration.json`` and applied on request. It is an odd function of (margin, difference
of lengths): exchanging the two responses only changes the sign.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from scipy.optimize import isotonic_regression, minimize_scalar

from align.data.pairs import with_columns
from align.errors import ModelError
from align.io.files import read_json, write_json
from reward_models.length_bias import length_slope, word_difference

FILE = "calibration.json"
Kind = Literal["temperature", "isotonic"]
COLDEST, HOTTEST = 1e-3, 1e3
SMALLEST = 1e-290
"""Margins closer to 0 count as 0: the slope of the map between two of them would overflow."""


@dataclass(frozen=True, slots=True)
class MarginMap:
    """Subtract ``length_slope`` times the difference of the lengths, then apply temperature or isotonic calibration."""

    kind: Kind | None
    """None: only the length is removed."""
    length_slope: float
    """Margin per word; 0: no correction for length."""
    temperature: float
    """Divisor of the margins (temperature)."""
    margins: tuple[float, ...] = ()
    """Knots in ascending order; log-odds are linear between them and constant beyond them (isotonic)."""
    log_odds: tuple[float, ...] = ()
    """Log-odds at the knots."""
    pairs: int = 0
    """Number of held-out pairs of the fit."""

    def __call__(self, margins: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Log-odds [N] of the label, from margins [N] and words of chosen minus words of rejected [N]."""
        left: np.ndarray = margins - self.length_slope * words
        if self.kind == "isotonic":
            return np.interp(left, self.margins, self.log_odds)
        return left / self.temperature

    def apply(self, pairs: Dataset) -> Dataset:
        """The table with calibrated ``margin`` and ``margin_std``; the mean of the two rewards does not change."""
        old = np.asarray(pairs["margin"], dtype=np.float64)
        new = self(old, word_difference(pairs))
        middle = (np.asarray(pairs["reward_chosen"]) + np.asarray(pairs["reward_rejected"])) / 2
        columns = {"reward_chosen": middle + new / 2, "reward_rejected": middle - new / 2, "margin": new}
        if "margin_std" in pairs.column_names:
            std, words = np.asarray(pairs["margin_std"], dtype=np.float64), word_difference(pairs)
            columns["margin_std"] = np.abs(self(old + std / 2, words) - self(old - std / 2, words))
        return with_columns(pairs, columns)

    def save(self, model: Path) -> None:
        """Write the map into a model folder."""
        write_json(model / FILE, asdict(self))

    @classmethod
    def load(cls, model: Path | str) -> "MarginMap":
        """Read the map in a model folder.

        Raises:
            ModelError: the file is missing or broken.
        """
        file = Path(model) / FILE
        if not file.exists():
            raise ModelError(
                f"{file}: no such file, so the margins of this model cannot be calibrated",
                code="calibration-file",
                hint="train it with `reward.calibrate: temperature`, or score without --calibrated",
            )
        try:
            found: dict[str, Any] = read_json(file)
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
            made = cls(**values)  # type: ignore[arg-type]
            if made.kind not in ("temperature", "isotonic", None) or not made.temperature > 0:
                raise ValueError(f"kind {made.kind!r}, temperature {made.temperature}")
            made(np.array([-1.0, 1.0]), np.zeros(2))
        except (ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{file}: not a calibration ({reason})", code="calibration-file") from None
        return made


def fit_map(margins: np.ndarray, words: np.ndarray, kind: Kind | None, *, length: bool) -> MarginMap:
    """Fit the map to margins [N] of held-out pairs, chosen minus rejected.

    Args:
        margins: at least one; finite.
        words: words of chosen minus words of rejected, [N].
        kind: temperature, isotonic or None.
        length: subtract the part of the margin that is linear in the difference of lengths.
    """
    slope = length_slope(margins, words) if length else 0.0
    left = margins - slope * words
    if kind == "isotonic":
        knots, odds = isotonic(left)
        return MarginMap(kind, slope, 1.0, tuple(knots.tolist()), tuple(odds.tolist()), len(margins))
    return MarginMap(kind, slope, best_temperature(left) if kind else 1.0, pairs=len(margins))


def best_temperature(margins: np.ndarray) -> float:
    """Temperature scaling: T > 0 that minimizes the mean log-loss of margins / T (Guo et al., arXiv 1706.04599).

    The target for N pairs is (N + 1) / (N + 2) instead of 1 (Platt, 1999), so the minimum is finite even if every
    margin agrees with its label. The log-loss is convex in 1 / T, and T is clipped to [``COLDEST``, ``HOTTEST``];
    margins that are worse than chance get ``HOTTEST``.
    """
    right = (margins.size + 1) / (margins.size + 2)

    def loss(log_inverse: float) -> float:
        scaled = np.exp(log_inverse) * margins
        return float(np.mean(np.logaddexp(0.0, -scaled) + (1 - right) * scaled))

    bounds = (-np.log(HOTTEST), -np.log(COLDEST))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(-found.x))


def isotonic(margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Isotonic regression of the label on the margin: knots [K] in ascending order, and log-odds [K] at them.

    Each pair enters twice, as (m, 1) and (-m, 0), which makes the map odd. Probabilities are clipped to
    [1 / (2 N + 2), 1 - 1 / (2 N + 2)].
    """
    margins = np.where(np.abs(margins) < SMALLEST, 0.0, margins)
    values, place, counts = np.unique(np.concatenate([margins, -margins]), return_inverse=True, return_counts=True)
    right = np.bincount(place, weights=np.repeat([1.0, 0.0], margins.size)) / counts
    share = isotonic_regression(right, weights=counts.astype(np.float64)).x
    least = 1 / (2 * margins.size + 2)
    share = np.clip(share, least, 1 - least)
    changes = np.flatnonzero(np.diff(share)) if len(share) > 1 else np.empty(0, dtype=np.int64)
    knots = np.unique(np.concatenate([[0], changes, changes + 1, [len(share) - 1]]))
    return values[knots], np.log(share[knots]) - np.log1p(-share[knots])


def calibrated_out_of_fold(
    margins: np.ndarray, words: np.ndarray, fold: np.ndarray, kind: Kind | None, *, length: bool
) -> np.ndarray:
    """Cross-fitted calibration: margins [N], those of each fold by a map that was fitted on all other folds."""
    made = np.empty(len(margins))
    for number in np.unique(fold):
        inside = fold == number
        others = ~inside if (~inside).any() else inside
        made[inside] = fit_map(margins[others], words[others], kind, length=length)(margins[inside], words[inside])
    return made
