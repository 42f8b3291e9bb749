"""What to know of a pair table before anything is trained on it: what its pairs share, and what its margins say."""

from collections import Counter

import numpy as np
from datasets import Dataset

from align.config.columns import TEXT
from align.data.splits import clusters_of
from align.data.text import plain, text_key
from align.io.console import log
from align.stats import below, interval, share_interval

CONTRADICTING = 0.4
"""Share of agreeing margins below which they are probably of the other sign: noise agrees with half of the labels."""
SHOWN_CHARACTERS = 60


def sharing_findings(pairs: Dataset) -> list[str]:
    """Sentences on equal pairs, on a prompt that most pairs have, and on how many groups of pairs are independent."""
    count = len(pairs)
    keys = [[text_key(plain(text)) for text in pairs[name]] for name in TEXT]
    found = []
    equal = count - len({(prompt, *sorted(sides)) for prompt, *sides in zip(*keys, strict=True)})
    if equal:
        found.append(f"{equal} of {count} pairs have the prompt and both responses of an earlier one")
    (common, times) = Counter(keys[0]).most_common(1)[0]
    if times > max(2, count / 2):
        text = " ".join(plain(pairs["prompt"][keys[0].index(common)]).split())
        shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
        found.append(
            f"{times} of {count} pairs have one prompt, {shown!r}: it counts as an instruction, so folds and intervals "
            "go by the responses, and the diversity of a filter cannot count"
        )
    groups = len(set(clusters_of(pairs).tolist()))
    if groups == 1 < count:
        found.append("shared prompts and responses connect all pairs: they count as one, and nothing can be held out")
    elif groups < count:
        found.append(
            f"{groups} groups of pairs share no prompt or response with each other: folds keep them together, and "
            "intervals are over these groups"
        )
    return found


def margin_findings(pairs: Dataset) -> list[str]:
    """Sentences on margins that are all equal, or against the labels more often than noise would be."""
    if "margin" not in pairs.column_names:
        return []
    margins = np.array([value for value in pairs["margin"] if value is not None], dtype=np.float64)
    told = margins[(margins != 0) & np.isfinite(margins)]
    if margins.size > 1 and np.ptp(margins) == 0:
        return [f"all {margins.size} margins are {margins[0]:g}: they say nothing about which pairs differ"]
    agrees = share_interval(told > 0) if told.size else None
    if agrees is None or agrees.value >= CONTRADICTING or not below(agrees, 0.5):
        return []
    return [
        f"the margins agree with {interval(agrees.to_dict())} of the labels, fewer than noise would: is their sign "
        "reversed (expected: reward of the chosen minus reward of the rejected response)?"
    ]


def report_margins(pairs: Dataset, where: str) -> None:
    """Log ``margin_findings`` as warnings."""
    for sentence in margin_findings(pairs):
        log.warning("%s: %s", where, sentence)
