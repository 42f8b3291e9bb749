"""Which pairs a person should check next, and what checked random pairs say about the labels. Pure functions.

Two orders for two purposes. The *random* order is a stratified sample: every beginning of it holds each source in
proportion to its pairs, so the share of wrong labels in a beginning is an honest estimate for the table. The *reading*
order begins with the pairs whose label a cross-fitted margin contradicts most: it shows what is wrong soonest, and the
share of wrong labels in it says nothing about the table.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from align.stats import share_interval


def random_order(ids: Sequence[str], sources: Sequence[str] | None = None) -> np.ndarray:
    """All rows [N], int64: in each source by a hash of the ids, the sources in proportion to their pairs.

    It has no seed: the same pairs give the same order, in any order of the rows.

    Args:
        ids: of the pairs, different strings.
        sources: of the pairs, [N]; None: one source.
    """
    digests = [hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest() for name in ids]
    by_hash = sorted(range(len(ids)), key=digests.__getitem__)
    names = ["" if sources is None else str(sources[row]) for row in range(len(ids))]
    totals: dict[str, int] = {}
    for name in names:
        totals[name] = totals.get(name, 0) + 1
    seen = dict.fromkeys(totals, 0)
    places = np.zeros(len(ids))
    for row in by_hash:
        places[row] = (seen[names[row]] + 0.5) / totals[names[row]]
        seen[names[row]] += 1
    return np.array(sorted(by_hash, key=lambda row: (places[row], digests[row])), dtype=np.int64)


def reading_order(margins: np.ndarray) -> np.ndarray:
    """All rows [N], int64, the lowest margin first; rows without a margin (NaN) last.

    Args:
        margins: chosen minus rejected, [N], from models that have not seen the pair's label: cross-fitted or outside.
    """
    return np.argsort(np.where(np.isnan(margins), np.inf, margins), kind="stable").astype(np.int64)


def flip_rates(flipped: Sequence[bool], sources: Sequence[str] | None = None) -> dict[str, Any]:
    """Share of wrong labels, with Wilson's 95% interval, among pairs that were checked in the random order.

    Args:
        flipped: whether the check turned the label around, [M], of a beginning of ``random_order``.
        sources: of these pairs, [M]; None: none are told.

    Returns:
        ``all``, and ``sources``: name -> estimate; None and {} without a pair.
    """
    values = np.asarray(flipped, dtype=np.float64)
    if not len(values):
        return {"all": None, "sources": {}}
    names = np.asarray([] if sources is None else [str(one) for one in sources])
    return {
        "all": share_interval(values).to_dict(),
        "sources": {str(name): share_interval(values[names == name]).to_dict() for name in np.unique(names)},
    }
