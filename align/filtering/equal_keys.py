"""Which of many rows have equal keys; beside the keys a sorted copy is held, 8 bytes a row, and what has been found."""

from collections.abc import Iterator

import numpy as np

BLOCK = 1 << 20


def repeated(keys: np.ndarray) -> np.ndarray:
    """bool [N]: whether another row has the same of the keys [N]."""
    ordered = np.sort(keys)
    return among(keys, np.unique(ordered[1:][ordered[1:] == ordered[:-1]]))


def among(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """bool [N]: whether a key is one of ``wanted`` [M], which is sorted."""
    found = np.zeros(len(keys), dtype=bool)
    for part in blocks(len(keys) if len(wanted) else 0):
        places = np.minimum(np.searchsorted(wanted, keys[part]), len(wanted) - 1)
        found[part] = wanted[places] == keys[part]
    return found


def one_key(hashes: np.ndarray, columns: tuple[int, ...]) -> np.ndarray:
    """Some columns of hashes [N, C] as one, uint64 [N], that depends on their order."""
    factor = np.uint64(0x9E3779B97F4A7C15)
    found = np.zeros(len(hashes), dtype=np.uint64)
    for part in blocks(len(hashes)):
        block = np.asarray(hashes[part])
        for column in columns:
            found[part] = found[part] * factor + block[:, column]
    return found


def blocks(count: int) -> Iterator[slice]:
    """Parts of so many rows."""
    return (slice(start, start + BLOCK) for start in range(0, count, BLOCK))
