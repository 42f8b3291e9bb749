"""Labels that cannot all be right: pairs judged more than once, circles, votes."""

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from datasets import Dataset

from align.config.columns import TEXT
from align.stats import mean_interval

SHOWN = 5


def find_noise(pairs: Dataset) -> dict[str, Any]:
    """What repeated judgments and votes say of wrong labels.

    A pair that is judged twice by independent raters of error rate f gets two labels that differ with probability
    2 f (1 - f); f is the smaller root. Copies of one judgment look like agreement, so the estimate is a lower bound
    where rows were copied. The accuracy that any reward model can reach on such labels is 1 - f.

    Returns:
        ``pairs``, ``repeated`` (pairs of responses judged more than once), ``contradicted`` (of these, with both
        labels), ``copies`` (rows equal to an earlier one), ``disagreement`` and ``flip_rate`` with intervals and
        ``ceiling``, each None without repeated pairs; ``circles`` (a over b over c over a under one prompt);
        ``minority_votes``, the mean share of votes against the label, where the table has ``vote_share``.
    """
    prompts, chosen, rejected = ([_key(text) for text in pairs[name]] for name in TEXT)
    judged: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    seen: set[tuple[str, str, str]] = set()
    copies = 0
    for prompt, better, worse in zip(prompts, chosen, rejected, strict=True):
        low, high = sorted((better, worse))
        judged[prompt, low, high].append(1 if better == low else 0)
        copies += (prompt, better, worse) in seen
        seen.add((prompt, better, worse))
    repeated = {key: labels for key, labels in judged.items() if len(labels) > 1}
    contradicted = [key for key, labels in repeated.items() if 0 < sum(labels) < len(labels)]
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "repeated": len(repeated),
        "contradicted": len(contradicted),
        "copies": copies,
        "disagreement": None,
        "flip_rate": None,
        "ceiling": None,
        "circles": _circles(prompts, chosen, rejected),
        "minority_votes": None,
        "examples": [_ids_of(pairs, key, prompts, chosen, rejected) for key in contradicted[:SHOWN]],
    }
    if repeated:
        differ = [_share_that_differs(labels) for labels in repeated.values()]
        estimate = mean_interval(differ)
        found["disagreement"] = estimate.to_dict()
        ends = {name: None if value is None else flip_rate(value) for name, value in
                (("value", estimate.value), ("low", estimate.low), ("high", estimate.high))}  # fmt: skip
        found["flip_rate"] = {**ends, "n": len(differ)}
        found["ceiling"] = 1 - flip_rate(estimate.value)
    if "vote_share" in pairs.column_names:
        votes = np.array([value for value in pairs["vote_share"] if value is not None], dtype=np.float64)
        found["minority_votes"] = mean_interval(np.minimum(votes, 1 - votes)).to_dict() if votes.size else None
    return found


def flip_rate(disagreement: float) -> float:
    """Error rate f of each of two independent labels that differ with probability ``disagreement`` = 2 f (1 - f)."""
    return float((1 - np.sqrt(1 - 2 * min(max(disagreement, 0.0), 0.5))) / 2)


def _share_that_differs(labels: list[int]) -> float:
    """Share of the pairs of labels that differ."""
    count, ones = len(labels), sum(labels)
    return 2 * ones * (count - ones) / (count * (count - 1))


def _circles(prompts: list[str], chosen: list[str], rejected: list[str]) -> int:
    """Number of triples of responses to one prompt of which each is better than the next."""
    better: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for prompt, high, low in zip(prompts, chosen, rejected, strict=True):
        better[prompt][high].add(low)
    total = 0
    for over in better.values():
        total += sum(
            1 for a, lower in over.items() for b in lower for c in over.get(b, ()) if c != a and a in over.get(c, ())
        )
    return total // 3


def _ids_of(pairs: Dataset, key: tuple[str, str, str], *texts: Iterable[str]) -> list[str]:
    """Ids of the rows of a pair of responses, in either order."""
    prompt, low, high = key
    rows = [k for k, (p, a, b) in enumerate(zip(*texts, strict=True)) if p == prompt and {a, b} == {low, high}]
    return [str(pairs[k]["id"]) for k in rows]


def _key(text: Any) -> str:
    return text.strip() if isinstance(text, str) else json.dumps(text, sort_keys=True, ensure_ascii=False)
