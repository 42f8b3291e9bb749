"""A view of some rows of a matrix that may be memory-mapped, copied block by block and never as a whole."""

from collections.abc import Iterator
from typing import Any

import numpy as np


class View:
    """Some rows of a matrix as a matrix.

    Args:
        vectors: [N, D].
        rows: the selected rows; None: all.
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
        """The dimension D."""
        return int(self.vectors.shape[1])

    def distances(self, places: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Euclidean distances [R] of rows to others, from the difference, since 2 - 2 cos loses small distances."""
        distances: np.ndarray = np.linalg.norm(self[places] - self[others], axis=1).astype(np.float64)
        return distances

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Places of the rows, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield np.arange(start, min(start + size, len(self)))
