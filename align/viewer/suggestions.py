"""What the page offers at the start: which columns to look at, and filters for the questions that people ask first."""

from collections.abc import Iterator
from typing import Any

from align.config.columns import CUT_OFF, FINISH_COLUMNS
from align.viewer.measured import CROSS_FITTED, IN_SAMPLE
from align.viewer.queues import margin_column
from align.viewer.table import PairTable
from align.viewer.views import count_rows, read_query

TELLING = (
    "margin", "weight", "margin_std", "quality", "diversity", "importance", "trust", "influence", "cosine", "ood",
    "slack", "logp_chosen_change", "votes_chosen",
)  # fmt: skip
"""Columns that say most about pairs, in this order."""
FIRST = 4
REASONS = 5
SCATTERS = (
    (IN_SAMPLE, CROSS_FITTED), ("margin", "quality"), ("margin", "margin_std"), ("margin", "influence"),
    ("margin", "cosine"), ("logp_chosen_change", "logp_rejected_change"),
)  # fmt: skip
Filters = list[dict[str, Any]]


def first_columns(table: PairTable) -> list[str]:
    """Columns of numbers to show first, at most ``FIRST``."""
    found = [name for name in table.numbers() if table.columns[name].minimum is not None]
    return sorted(found, key=lambda name: TELLING.index(name) if name in TELLING else len(TELLING))[:FIRST]


def scatters(table: PairTable) -> list[tuple[str, str]]:
    """Two columns each that are worth a scatter."""
    numbers = table.numbers()
    return [pair for pair in SCATTERS if all(name in numbers for name in pair)]


def ready_filters(table: PairTable) -> list[dict[str, Any]]:
    """Filters with a name, a sentence, a query and the number of rows; those that no row passes are left out."""
    found = []
    for name, what, filters in _offered(table):
        count = count_rows(table, read_query({"filters": filters}, table))
        if count:
            found.append({"name": name, "what": what, "query": {"filters": filters}, "count": count})
    return found


def _offered(table: PairTable) -> Iterator[tuple[str, str, Filters]]:
    margin, numbers = margin_column(table), table.numbers()
    if margin is not None:
        yield (
            "reward model against label", f"`{margin}` is at most 0: it does not prefer the chosen response",
            [{"column": margin, "low": None, "high": 0.0}],
        )  # fmt: skip
    if IN_SAMPLE in numbers and CROSS_FITTED in numbers:
        yield (
            "learned by heart", "in-sample the reward model agrees with the label, without the pair it does not",
            [{"column": IN_SAMPLE, "low": 0.0, "high": None}, {"column": CROSS_FITTED, "low": None, "high": 0.0}],
        )  # fmt: skip
    for name, value, title, what in FLAGS:
        if name in table.columns and table.columns[name].kind in ("flag", "name"):
            yield title, what, [{"column": name, "names": [value]}]
    for name in (one for one in table.loaded if one.startswith("entangled (")):
        yield f"entangled: {name[len('entangled (') : -1]}", FLAGS[0][3], [{"column": name, "names": ["true"]}]
    if "kept" in table.columns and "reason" in table.columns:
        for reason, _ in table.columns["reason"].values[:REASONS]:
            yield f"dropped: {reason}", "the filter's reason", [{"column": "reason", "names": [reason]}]
    if margin is not None:
        yield "without a margin", f"`{margin}` is missing", [{"column": margin, "missing": True}]


FLAGS = (
    (
        "entangled",
        "true",
        "entangled",
        "one step on the pair alone would lower its chosen or raise its rejected response",
    ),
    ("doubtful", "true", "doubtful labels", "the margin contradicts the label strongly"),
    ("kept", "false", "dropped by the filter", "the filter does not keep these pairs"),
    (
        "margin_source",
        "in-sample",
        "in-sample margins",
        "their reward model was trained on them: they repeat the labels",
    ),
    (FINISH_COLUMNS["chosen"], CUT_OFF, "chosen response cut off", "the limit of tokens ended the chosen response"),
    (
        FINISH_COLUMNS["rejected"],
        CUT_OFF,
        "rejected response cut off",
        "the limit of tokens ended the rejected response",
    ),
)
"""(column, name, title, sentence)."""
