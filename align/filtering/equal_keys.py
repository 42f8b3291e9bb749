"""Duplicate detection on 64-bit keys; the memory besides the keys is a sorted copy, 8 bytes a row, and the result."""

from collections.abc import Iterator

import numpy as np

BLOCK = 1 << 20


def duplicated(keys: np.ndarray) -> np.ndarray:
    """bool [N]: whether another row has the same key [N]."""
    ordered = np.sort(keys)
    return isin_sorted(keys, np.unique(ordered[1:][ordered[1:] == ordered[:-1]]))


def isin_sorted(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """bool [N]: whether a key is in ``wanted`` [M], which is sorted."""
    result = np.zeros(len(keys), dtype=bool)
    for part in blocks(len(keys) if len(wanted) else 0):
        places = np.minimum(np.searchsorted(wanted, keys[part]), len(wanted) - 1)
        result[part] = wanted[places] == keys[part]
    return result


def combined_key(hashes: np.ndarray, columns: tuple[int, ...]) -> np.ndarray:
    """Combine some columns of hashes [N, C] into one key, uint64 [N], that depends on their order."""
    factor = np.uint64(0x9E3779B97F4A7C15)
    keys = np.zeros(len(hashes), dtype=np.uint64)
    for part in blocks(len(hashes)):
        block = np.asarray(hashes[part])
        for column in columns:
            keys[part] = keys[part] * factor + block[:, column]
    return keys


def blocks(count: int) -> Iterator[slice]:
    """Slices of ``BLOCK`` rows that cover ``count`` rows."""
    return (slice(start, start + BLOCK) for start in range(0, count, BLOCK))
