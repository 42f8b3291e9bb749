"""Compare policies by their rewards on the same prompts: paired, with intervals. Pure."""

from itertools import combinations
from typing import Any

import numpy as np

from align.stats import Estimate, above, influence_interval, mean_interval


def reward_differences(rewards: dict[str, np.ndarray], *, baseline: str) -> dict[str, Any]:
    """Mean reward of every policy, its paired gain over ``baseline``, and the differences of every two other policies.

    Args:
        rewards: policy -> reward of its completion of each of the same N prompts, [N].
        baseline: policy that gains are counted from.

    Returns:
        ``{"policies": {name: {"reward", "gain"}}, "comparisons": [{"a", "b", "difference"}]}``, plain JSON values.
    """
    policies: dict[str, Any] = {}
    for name, values in rewards.items():
        gain = None if name == baseline else mean_interval(values - rewards[baseline]).to_dict()
        policies[name] = {"reward": mean_interval(values).to_dict(), "gain": gain}
    others = [name for name in rewards if name != baseline]
    comparisons = [
        {"a": a, "b": b, "difference": mean_interval(rewards[a] - rewards[b]).to_dict()}
        for b, a in combinations(others, 2)
    ]
    return {"policies": policies, "comparisons": comparisons}


def gain_per_root_kl(gain: np.ndarray, kl: np.ndarray) -> Estimate | None:
    """mean gain / sqrt(2 mean KL) with a joint interval over prompts, from linearized influence values.

    The result is None unless the mean KL is claimed to be above 0: near 0 the ratio has no mean, and its interval has
    no meaning.

    For a policy near the reference the ratio is the correlation of the policy's implicit reward with the judge's times
    the standard deviation of the latter. It does not depend on beta, learning rate or number of steps, so it tells a
    better policy from one that is only further from the reference.

    Args:
        gain: reward minus the baseline's, [N].
        kl: log policy(y) - log reference(y) of the policy's samples, [N], nats.
    """
    mean = float(kl.mean())
    if mean <= 0 or not (above(mean_interval(kl), 0.0) or np.ptp(kl) == 0):
        return None
    root = np.sqrt(2 * mean)
    influence = ((gain - gain.mean()) - 0.5 * gain.mean() * (kl - mean) / mean) / root
    return influence_interval(float(gain.mean() / root), influence, n=len(gain))
