"""Compare policies by what each wrote for the same prompts: rewards, KL, win rate, text statistics. Pure.

rewards [N], log-ratios [N], texts of each policy -> compare_policies -> Comparison: estimates with 95% intervals
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from align.data.text import plain, text_key
from align.evaluation.rewards import gain_per_root_kl, reward_differences
from align.evaluation.text_statistics import Texts, changed, text_statistics
from align.evaluation.winrate import WinRate, win_rate
from align.stats import cluster_codes, mean_interval


class KlSamples(NamedTuple):
    """Two estimates of KL(policy || reference) for each of N completions, [N], nats; see ``align.models.sample_kl``."""

    exact: np.ndarray
    """Sum over the tokens of the KL divergence of the next token; at least 0."""
    log_ratios: np.ndarray
    """log policy(y) - log reference(y), the one-sample estimate: a check with the same mean and more noise."""

    @classmethod
    def of_table(cls, table: Any) -> "KlSamples":
        """Those of a table with the columns ``kl``, ``logp_policy`` and ``logp_reference``."""
        return cls(np.asarray(table["kl"]), np.asarray(table["logp_policy"]) - np.asarray(table["logp_reference"]))


@dataclass(frozen=True, slots=True)
class PolicySamples:
    """One completion of a policy for each of N prompts, as far as it was measured."""

    rewards: np.ndarray | None = None
    """Reward of each completion, [N]."""
    kl: KlSamples | None = None
    """KL to the reference; None for the reference itself."""
    texts: Texts | None = None
    as_it_is: bool = True
    """Whether the sampling was at temperature 1 without top-p, top-k and min-p, so that it is of the model itself."""

    def by_prompt(self, clusters: np.ndarray | None) -> "PolicySamples":
        """The mean reward and KL of each prompt, for prompts that have several completions; texts stay."""
        if clusters is None:
            return self
        rewards = None if self.rewards is None else mean_of_clusters(self.rewards, clusters)
        kl = None if self.kl is None else KlSamples(*(mean_of_clusters(values, clusters) for values in self.kl))
        return replace(self, rewards=rewards, kl=kl)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of ``compare_policies``. Estimates are JSON values: ``value``, ``low``, ``high``, ``n``."""

    policies: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Policy -> ``reward``, ``gain`` over the baseline, ``kl`` to the reference, ``kl_one_sample`` and
    ``gain_per_root_kl``; None where not defined. Empty without rewards."""
    differences: list[dict[str, Any]] = field(default_factory=list)
    """Paired differences of the rewards of every two policies but the baseline: ``a``, ``b``, ``difference``."""
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Policy -> ``text_statistics``. Empty without texts."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Changes of the texts from the baseline whose interval excludes 0; see ``text_statistics.changed``."""
    win_rate: WinRate | None = None
    """Win rate over the baseline; None without preferences."""


def compare_policies(
    policies: Mapping[str, PolicySamples],
    *,
    baseline: str,
    preferences: tuple[ArrayLike, ArrayLike] | None = None,
    clusters: np.ndarray | None = None,
) -> Comparison:
    """Compare policies on the same N prompts.

    Args:
        policies: name -> its completions. All of them have rewards or none has; the same holds for texts.
        baseline: the policy that gains and changes are counted from.
        preferences: verdicts of a pairwise judge for the other one of two policies, shown first and shown second,
            [N] each, in [0, 1].
        clusters: number of the prompt of each completion, [N], where a prompt has several; a prompt then counts once,
            with the mean reward, KL, preference and length of its completions. See ``prompt_ids``.

    Raises:
        ValueError: there are preferences, and not exactly two policies with texts; or a preference is out of range.
    """
    measured_of = {name: samples.by_prompt(clusters) for name, samples in policies.items()}
    base = measured_of[baseline]
    numbers: dict[str, dict[str, Any]] = {}
    differences: list[dict[str, Any]] = []
    if base.rewards is not None:
        rewards = {name: samples.rewards for name, samples in measured_of.items() if samples.rewards is not None}
        measured = reward_differences(rewards, baseline=baseline)
        differences = measured["comparisons"]
        numbers = {
            name: measured["policies"][name] | kl_statistics(samples, base) for name, samples in measured_of.items()
        }
    texts = {name: samples.texts for name, samples in policies.items() if samples.texts is not None}
    statistics = text_statistics(texts, baseline=baseline, clusters=clusters) if texts else {}
    wins = None
    if preferences is not None:
        others = [name for name in texts if name != baseline]
        if len(others) != 1 or baseline not in texts:
            raise ValueError(f"preferences need the texts of two policies, got those of {sorted(texts)}")
        lengths = ([len(text) for text in texts[name].texts] for name in (others[0], baseline))
        wins = win_rate(*(mean_of_clusters(values, clusters) for values in (*preferences, *lengths)))
    return Comparison(numbers, differences, statistics, changed(statistics), wins)


def prompt_ids(prompts: Sequence[Any]) -> np.ndarray | None:
    """Number of the prompt of each of N rows, [N], equal for equal prompts (``text_key``); None if all N differ.

    Completions of one prompt are not independent, whatever rows they come from.
    """
    return cluster_codes([text_key(plain(prompt)).hex() for prompt in prompts])


def mean_of_clusters(values: ArrayLike, clusters: np.ndarray | None) -> np.ndarray:
    """Mean of ``values`` [N] in each cluster, [G]; the values themselves without clusters."""
    array = np.asarray(values, dtype=np.float64)
    return array if clusters is None else np.bincount(clusters, weights=array) / np.bincount(clusters)


def by_prompt(values: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
    """``mean_of_clusters`` of each row of ``values`` [K, N], [K, G]."""
    return np.stack([mean_of_clusters(row, clusters) for row in values])


def identical_texts(texts: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Number of prompts for which two policies wrote the same text: ``[{"a", "b", "identical", "n"}]``.

    Policies are sampled with the same random numbers for each prompt, so near policies write many equal texts.
    """
    return [
        {"a": a, "b": b, "identical": sum(map(operator.eq, texts[a], texts[b])), "n": len(texts[a])}
        for b, a in combinations(texts, 2)
    ]


def kl_statistics(samples: PolicySamples, baseline: PolicySamples) -> dict[str, Any]:
    """``kl``, ``kl_one_sample`` and ``gain_per_root_kl`` of a policy, each an estimate as JSON values or None.

    The ratio needs one origin for gain and KL. The KL is counted from the reference as it is, so the baseline of the
    gain must have been sampled as it is, too.

    Args:
        samples: the policy, with rewards.
        baseline: the reference, with rewards.
    """
    if samples.kl is None:
        return dict.fromkeys(("kl", "kl_one_sample", "gain_per_root_kl"))
    ratio = None
    if baseline.as_it_is:
        assert samples.rewards is not None and baseline.rewards is not None
        ratio = gain_per_root_kl(samples.rewards - baseline.rewards, samples.kl.exact)
    return {
        "kl": mean_interval(samples.kl.exact).to_dict(),
        "kl_one_sample": mean_interval(samples.kl.log_ratios).to_dict(),
        "gain_per_root_kl": ratio and ratio.to_dict(),
    }


def first_samples(
    prompts: Sequence[Any],
    texts: Mapping[str, Sequence[str]],
    rewards: Mapping[str, np.ndarray],
    count: int,
) -> list[dict[str, Any]]:
    """The first prompts with what every policy wrote, for a page.

    Args:
        prompts: N prompts.
        texts: policy -> its completions, [N].
        rewards: policy -> the rewards of its completions, [N]; a policy may lack them.
        count: prompts to show, at most.

    Returns:
        ``[{"prompt", "completions": {policy: {"text", "reward"}}}]``, plain JSON values.
    """
    return [
        {
            "prompt": prompts[k],
            "completions": {
                name: {"text": written[k], "reward": float(rewards[name][k]) if name in rewards else None}
                for name, written in texts.items()
            },
        }
        for k in range(min(count, len(prompts)))
    ]
