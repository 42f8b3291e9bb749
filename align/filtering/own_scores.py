"""Scores of the caller's own that enter the importance of a pair next to margin, quality and diversity."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from datasets import Dataset

from align.config.columns import COLUMNS
from align.errors import ConfigError, DataError, listed

BUILT_IN = ("margin", "quality", "diversity")
"""Scores that every filter has; their weights are fields of the section ``filter``."""
TAKEN = frozenset({*(column.name for column in COLUMNS), *BUILT_IN, "importance", "kept", "reason", "doubtful", "ood"})
"""Columns of the pairs and of the filter; no other score has one of these names, nor ``quality_...``."""


@dataclass(frozen=True, slots=True)
class OwnScore:
    """A score of the caller's own."""

    values: np.ndarray
    """[N], float64, finite; higher is better."""
    weight: float
    """Weight of the standardized score in the importance."""


def check_names(scores: Mapping[str, Any], weights: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Check names and weights, before any pair is read.

    Args:
        scores: name -> function of the pairs, or values.
        weights: name of a score -> weight.
        options: the other arguments, of which some are weights too.

    Raises:
        ConfigError: names each that cannot be used.
    """
    for name, given in (("scores", scores), ("weights", weights)):
        if not isinstance(given, Mapping):
            raise ConfigError(f"{name}: found {given!r}, expected a dict by the name of a score", code="filter-option")
    known = [*BUILT_IN, *scores]
    wrong = [
        f"scores: found the name {name!r}, expected one that no column of the pairs or of the filter has"
        for name in scores
        if not isinstance(name, str) or not name or name in TAKEN or name.startswith("quality_")
    ]
    wrong += [
        f"weights: no score {name!r}; scores are {', '.join(map(str, known))}" for name in weights if name not in known
    ]
    wrong += [
        f"weights: {name}: found {weight!r}, expected a finite number"
        for name, weight in weights.items()
        if isinstance(weight, bool) or not isinstance(weight, Real) or not np.isfinite(float(weight))
    ]
    wrong += [
        f"weights: {name}: found it as an argument too, expected one of them" for name in weights if name in options
    ]
    if wrong:
        raise ConfigError(listed(wrong), code="filter-option", hint="see docs/python.md, A filter score of your own")


def read_scores(
    scores: Mapping[str, Any | Callable[[Dataset], Any]], weights: Mapping[str, float], pairs: Dataset
) -> dict[str, OwnScore]:
    """The scores of N pairs by name, each with its weight, 1 if none is given.

    Raises:
        DataError: a score is not one finite number per pair.
    """
    found = {}
    for name, given in scores.items():
        values = given(pairs) if callable(given) else given
        try:
            numbers = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
        except (TypeError, ValueError):
            raise _unusable(name, f"a {type(values).__name__} that holds no numbers", len(pairs)) from None
        if numbers.shape != (len(pairs),):
            raise _unusable(name, f"an array of shape {numbers.shape}", len(pairs))
        bad = np.flatnonzero(~np.isfinite(numbers))
        if len(bad):
            raise _unusable(name, f"{numbers[bad[0]]} for row {bad[0]} ({len(bad)} such rows)", len(pairs))
        found[name] = OwnScore(numbers, float(weights.get(name, 1.0)))
    return found


def _unusable(name: str, found: str, count: int) -> DataError:
    return DataError(
        f"scores: {name}: found {found}, expected {count} finite numbers, one for each pair",
        code="filter-score",
        hint="score every pair, in the order of the table; a pair without a score may get the lowest one",
    )
