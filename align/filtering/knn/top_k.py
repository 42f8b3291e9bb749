"""The top-k neighbors of each vector: their similarities and places, [N, k] each, unordered."""

from pathlib import Path

import numpy as np

from align.io.files import atomic_folder, atomic_write
from align.sharding.arrays import Arrays

BLOCK = 65_536
COMPARED = 1 << 27
"""Pairs of an old and a new neighbor that are compared at a time."""


class TopK:
    """The top-k neighbors so far of N vectors, in files of ``folder``; merging a share twice counts once.

    Args:
        folder: made where it is missing; an interrupted ``merge`` is rolled back.
        count: N.
        k: neighbors of each.
    """

    def __init__(self, folder: Path, count: int, k: int) -> None:
        self.folder = folder
        if not folder.exists():
            with atomic_folder(folder) as temporary:
                for name, dtype, fill in (("similarity", np.float32, -np.inf), ("place", np.int64, -1)):
                    array = np.lib.format.open_memmap(temporary / f"{name}.npy", "w+", dtype, (count, k))
                    array[:] = fill
        self.undo = folder / "undo.npz"
        self.similarity, self.place = (
            np.load(folder / f"{name}.npy", mmap_mode="r+", allow_pickle=False) for name in ("similarity", "place")
        )
        if self.undo.exists():
            with np.load(self.undo, allow_pickle=False) as before:
                self.similarity[before["rows"]], self.place[before["rows"]] = before["similarity"], before["place"]
            self.undo.unlink()

    def holds(self, share: int) -> bool:
        """Whether a share was merged."""
        return (self.folder / str(share)).exists()

    def merge(self, share: int, positions: np.ndarray, answers: Arrays) -> None:
        """Merge a share's answers to the vectors at ``positions`` [V]: ``similarity`` and ``place``, [V, k] each."""
        k = self.place.shape[1]
        block = max(1, min(BLOCK, COMPARED // k**2))
        for start in range(0, len(positions), block):
            part, rows = slice(start, start + block), np.asarray(positions[start : start + block])
            known, place = self.place[rows], answers["place"][part]
            again = (place[:, :, None] == known[:, None, :]).any(axis=2)
            similarity = np.where(again, -np.inf, answers["similarity"][part])
            both = np.concatenate([self.similarity[rows], similarity], axis=1)
            self._put(rows, top_k_of_rows(both, np.concatenate([known, np.where(again, -1, place)], axis=1), k))
        self.similarity.flush()
        self.place.flush()
        (self.folder / str(share)).touch()

    def _put(self, rows: np.ndarray, kept: Arrays) -> None:
        """Overwrite rows of the two files. The old rows are saved first, so an interrupted write is rolled back."""
        before = {"rows": rows, "similarity": self.similarity[rows], "place": self.place[rows]}
        with atomic_write(self.undo) as temporary, temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **before)
        self.similarity[rows], self.place[rows] = kept["similarity"], kept["place"]
        self.undo.unlink()


def top_k_of_rows(similarity: np.ndarray, place: np.ndarray, k: int) -> Arrays:
    """The ``k`` most similar neighbors of each row, [R, k], unordered."""
    kept = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    return {
        "similarity": np.take_along_axis(similarity, kept, axis=1).astype(np.float32, copy=False),
        "place": np.take_along_axis(place, kept, axis=1),
    }


def kth_neighbor(similarity: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Place [N] of the k-th nearest of each row's neighbors [N, k]; of the last that was found, if there are fewer."""
    found = np.where(place < 0, np.inf, similarity)
    return np.take_along_axis(place, found.argmin(axis=1)[:, None], axis=1)[:, 0]
