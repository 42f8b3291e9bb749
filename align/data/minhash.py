"""Near-duplicates by MinHash and LSH: candidates share a band of minima, and their exact Jaccard similarity is checked.

The probability that two rows of similarity s share at least one of ``BANDS`` bands of ``ROWS`` minima is
1 - (1 - s^ROWS)^BANDS: 0.9995 at 0.9, 0.95 at 0.8 (Broder 1997; Leskovec, Rajaraman and Ullman, chapter 3).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from align.data.word_hashes import Hashes, mixed

BANDS, ROWS = 10, 6
CHECKED = 16_384
"""Candidate pairs with their texts in memory at a time."""
MOST_PER_BUCKET = 8
"""Members of a bucket that all others in it are compared with; bounds the work on a bucket of near-equal rows."""


def band_keys(shingles: Hashes, bands: int = BANDS, minima: int = ROWS) -> np.ndarray:
    """MinHash key of each band of each row, uint64 [N, bands]; rows without a shingle get unique keys.

    Args:
        shingles: hashes of the word n-grams of each row.
        bands: number of bands.
        minima: minima in a band.
    """
    count = len(shingles.offsets) - 1
    keys = np.zeros((count, bands), dtype=np.uint64)
    filled = np.flatnonzero(shingles.counts > 0)
    starts = shingles.offsets[:-1][filled]
    factors = mixed(np.arange(1, bands * minima + 1, dtype=np.uint64)) | np.uint64(1)
    for band in range(bands):
        for factor in factors[band * minima : (band + 1) * minima]:
            least = np.minimum.reduceat(shingles.values * factor, starts) if len(filled) else starts
            keys[filled, band] = mixed(keys[filled, band] + least.astype(np.uint64) + np.uint64(band + 1))
    empty = np.flatnonzero(shingles.counts == 0)
    keys[empty] = mixed(empty.astype(np.uint64))[:, None]
    return keys


def candidates(bands: Iterable[np.ndarray]) -> np.ndarray:
    """Pairs [P, 2] of rows, earlier first, that share a band, each pair once, ordered by the later row.

    Args:
        bands: keys [N] of each band, one in memory at a time; rows are in the order of preference.
    """
    pairs = [pair for keys in bands for pair in _in_one_band(keys)]
    if not pairs:
        return np.empty((0, 2), dtype=np.int64)
    earlier, later = (np.concatenate([pair[k] for pair in pairs]) for k in range(2))
    count = later.max() + 1
    packed = np.unique(later * count + earlier)
    return np.stack([packed % count, packed // count], axis=1)


def _in_one_band(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (earlier, later) rows with equal keys: each row with the first ``MOST_PER_BUCKET`` of its bucket."""
    order = np.argsort(keys, kind="stable")
    fresh = np.concatenate([[True], keys[order][1:] != keys[order][:-1]])
    first = np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))
    place = np.arange(len(order)) - first
    for member in range(MOST_PER_BUCKET):
        later = np.flatnonzero(place > member)
        if not len(later):
            return
        yield order[first[later] + member], order[later]


def near_duplicates(
    bands: Iterable[np.ndarray], shingles_of: Callable[[np.ndarray], Sequence[Hashes]], threshold: float
) -> dict[int, int]:
    """Map each near-duplicate to the earlier row that it nearly equals; that row is not a near-duplicate itself.

    Args:
        bands: the columns of ``band_keys``, rows in the order of preference.
        shingles_of: sets of shingles of some rows, one ``Hashes`` for each aspect that rows are compared by; called
            for ``CHECKED`` candidate pairs at a time.
        threshold: minimum Jaccard similarity in each aspect.
    """
    found: dict[int, int] = {}
    every = candidates(bands)
    for start in range(0, len(every), CHECKED):
        pairs = every[start : start + CHECKED]
        rows = np.unique(pairs)
        aspects = shingles_of(rows)
        sets = [[np.unique(shingles.row(k)) for shingles in aspects] for k in range(len(rows))]
        for (earlier, later), (a, b) in zip(pairs.tolist(), np.searchsorted(rows, pairs).tolist(), strict=True):
            both = zip(sets[a], sets[b], strict=True)
            if later not in found and earlier not in found and all(jaccard(*one) >= threshold for one in both):
                found[later] = earlier
    return found


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Jaccard similarity of two sorted arrays of distinct values; 0 if one is empty."""
    if not len(first) or not len(second):
        return 0.0
    places = np.searchsorted(first, second)
    shared = int((first[np.minimum(places, len(first) - 1)] == second).sum())
    return shared / (len(first) + len(second) - shared)
