"""Fair samples: drawn by a hash of the ids, so that neither the order of the rows nor the ids' own order matters."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator

from align.io.console import log


def fair_sample(ids: Iterable[str], count: int) -> tuple[list[int], int]:
    """Draw ``count`` of the ids, those with the smallest SHA-256, in memory for ``count`` of them.

    Files are often sorted by source, date or length, and ids often begin with one of these, so the first rows in either
    order are not fair. The draw has no seed: the same rows give the same sample, in any order and in any command.

    Args:
        ids: different strings, in any order.
        count: number to draw; all if there are fewer.

    Returns:
        Places of the drawn ids, ascending, and the number of all ids.
    """
    total = 0

    def digests() -> Iterator[tuple[bytes, int]]:
        nonlocal total
        for total, name in enumerate(ids, 1):
            yield hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest(), total - 1

    drawn = heapq.nsmallest(count, digests())
    return sorted(place for _, place in drawn), total


def report_sample(source: str, drawn: int, total: int, what: str) -> None:
    """Log how many rows of how many are used, if not all are."""
    if drawn < total:
        log.info("%s: %d of %d %s, drawn by a hash of their ids", source, drawn, total, what)
