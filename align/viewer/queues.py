"""Which pairs are worth a minute, and what the judged ones say: the rate of flipped labels and its interval.

The random queue is a stratified sample: in each source the pairs come in the order of a hash of their ids, and the
sources advance together, each in proportion to its pairs. Every beginning of the queue is therefore a fair sample, and
only such a beginning is counted: pairs after the first one left open would be those that a person liked to judge.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from align.data.next_to_check import flip_rates
from align.errors import DataError
from align.stats import share_interval
from align.viewer.measured import CROSS_FITTED
from align.viewer.person_trust import person_trust
from align.viewer.table import PairTable, quoted

SOURCES = ("source", "dataset", "group")
"""Columns that may name the source of a pair; the first that is there with at least two names counts."""
MILESTONES = (50, 100, 200)
FAIR_MARGINS = ("cross-fitted", "outside")
SAMPLE = 50_000
"""Margins that a slope is fitted to, at most."""


def source_column(table: PairTable) -> str | None:
    """The column that names the source of each pair; None if there is none."""
    known = (name for name in SOURCES if name in table.columns)
    return next((name for name in known if len(table.columns[name].values) > 1), None)


def margin_column(table: PairTable) -> str | None:
    """The column of margins that judge their own pairs most fairly: not learned from the labels that they judge.

    None if the table has no margins.
    """
    numbers = table.numbers()
    if "margin" in numbers and is_fair(table, "margin"):
        return "margin"
    return next((name for name in (CROSS_FITTED, "margin") if name in numbers), None)


def is_fair(table: PairTable, name: str) -> bool:
    """Whether no margin of a column comes from a model that was trained on its pair, as far as the table says."""
    if name == CROSS_FITTED:
        return True
    sources = table.columns.get("margin_source")
    return sources is not None and bool(sources.values) and {one for one, _ in sources.values} <= set(FAIR_MARGINS)


def queue_order(table: PairTable, name: str) -> np.ndarray:
    """All rows [N] in the order of a queue: ``random``, or ``margin`` (the lowest, where label and model disagree).

    Raises:
        DataError: the table has no margin.
    """
    margin = margin_column(table)
    if name == "margin" and margin is None:
        raise DataError(
            "queue by margin: the table has no column `margin`", code="view-query", hint="`align reward score` adds it"
        )
    source = source_column(table)
    stratum = "''" if source is None else quoted(source)
    place = f"row_number() over (partition by {stratum} order by h, n) - 0.5"
    order = f"({place}) / count(*) over (partition by {stratum}), h, n"
    if name == "margin" and margin is not None:
        order = f"{quoted(margin)} nulls last, n"
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
    agrees by half. ``trust``: how far loss `trust` would believe the margins (``person_trust``). ``undecided``: ties
    and dropped pairs, which are in none of them.

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
        "flips": None, "sources": {}, "accuracy": None, "trust": None,
    }  # fmt: skip
    if not clear:
        return found
    margin = margin_column(table)
    wanted = [name for name in dict.fromkeys((source, margin, "margin_source")) if name and name in table.loaded]
    values = _values(table, clear, wanted)
    flipped = {row: labels[row] == "flip" for row in clear}
    names = None if source is None else [str(values[row][source]) for row in clear]
    rates = flip_rates(list(flipped.values()), names)
    found["flips"], found["sources"] = rates["all"], rates["sources"]
    known = [row for row in clear if margin is not None and values[row][margin] is not None]
    if margin is None or not known:
        return found
    margins = np.array([values[row][margin] for row in known])
    wrong = np.array([float(flipped[row]) for row in known])
    fair = is_fair(table, margin)
    named = {str(values[row].get("margin_source") or "unknown") for row in known}
    found["accuracy"] = {
        **_accuracy(margins, wrong), "fair": fair, "column": margin,
        "margins": ["cross-fitted"] if margin == CROSS_FITTED else sorted(named),
    }  # fmt: skip
    found["trust"] = (
        person_trust(margins, wrong == 1, _sample(table, margin))
        if fair
        else {"value": None, "text": "the margins may have been learned from these labels: use cross-fitted ones"}
    )
    return found


def _values(table: PairTable, rows: Sequence[int], names: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Row -> column -> value."""
    columns = "".join(f", {quoted(name)}" for name in names)
    with table.query() as cursor:
        found = cursor.execute(
            f"select p.rowid{columns} from (select unnest(?) as n) h join pairs p on p.rowid = h.n", [list(rows)]
        ).fetchall()
    return {row[0]: dict(zip(names, row[1:], strict=True)) for row in found}


def _sample(table: PairTable, margin: str) -> np.ndarray:
    """Margins of at most ``SAMPLE`` rows, evenly over the table."""
    every = -(-table.count // SAMPLE)
    with table.query() as cursor:
        found = cursor.execute(
            f"select {quoted(margin)} as m from pairs where rowid % ? = 0 and isfinite({quoted(margin)})", [every]
        ).fetchnumpy()["m"]
    return np.asarray(found, dtype=np.float64)


def _accuracy(margins: np.ndarray, wrong: np.ndarray) -> dict[str, Any]:
    """Share of the margins whose sign the person agrees with, with its interval; a margin of 0 agrees by half."""
    signed = margins * (1 - 2 * wrong)
    return share_interval(np.where(signed == 0, 0.5, signed > 0)).to_dict()
