"""Summary of a filter in numbers."""

from typing import Any

import numpy as np
from datasets import Dataset

from align.data.text import cells
from align.filtering.rules import RULES, RuleInput, length_bias
from align.filtering.scores import effective_number


def summarize_filter(
    pairs: Dataset,
    table: RuleInput,
    broken: dict[int, tuple[str, str]],
    neighbors: dict[str, Any],
    kept: np.ndarray,
    embedded: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """Counts, and a comparison of the kept pairs with all pairs and with a random sample of the same size.

    Args:
        pairs: N pairs.
        table: input of the rules.
        broken: (rule, finding) of the pairs that broke a rule.
        neighbors: method and recall of the nearest-neighbor search.
        kept: bool [N].
        embedded: embeddings of the prompts, [N, D].
        seed: seed of the random sample.
    """
    words = table.survey.words.sum(axis=1, dtype=np.int32)
    rules = [rule for rule, _ in broken.values()]
    random = np.sort(np.random.default_rng(seed).choice(len(kept), int(kept.sum()), replace=False))
    return {
        "pairs": len(kept),
        "passed_rules": len(kept) - len(broken),
        "kept": int(kept.sum()),
        "dropped_by_rule": {name: rules.count(name) for name in RULES if name in rules},
        "groups": _groups(pairs, kept),
        "longer_is_chosen": {
            "all": length_bias(table.survey.words),
            "kept": length_bias(table.survey.words, np.flatnonzero(kept)),
        },
        "neighbours": neighbors,
        "effective_number": {
            "all": effective_number(embedded),
            "kept": effective_number(embedded, np.flatnonzero(kept)),
            "random": effective_number(embedded, random),
        },
        "training_time_saved": float(1 - words[kept].sum(dtype=np.int64) / max(words.sum(dtype=np.int64), 1)),
        "doubtful": None
        if table.doubtful is None
        else {"all": float(table.doubtful.mean()), "kept": float(table.doubtful[kept].mean())},
        "ood_limit": None if table.ood is None else table.ood_limit,
    }


def _groups(pairs: Dataset, kept: np.ndarray) -> dict[str, dict[str, int]]:
    if "group" not in pairs.column_names:
        return {}
    groups = cells(pairs, "group").to_numpy().astype(str)
    names, which = np.unique(groups, return_inverse=True)
    return {
        str(name): {"pairs": int((which == k).sum()), "kept": int(kept[which == k].sum())}
        for k, name in enumerate(names)
    }
