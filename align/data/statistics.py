"""Summary statistics of a pair table."""

import json
from typing import Any

import numpy as np
from datasets import Dataset

from align.config.columns import CUT_OFF, FINISH_COLUMNS, TEXT, THUMB
from align.data.text import count_words


def summarize(pairs: Dataset) -> dict[str, Any]:
    """Counts, mean lengths (words) and columns of a pair table, for the user to read."""
    ends = {f"{side}_cut_off_share": name for side, name in FINISH_COLUMNS.items() if name in pairs.column_names}
    words = {column: np.array([count_words(text) for text in pairs[column]]) for column in TEXT}
    thumbs = list(pairs[THUMB]) if THUMB in pairs.column_names else []
    return {
        "pairs": len(pairs),
        "prompts": len({json.dumps(prompt, sort_keys=True) for prompt in pairs["prompt"]}),
        "conversational": not isinstance(pairs["prompt"][0], str),
        **{f"{column}_words": float(count.mean()) for column, count in words.items()},
        "chosen_longer_share": float((words["chosen"] > words["rejected"]).mean()),
        **(
            {"desirable": thumbs.count(1.0), "undesirable": thumbs.count(0.0)}
            if any(x is not None for x in thumbs)
            else {}
        ),
        **{key: float(np.mean([value == CUT_OFF for value in pairs[name]])) for key, name in ends.items()},
        "columns": ", ".join(pairs.column_names),
    }


def missing_values(pairs: Dataset, column: str) -> np.ndarray:
    """Indices, int64 [G], of the pairs without a value in a column of numbers."""
    return np.flatnonzero(np.isnan(np.asarray(pairs[column], dtype=np.float64)))
