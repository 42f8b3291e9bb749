"""Statistics of the texts themselves: length, repetition, diversity. Pure.

A policy can gain reward and get worse here; none of these needs a judge.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.data.text import words
from align.stats import excludes, mean_interval, share_interval

RUN = 3
"""Words of an n-gram whose repeats are counted."""
SIZES = (1, 2, 3)
WORSE = {
    "repetition": ("repeats itself more", "repeats itself less"),
    "unfinished": ("is cut off by the token limit more often", "is cut off by the token limit less often"),
    "empty": ("writes nothing more often", "writes nothing less often"),
    "tokens": ("writes more tokens", "writes fewer tokens"),
}


@dataclass(frozen=True, slots=True)
class Texts:
    """The completions of one policy, one per prompt."""

    texts: Sequence[str]
    tokens: Sequence[int]
    finished: Sequence[bool]
    """False where the token limit cut the completion off."""


def repetition(text: str) -> float:
    """Share of a text's trigrams that repeat an earlier one; 0 for fewer than three words."""
    found = words(text)
    runs = Counter(tuple(found[k : k + RUN]) for k in range(len(found) - RUN + 1))
    total = sum(runs.values())
    return 1 - len(runs) / total if total else 0.0


def distinct(texts: Sequence[str], size: int, budget: int) -> float | None:
    """Distinct-n (Li et al., arXiv 1510.03055): number of distinct n-grams over all n-grams of the pooled texts.

    Args:
        texts: completions of one policy.
        size: n.
        budget: words to pool, in the order of the texts. The ratio falls with the number of words, so policies are
            comparable only at the same budget.
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        found = words(text)[:budget]
        budget -= len(found)
        for k in range(len(found) - size + 1):
            seen.add(tuple(found[k : k + size]))
            total += 1
    return len(seen) / total if total else None


def text_statistics(
    policies: Mapping[str, Texts], *, baseline: str, clusters: np.ndarray | None = None
) -> dict[str, dict[str, Any]]:
    """For each policy: means with intervals, paired changes from ``baseline``, distinct-n over equally many words.

    Args:
        policies: name -> completions of the same N prompts.
        baseline: policy that changes are counted from.
        clusters: number of the prompt of each completion, [N]; None: each has its own.

    Returns:
        ``{name: {"tokens", "repetition", "unfinished", "empty", "change", "distinct", "distinct_words"}}``, plain JSON
        values; ``change`` is None for the baseline. Distinct-n has no interval: resampled texts repeat n-grams.
    """
    columns = {name: _columns(found) for name, found in policies.items()}
    budget = min(sum(len(words(text)) for text in found.texts) for found in policies.values())
    made = {}
    for name, found in policies.items():
        change = None
        if name != baseline:
            change = {
                key: mean_interval(values - columns[baseline][key], clusters=clusters).to_dict()
                for key, values in columns[name].items()
            }
        made[name] = {
            **{
                key: (mean_interval if key == "tokens" else share_interval)(values, clusters=clusters).to_dict()
                for key, values in columns[name].items()
            },
            "change": change,
            "distinct": {str(size): distinct(found.texts, size, budget) for size in SIZES},
            "distinct_words": budget,
        }
    return made


def changed(statistics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Changes from the baseline whose interval excludes 0.

    Returns:
        ``[{"policy", "what", "said", "change"}]``, ``change`` an estimate as plain values.
    """
    found = []
    for name, values in statistics.items():
        for key, (more, less) in WORSE.items():
            change = (values["change"] or {}).get(key)
            if change is not None and excludes(change, 0.0):
                said = more if change["value"] > 0 else less
                found.append({"policy": name, "what": key, "said": said, "change": change})
    return found


def _columns(found: Texts) -> dict[str, np.ndarray]:
    return {
        "tokens": np.array(found.tokens, dtype=np.float64),
        "repetition": np.array([repetition(text) for text in found.texts]),
        "unfinished": 1.0 - np.array(found.finished, dtype=np.float64),
        "empty": np.array([not text.strip() for text in found.texts], dtype=np.float64),
    }
