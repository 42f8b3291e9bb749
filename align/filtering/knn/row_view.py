"""Some rows of a matrix that may lie in a file, copied block by block and never as a whole."""

from collections.abc import Iterator
from typing import Any

import numpy as np


class View:
    """Some rows of a matrix as a matrix of their own.

    Args:
        vectors: [N, D].
        rows: those that count; all where absent.
    """

    def __init__(self, vectors: np.ndarray, rows: np.ndarray | None = None) -> None:
        self.vectors = vectors
        self.rows = np.arange(len(vectors)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: Any) -> np.ndarray:
        return np.ascontiguousarray(self.vectors[self.rows[places]], dtype=np.float32)

    @property
    def size(self) -> int:
        """D."""
        return int(self.vectors.shape[1])

    def distances(self, places: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Distances [R] of rows to others, from the difference: 2 - 2 cos loses small distances."""
        found: np.ndarray = np.linalg.norm(self[places] - self[others], axis=1).astype(np.float64)
        return found

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Places of the rows, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield np.arange(start, min(start + size, len(self)))
