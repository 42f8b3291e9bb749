"""Mean of a table of seeds by prompts with an interval for both: crossed random effects."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t

from scripts.bootstrap import Estimate


def crossed_mean(values: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Mean of ``values`` [S, P], S seeds on the same P prompts; the interval holds for other seeds and prompts.

    Seeds and prompts are crossed random effects. The variance of the mean is (max(MS_seeds, MS_residual) +
    max(MS_prompts - MS_residual, 0)) / (S P), where MS are the mean squares of the two-way table. Satterthwaite (1946)
    gives the degrees of freedom of Student's t; the first term always has the S - 1 of the seeds. So a few seeds that
    agree by chance make no narrow interval: their variance is not taken for known where it is estimated at zero. In
    simulations of 3 to 10 seeds and 80 to 256 prompts the 95% interval covers at least 94%; it is conservative (up to
    100% with 3 seeds) where seeds do not differ at all. A bootstrap over prompts alone describes only the policies that
    were trained.

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


def crossed_gain_per_root_kl(gain: ArrayLike, kl: ArrayLike) -> Estimate | None:
    """mean gain / sqrt(2 mean KL) of tables [S, P], its interval over seeds and prompts; None if the KL may be 0.

    The ratio is linearized at the means (delta method): ``crossed_mean`` of R + (gain - G) / sqrt(2 K) - R (kl - K) /
    (2 K), where G and K are the means and R the ratio. None unless the 95% interval of the mean KL lies above 0.

    Args:
        gain: reward minus the reference's.
        kl: log policy(y) - log reference(y) of the policy's samples, nats.

    Raises:
        ValueError: fewer than two seeds or prompts.
    """
    gains, kls = np.asarray(gain, dtype=np.float64), np.asarray(kl, dtype=np.float64)
    if crossed_mean(kls).low <= 0:
        return None
    far = kls.mean()
    ratio = gains.mean() / np.sqrt(2 * far)
    return crossed_mean(ratio + (gains - gains.mean()) / np.sqrt(2 * far) - ratio * (kls - far) / (2 * far))


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
    by_seed, by_prompt, rest = squares / freedom
    parts = np.array([max(by_seed, rest), max(by_prompt - rest, 0.0)])
    total = parts.sum()
    degrees = total**2 / (parts**2 / freedom[:2]).sum() if total > 0 else np.inf
    return float(mean), float(np.sqrt(total / table.size)), float(degrees)
