"""What identifies the pairs that a model was trained on: their number, a fingerprint, where their margins come from."""

import hashlib
import json
from dataclasses import dataclass, field

from datasets import Dataset

from align.config.columns import TEXT, THUMB
from align.data.training_pairs import UNKNOWN, source_of

READ = (*TEXT, "margin", THUMB)
"""Columns that the fingerprint covers: equal for every method and model that is trained on the same pairs."""
DIGITS = 16


@dataclass(frozen=True, slots=True)
class TableFacts:
    """The pairs of a training."""

    pairs: int
    fingerprint: str
    """First digits of the sha256 of prompt, chosen, rejected and margin of every pair, in order."""
    margins: str
    """in-sample, unknown, cross-fitted or outside; ``none`` without a margin column."""
    weighted: bool = field(default=False, compare=False)
    """Whether a column ``weight`` gives pairs other weights than 1."""


def table_facts(pairs: Dataset) -> TableFacts:
    """Count and hash the pairs of a table; its other columns (ids, weights) and its files do not matter."""
    columns = [name for name in READ if name in pairs.column_names]
    state = hashlib.sha256(json.dumps(columns).encode())
    for row in pairs.select_columns(columns).with_format(None):
        state.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
    margins = source_of(pairs) if "margin" in columns else "none"
    weighted = "weight" in pairs.column_names and any(value != 1 for value in pairs["weight"])
    return TableFacts(len(pairs), state.hexdigest()[:DIGITS], margins or UNKNOWN, weighted)
