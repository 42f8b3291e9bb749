"""From a reward model's raw margin to one that means what it says: length taken out, then log-odds of the label.

A margin of 2 should be right in 88% of the pairs, sigmoid(2). The map is fitted on held-out pairs, kept beside the
model as ``calibration.json`` and applied where it is asked for. It is odd in (margin, difference of lengths):
exchanging the two responses changes the sign and nothing else.
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
"""Margins that are nearer to 0 count as 0: between two of them a map would be steeper than a number can say."""


@dataclass(frozen=True, slots=True)
class MarginMap:
    """First ``length_slope`` times the difference of the lengths is taken off, then one of two maps applied."""

    kind: Kind | None
    """None: neither map."""
    length_slope: float
    """Margin per word, 0 where lengths are left alone."""
    temperature: float
    """Margins are divided by it (temperature)."""
    margins: tuple[float, ...] = ()
    """Rising; between them the log-odds are linear, beyond them constant (isotonic)."""
    log_odds: tuple[float, ...] = ()
    pairs: int = 0
    """Held-out pairs that it was fitted on."""

    def __call__(self, margins: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Log-odds [N] that the label is right, from margins [N] and words of chosen less words of rejected [N]."""
        left: np.ndarray = margins - self.length_slope * words
        if self.kind == "isotonic":
            return np.interp(left, self.margins, self.log_odds)
        return left / self.temperature

    def apply(self, pairs: Dataset) -> Dataset:
        """The table with its margin mapped, ``margin_std`` in proportion, and both rewards about their old middle."""
        old = np.asarray(pairs["margin"], dtype=np.float64)
        new = self(old, word_difference(pairs))
        middle = (np.asarray(pairs["reward_chosen"]) + np.asarray(pairs["reward_rejected"])) / 2
        columns = {"reward_chosen": middle + new / 2, "reward_rejected": middle - new / 2, "margin": new}
        if "margin_std" in pairs.column_names:
            std, words = np.asarray(pairs["margin_std"], dtype=np.float64), word_difference(pairs)
            columns["margin_std"] = np.abs(self(old + std / 2, words) - self(old - std / 2, words))
        return with_columns(pairs, columns)

    def save(self, model: Path) -> None:
        """Write it into a model folder."""
        write_json(model / FILE, asdict(self))

    @classmethod
    def load(cls, model: Path | str) -> "MarginMap":
        """The map that lies beside a model.

        Raises:
            ModelError: there is none, or it is broken.
        """
        file = Path(model) / FILE
        if not file.exists():
            raise ModelError(
                f"{file}: not there, so its margins cannot be calibrated",
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
            said = " ".join(str(error).split())
            raise ModelError(f"{file}: not a calibration ({said})", code="calibration-file") from None
        return made


def fit_map(margins: np.ndarray, words: np.ndarray, kind: Kind | None, *, length: bool) -> MarginMap:
    """The map for margins [N] of held-out pairs whose chosen response is the labelled one.

    Args:
        margins: at least one, finite.
        words: words of chosen less words of rejected, [N].
        kind: temperature, isotonic or neither.
        length: take the part of the margin off that rises with the length.
    """
    slope = length_slope(margins, words) if length else 0.0
    left = margins - slope * words
    if kind == "isotonic":
        knots, odds = isotonic(left)
        return MarginMap(kind, slope, 1.0, tuple(knots.tolist()), tuple(odds.tolist()), len(margins))
    return MarginMap(kind, slope, best_temperature(left) if kind else 1.0, pairs=len(margins))


def best_temperature(margins: np.ndarray) -> float:
    """T > 0 that minimises the mean log-loss of margins / T (Guo et al., arXiv 1706.04599), on N pairs.

    A label counts as right with probability (N + 1) / (N + 2) (Platt, 1999), so a temperature exists where every
    margin agrees with its label. The log-loss is convex in 1 / T; a T out of bounds is put at them: margins that are
    worse than chance get the hottest.
    """
    right = (margins.size + 1) / (margins.size + 2)

    def loss(log_inverse: float) -> float:
        scaled = np.exp(log_inverse) * margins
        return float(np.mean(np.logaddexp(0.0, -scaled) + (1 - right) * scaled))

    bounds = (-np.log(HOTTEST), -np.log(COLDEST))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(-found.x))


def isotonic(margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Knots: margins [K], rising, and the log-odds [K] of the label at each, by isotonic regression.

    Every pair counts twice, as (m, right) and (-m, wrong), which makes the map odd. No share is nearer to 0 or 1 than
    1 / (2 N + 2).
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
    """Mapped margins [N], those of each fold by a map fitted on the pairs of all other folds."""
    made = np.empty(len(margins))
    for number in np.unique(fold):
        inside = fold == number
        others = ~inside if (~inside).any() else inside
        made[inside] = fit_map(margins[others], words[others], kind, length=length)(margins[inside], words[inside])
    return made
