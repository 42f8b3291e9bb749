"""Which pairs are worth a minute, and what the judged ones say: the rate of flipped labels and its interval.

The random queue is a stratified sample: in each source the pairs come in the order of a hash of their ids, and the
sources advance together, each in proportion to its pairs. Every beginning of the queue is therefore a fair sample, and
only such a beginning is counted: pairs after the first one left open would be those that a person liked to judge.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from align.errors import DataError
from align.stats import share_interval
from align.viewer.table import PairTable, quoted

SOURCES = ("source", "dataset", "group")
"""Columns that may name the source of a pair; the first that is there with at least two names counts."""
MILESTONES = (50, 100, 200)
FAIR_MARGINS = ("cross-fitted", "outside")


def source_column(table: PairTable) -> str | None:
    """The column that names the source of each pair; None if there is none."""
    known = (name for name in SOURCES if name in table.columns)
    return next((name for name in known if len(table.columns[name].values) > 1), None)


def queue_order(table: PairTable, name: str) -> np.ndarray:
    """All rows [N] in the order of a queue: ``random``, or ``margin`` (the lowest, where label and model disagree).

    Raises:
        DataError: the table has no margin.
    """
    if name == "margin" and "margin" not in table.numbers():
        raise DataError(
            "queue by margin: the table has no column `margin`", code="view-query", hint="`align reward score` adds it"
        )
    source = source_column(table)
    stratum = "''" if source is None else quoted(source)
    by = f"(row_number() over (partition by {stratum} order by h, n) - 0.5) / count(*) over (partition by {stratum}), h, n"
    order = '"margin" nulls last, n' if name == "margin" else by
    with table.query() as cursor:
        found = cursor.execute(
            f"select n from (select *, rowid::integer as n, md5_number_lower(coalesce(\"id\", '')) as h from pairs) "
            f"order by {order}"
        )
        return np.asarray(found.fetchnumpy()["n"], dtype=np.int32)


def judged_prefix(order: np.ndarray, labels: Mapping[int, str]) -> tuple[list[int], int]:
    """(rows of the queue up to the first one without a label, number of judged rows after it)."""
    prefix: list[int] = []
    for row in order:
        if int(row) not in labels:
            break
        prefix.append(int(row))
    return prefix, len(labels) - len(prefix)


def estimates(table: PairTable, order: np.ndarray, labels: Mapping[int, str]) -> dict[str, Any]:
    """What the judged beginning of the random queue says.

    ``flips``: share of wrong labels among the pairs that a person could decide (keep or flip), overall and per source,
    with Wilson's 95% interval. ``accuracy``: share of these pairs whose margin agrees with the person; a margin of 0
    agrees by half. ``undecided``: ties and dropped pairs, which are in neither.

    Args:
        table: the table.
        order: the random queue.
        labels: row -> keep, flip, tie or drop.
    """
    prefix, after = judged_prefix(order, labels)
    clear = [row for row in prefix if labels[row] in ("keep", "flip")]
    source = source_column(table)
    found: dict[str, Any] = {
        "judged": len(prefix), "not_counted": after, "undecided": len(prefix) - len(clear), "by": source,
        "next": next((mark for mark in MILESTONES if mark > len(prefix)), None), "milestones": list(MILESTONES),
    }  # fmt: skip
    if not clear:
        return {**found, "flips": None, "sources": {}, "accuracy": None}
    wanted = [name for name in (source, "margin", "margin_source") if name is not None and name in table.loaded]
    columns = ", ".join(quoted(name) for name in wanted)
    with table.query() as cursor:
        rows = [
            cursor.execute(
                f"select rowid{', ' if columns else ''}{columns} from pairs where rowid = ?", [row]
            ).fetchone()
            for row in clear
        ]
    values = {row[0]: dict(zip(wanted, row[1:], strict=True)) for row in rows if row is not None}
    flipped = {row: float(labels[row] == "flip") for row in clear}
    found["flips"] = share_interval(list(flipped.values())).to_dict()
    found["sources"] = {}
    names = sorted({str(values[row][source]) for row in clear}) if source is not None else []
    for name in names:
        own = [flipped[row] for row in clear if str(values[row][source or ""]) == name]
        found["sources"][name] = share_interval(own).to_dict()
    found["accuracy"] = _accuracy(clear, flipped, values)
    return found


def _accuracy(
    clear: Sequence[int], flipped: Mapping[int, float], values: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Agreement of the margins with the person, and whether the margins are fair judges of their own pairs."""
    known = [row for row in clear if values[row].get("margin") is not None]
    if not known:
        return None
    agree = []
    for row in known:
        margin = values[row]["margin"] * (1 - 2 * flipped[row])
        agree.append(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0)
    sources = {str(values[row].get("margin_source") or "unknown") for row in known}
    fair = sources <= set(FAIR_MARGINS)
    return {**share_interval(agree).to_dict(), "fair": fair, "margins": sorted(sources)}
