"""`align pairs from`: pairs, lists or thumbs of a table of responses."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config import PairsSection, nearest
from align.data.pair_selection import ANY_BAND
from align.data.pairs import FILE, table_of, write_pairs
from align.data.response_table import SHAPES, Responses, Shape, counts_of, read_responses
from align.data.response_views import (
    DIFFERENT,
    EQUAL,
    EVEN,
    MAJORITY,
    PAIRS,
    SCORED,
    VIEWS,
    View,
    Viewed,
    lists,
    rated_pairs,
    scored_pairs,
    thumbs,
    tied_pairs,
    voted_pairs,
)
from align.data.statistics import summarize
from align.errors import ConfigError, DataError
from align.io.console import log
from align.io.files import atomic_write, write_json
from align.io.source_files import keep_source
from align.io.stage import check_files

METRICS = "metrics.json"
ROWS = {"lists": "lists.jsonl", "thumbs": "thumbs.jsonl"}
"""View -> the file that it is written to; views of pairs go to pairs.parquet."""
IN_OTHER_VIEW = (EVEN, MAJORITY, EQUAL, DIFFERENT)
"""Reasons for which a pair is left out of one view because it belongs to ``ties``, or out of ``ties``."""
ONE_VOTE = {"votes_chosen": 1.0, "votes_rejected": 0.0, "votes_tie": 0.0, "vote_share": 1.0}


@dataclass(frozen=True, slots=True)
class ViewSettings:
    """Settings of `align pairs from`.

    Raises:
        ConfigError: they do not go together.
    """

    views: tuple[View, ...] = ("best_worst",)
    """Views of pairs, which go into one table; or lists; or thumbs."""
    shape: Shape | None = None
    """Shape of the rows; None: told by their columns."""
    weights: dict[str, float] | None = None
    """HelpSteer's attributes -> their weights in the score."""
    band: tuple[float, float] | None = None
    """Least and largest difference of the scores, for the view ``band``."""
    threshold: float | None = None
    """``thumbs``: least score of a thumb up."""

    def __post_init__(self) -> None:
        problems = [f"--view {one}: not known{nearest(one, list(VIEWS))}" for one in self.views if one not in VIEWS]
        if self.shape is not None and self.shape not in SHAPES:
            problems.append(f"--shape {self.shape}: not known{nearest(self.shape, list(SHAPES))}")
        if len(self.views) != len(set(self.views)) or (len(self.views) > 1 and not set(self.views) <= set(PAIRS)):
            problems.append(f"--view {' --view '.join(self.views)}: expected different views of pairs, or one view")
        if {"votes", "raters"} <= set(self.views):
            problems.append("--view votes --view raters: expected one of them, they make the same pairs")
        if sum(one in SCORED for one in self.views) > 1:
            problems.append(f"--view {' --view '.join(self.views)}: expected one of {', '.join(SCORED)}")
        if self.band is not None and ("band" not in self.views or not 0 <= self.band[0] <= self.band[1]):
            problems.append("--band: expected two numbers from 0 up, with --view band")
        if self.threshold is not None and self.views != ("thumbs",):
            problems.append("--threshold: means something for --view thumbs alone")
        if problems:
            raise ConfigError("\n".join(problems), code="response-option")


def read_weights(given: Sequence[str]) -> dict[str, float] | None:
    """ATTRIBUTE=WEIGHT of the command line as numbers; None if none are given.

    Raises:
        ConfigError: one is malformed.
    """
    found: dict[str, float] = {}
    for one in given:
        name, _, number = one.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ConfigError(f"--score {one}: expected ATTRIBUTE=WEIGHT", code="response-option") from None
        if not math.isfinite(found[name]):
            raise ConfigError(f"--score {one}: expected a finite weight", code="response-option")
    return found or None


def pairs_from(source: PairsSection, settings: ViewSettings, output: Path) -> dict[str, Any]:
    """Write the view of a table of responses into ``output``, and ``metrics.json``; return the metrics.

    Raises:
        AlignError: the table cannot be read, a row is invalid, or nothing is left.
    """
    name = ROWS.get(settings.views[0], FILE)
    keep_source(source.path, [output / name])
    check_files(output, [])
    table = read_responses(source, shape=settings.shape, weights=settings.weights)
    rows, left_out, raters = make_view(table.prompts, settings)
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "no responses"
        raise DataError(
            f"{source.path}: nothing is left in the view {' and '.join(settings.views)}: {reasons}",
            code="pairs-none",
            hint="choose a view of what the table has: scores, votes between two responses, or labels",
        )
    output.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, Any] = {"view": list(settings.views), "rows": len(rows), "left_out": dict(left_out)}
    metrics["table"] = counts_of(table)
    metrics |= {"raters": raters} if raters else {}
    if name == FILE:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        kept = [column for column in columns if any(row.get(column) is not None for row in rows)]
        pairs = table_of(rows, kept, source.path)
        write_pairs(pairs, output)
        metrics["pairs"] = summarize(pairs)
    else:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with atomic_write(output / name) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    write_json(output / METRICS, metrics)
    log.info("%s: %d rows of %d prompts -> %s", " and ".join(settings.views), len(rows), len(table.prompts),
             output / name)  # fmt: skip
    return metrics


def make_view(prompts: Sequence[Responses], settings: ViewSettings) -> Viewed:
    """The rows of the views, one after the other; with votes or ties, a pair of scores has one vote."""
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    raters: dict[str, float] = {}
    voted = len(settings.views) > 1
    for view in settings.views:
        found = _one_view(prompts, view, settings)
        rows += [row | ({} if not voted or "votes_chosen" in row else ONE_VOTE) for row in found.rows]
        left_out += found.left_out
        raters |= found.raters
    if "ties" in settings.views and voted:
        left_out = Counter({reason: count for reason, count in left_out.items() if reason not in IN_OTHER_VIEW})
    return Viewed(rows, left_out, raters)


def _one_view(prompts: Sequence[Responses], view: View, settings: ViewSettings) -> Viewed:
    if view == "lists":
        return lists(prompts)
    if view == "thumbs":
        return thumbs(prompts, threshold=settings.threshold)
    if view == "raters":
        return rated_pairs(prompts)
    if view == "votes":
        return voted_pairs(prompts)
    if view == "ties":
        return tied_pairs(prompts)
    return scored_pairs(prompts, view, band=settings.band or ANY_BAND)
