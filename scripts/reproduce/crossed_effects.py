"""Mean of a table of seeds by prompts with an interval for both: crossed random effects."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t

from scripts.bootstrap import Estimate


def crossed_mean(values: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Mean of ``values`` [S, P], S seeds on the same P prompts; the interval holds for other seeds and prompts.

    Seeds and prompts are crossed random effects. The variance of the mean is (MS_seeds + MS_prompts - MS_residual) /
    (S P), where MS are the mean squares of the two-way table, and at least MS_residual / (S P); Satterthwaite (1946)
    gives the degrees of freedom of Student's t. The interval is wide where a few seeds differ much. A bootstrap over
    prompts alone describes only the policies that were trained. In simulations with 3 seeds and 80 prompts the 95%
    interval covers 91 to 97%, depending on which of the two varies.

    Raises:
        ValueError: fewer than two seeds or prompts.
    """
    mean, error, degrees = _mean_and_error(values)
    half = float(t.ppf((1 + confidence) / 2, degrees)) * error if error > 0 else 0.0
    return Estimate(mean, mean - half, mean + half, np.size(values))


def crossed_p(values: ArrayLike) -> float:
    """Two-sided p-value for a mean of 0 of ``values`` [S, P]; the ``1 - p`` interval of ``crossed_mean`` ends at 0.

    Raises:
        ValueError: fewer than two seeds or prompts.
    """
    mean, error, degrees = _mean_and_error(values)
    if error == 0:
        return float(mean == 0)
    return float(2 * t.sf(abs(mean) / error, degrees))


def _mean_and_error(values: ArrayLike) -> tuple[float, float, float]:
    """Mean of [S, P], its standard error over seeds and prompts, degrees of freedom."""
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError("a mean over seeds and prompts needs at least two seeds and two prompts")
    seeds, prompts = table.shape
    mean, of_seeds, of_prompts = table.mean(), table.mean(axis=1), table.mean(axis=0)
    residual = table - of_seeds[:, None] - of_prompts + mean
    squares = np.array([prompts * np.square(of_seeds - mean).sum(), seeds * np.square(of_prompts - mean).sum(),
                        np.square(residual).sum()])  # fmt: skip
    freedom = np.array([seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1)])
    parts = squares / freedom * (1, 1, -1)
    total, degrees = parts.sum(), np.inf
    if total <= -parts[2]:
        total, degrees = -parts[2], freedom[2]
    elif total > 0:
        degrees = total**2 / (parts**2 / freedom).sum()
    return float(mean), float(np.sqrt(max(total, 0.0) / table.size)), float(degrees)
