"""Facts of the texts of pairs: lengths, near-identical responses, cut-off responses, prompts that recur, tool calls."""

from collections import Counter
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from datasets import Dataset

from align.config.columns import CUT_OFF, FINISH_COLUMNS, RESPONSES
from align.data.sampling import fair_sample
from align.data.text import plain
from align.filtering.personal_data import personal
from align.stats import share_interval

SAMPLE = 2000
"""Pairs whose texts are compared word by word."""
ALIKE = 0.9
"""Share of the words in common runs from which two responses count as near-identical."""
LONGEST = 400
"""Words of each response that are compared."""
SHOWN = 5


def describe_texts(pairs: Dataset) -> dict[str, Any]:
    """Counts and shares with intervals; those that compare words are of a fair sample of ``SAMPLE`` pairs."""
    places, _ = fair_sample((str(name) for name in pairs["id"]), SAMPLE)
    sample = pairs.select(places)
    chosen, rejected = ([plain(text) for text in sample[name]] for name in RESPONSES)
    alike = np.array([similarity(one, other) for one, other in zip(chosen, rejected, strict=True)])
    private = np.array([bool(personal(f"{a}\n{b}")) for a, b in zip(chosen, rejected, strict=True)])
    words = {
        side: [len(text.split()) for text in texts] for side, texts in (("chosen", chosen), ("rejected", rejected))
    }
    prompts = Counter(plain(prompt) for prompt in pairs["prompt"])
    longer = np.array([0.5 if a == b else float(a > b) for a, b in zip(*words.values(), strict=True)])
    return {
        "pairs": len(pairs),
        "prompts": len(prompts),
        "most_common_prompt": max(prompts.values()),
        "words": {side: {"median": float(np.median(counts)), "longest": max(counts)} for side, counts in words.items()},
        "chosen_longer": share_interval(longer).to_dict(),
        "near_identical": share_interval((alike >= ALIKE).astype(float)).to_dict(),
        "near_identical_ids": [str(sample[int(k)]["id"]) for k in np.flatnonzero(alike >= ALIKE)[:SHOWN]],
        "personal_data": share_interval(private.astype(float)).to_dict(),
        "cut_off": {side: _share_of_column(pairs, FINISH_COLUMNS[side]) for side in RESPONSES},
        "conversations": not isinstance(pairs[0]["prompt"], str),
        "tools": sum(bool(value) for value in pairs["tools"]) if "tools" in pairs.column_names else 0,
        "turns": max(_turns(text) for side in RESPONSES for text in sample[side]),
    }


def similarity(one: str, other: str) -> float:
    """Share of the words of two texts in common runs, in [0, 1]; of the first ``LONGEST`` words of each."""
    first, second = one.split()[:LONGEST], other.split()[:LONGEST]
    return SequenceMatcher(None, first, second, autojunk=False).ratio()


def _share_of_column(pairs: Dataset, name: str) -> float:
    """Share of rows that the limit of tokens cut off; 0 if the table does not say."""
    if name not in pairs.column_names:
        return 0.0
    return float(np.mean([value == CUT_OFF for value in pairs[name]]))


def _turns(text: Any) -> int:
    return 1 if isinstance(text, str) else len(text)
