"""The k best neighbours of each vector: their similarities and places, [N, k] each, in no order."""

from pathlib import Path

import numpy as np

from align.io.files import atomic_folder, atomic_write
from align.sharding.arrays import Arrays

BLOCK = 65_536
COMPARED = 1 << 27
"""Pairs of an old and a new neighbour that are compared at a time."""


class Best:
    """The k best neighbours so far of N vectors, in files of ``folder``; a share that was added twice counts once."""

    def __init__(self, folder: Path, count: int, k: int) -> None:
        self.folder = folder
        if not folder.exists():
            with atomic_folder(folder) as temporary:
                for name, kind, none in (("similarity", np.float32, -np.inf), ("place", np.int64, -1)):
                    made = np.lib.format.open_memmap(temporary / f"{name}.npy", "w+", kind, (count, k))
                    made[:] = none
        self.undo = folder / "undo.npz"
        self.similarity, self.place = (
            np.load(folder / f"{name}.npy", mmap_mode="r+", allow_pickle=False) for name in ("similarity", "place")
        )
        if self.undo.exists():
            with np.load(self.undo, allow_pickle=False) as before:
                self.similarity[before["rows"]], self.place[before["rows"]] = before["similarity"], before["place"]
            self.undo.unlink()

    def holds(self, share: int) -> bool:
        """Whether a share was added."""
        return (self.folder / str(share)).exists()

    def add(self, share: int, positions: np.ndarray, found: Arrays) -> None:
        """What a share answered to the vectors at ``positions`` [V]: ``similarity`` and ``place``, [V, k] each."""
        k = self.place.shape[1]
        block = max(1, min(BLOCK, COMPARED // k**2))
        for start in range(0, len(positions), block):
            part, rows = slice(start, start + block), np.asarray(positions[start : start + block])
            known, place = self.place[rows], found["place"][part]
            again = (place[:, :, None] == known[:, None, :]).any(axis=2)
            similarity = np.where(again, -np.inf, found["similarity"][part])
            both = np.concatenate([self.similarity[rows], similarity], axis=1)
            self._put(rows, nearest(both, np.concatenate([known, np.where(again, -1, place)], axis=1), k))
        self.similarity.flush()
        self.place.flush()
        (self.folder / str(share)).touch()

    def _put(self, rows: np.ndarray, kept: Arrays) -> None:
        """In place of what there is, which is kept aside meanwhile: a kill between the two files leaves them as they
        were."""
        before = {"rows": rows, "similarity": self.similarity[rows], "place": self.place[rows]}
        with atomic_write(self.undo) as temporary, temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **before)
        self.similarity[rows], self.place[rows] = kept["similarity"], kept["place"]
        self.undo.unlink()


def nearest(similarity: np.ndarray, place: np.ndarray, k: int) -> Arrays:
    """The ``k`` most similar of each row, [R, k]."""
    kept = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    return {
        "similarity": np.take_along_axis(similarity, kept, axis=1).astype(np.float32, copy=False),
        "place": np.take_along_axis(place, kept, axis=1),
    }


def farthest(similarity: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The place [N] of the least similar of each row's neighbours [N, k], of those that were found."""
    found = np.where(place < 0, np.inf, similarity)
    return np.take_along_axis(place, found.argmin(axis=1)[:, None], axis=1)[:, 0]
