"""Compare policies by their rewards on the same prompts: paired, with intervals. Pure."""

from itertools import combinations
from typing import Any

import numpy as np

from align.stats import RESAMPLES, Estimate, bootstrap_mean


def reward_differences(rewards: dict[str, np.ndarray], *, baseline: str, seed: int) -> dict[str, Any]:
    """Mean reward of every policy, its paired gain over ``baseline``, and the differences of every two other policies.

    Args:
        rewards: policy -> reward of its completion of each of the same N prompts, [N].
        baseline: policy that gains are counted from.
        seed: seed of the bootstrap over prompts.

    Returns:
        ``{"policies": {name: {"reward", "gain"}}, "comparisons": [{"a", "b", "difference"}]}``, plain JSON values.
    """
    policies: dict[str, Any] = {}
    for name, values in rewards.items():
        gain = None if name == baseline else bootstrap_mean(values - rewards[baseline], seed=seed).to_dict()
        policies[name] = {"reward": bootstrap_mean(values, seed=seed).to_dict(), "gain": gain}
    others = [name for name in rewards if name != baseline]
    comparisons = [
        {"a": a, "b": b, "difference": bootstrap_mean(rewards[a] - rewards[b], seed=seed).to_dict()}
        for b, a in combinations(others, 2)
    ]
    return {"policies": policies, "comparisons": comparisons}


def gain_per_root_kl(gain: np.ndarray, kl: np.ndarray, *, seed: int) -> Estimate | None:
    """mean gain / sqrt(2 mean KL) with a joint bootstrap interval over prompts.

    The result is None unless the mean KL is above 0 in at least 97.5% of the resamples: near 0 the ratio has no mean,
    and its interval has no meaning.

    For a policy near the reference the ratio is the correlation of the policy's implicit reward with gold times the
    standard deviation of gold. It does not depend on beta, learning rate or number of steps, so it tells a better
    policy from one that is only further from the reference.

    Args:
        gain: reward minus the baseline's, [N].
        kl: log policy(y) - log reference(y) of the policy's samples, [N], nats.
        seed: seed of the bootstrap.
    """
    if kl.mean() <= 0:
        return None
    draws = np.random.default_rng(seed).integers(0, len(gain), size=(RESAMPLES, len(gain)))
    kls = kl[draws].mean(axis=1)
    positive = kls > 0
    if positive.mean() < 0.975:
        return None
    ratios = gain[draws].mean(axis=1)[positive] / np.sqrt(2 * kls[positive])
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Estimate(float(gain.mean() / np.sqrt(2 * kl.mean())), float(low), float(high), len(gain))
