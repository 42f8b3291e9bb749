"""Vectors in a file in the order of their lists, and who looks into which of its shares.

A share is a run of whole lists of about ``SHARE_BYTES`` of vectors. Lists that are near have near numbers, so a vector
looks into few shares, and into no more than it has lists, however many there are. Two passes write the file: one deals
the vectors out to the shares, one sorts each share. Nothing of it is held in memory but a block of rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from align.filtering.knn.row_view import View
from align.io.files import atomic_folder
from align.sharding.arrays import as_table

SHARE_BYTES = 1 << 28
BLOCK = 65_536
RECORDS, SHARES, STARTS = "vectors.bin", "shares.npy", "starts.npy"


@dataclass(frozen=True, slots=True, eq=False)
class Listed:
    """N vectors, [D] each, sorted by the first of the lists that they look into; their number is their position."""

    folder: Path
    records: np.ndarray
    """[N], mapped: ``place`` in the view, ``list`` [probes], nearest first, -1 for none, and ``vector`` [D]."""
    share_of: np.ndarray
    """[C], of each list."""
    starts: np.ndarray
    """[S + 1], positions where the shares begin."""

    @classmethod
    def read(cls, folder: Path, probes: int, size: int) -> "Listed":
        """From the folder that ``in_lists`` wrote."""
        records = np.memmap(folder / RECORDS, dtype=_record(probes, size), mode="r")
        share_of, starts = (np.load(folder / name, allow_pickle=False) for name in (SHARES, STARTS))
        return cls(folder, records, share_of, starts)

    def vectors(self, positions: np.ndarray | slice) -> np.ndarray:
        """[P, D], float32."""
        return np.ascontiguousarray(self.records["vector"][positions])

    def blocks(self) -> Iterator[slice]:
        """All positions, ``BLOCK`` at a time."""
        for start in range(0, len(self.records), BLOCK):
            yield slice(start, min(start + BLOCK, len(self.records)))

    def visitors(self, share: int) -> "Visitors":
        """The vectors that look into a share."""
        positions = np.memmap(self.folder / f"visitors-{share}.bin", dtype=np.int64, mode="r")
        return Visitors(self, share, positions)

    def lists_of(self, share: int) -> range:
        """The lists in a share."""
        own = np.flatnonzero(self.share_of == share)
        return range(int(own[0]), int(own[-1]) + 1)


@dataclass(frozen=True, slots=True, eq=False)
class Visitors:
    """Vectors that look into a share, as rows for ``align.shards``."""

    listed: Listed
    share: int
    positions: np.ndarray
    """int64 [V], ascending."""

    def __len__(self) -> int:
        return len(self.positions)

    def select(self, indices: range) -> Dataset:
        """Some of them: ``vector``, ``own`` position, and ``list``, those in the share first, counted within it, -1
        beyond; in so many columns as it takes."""
        positions = np.asarray(self.positions[indices.start : indices.stop])
        lists = self.listed.records["list"][positions]
        inside = (lists >= 0) & (self.listed.share_of[lists] == self.share)
        order = np.argsort(~inside, axis=1, kind="stable")[:, : inside.sum(axis=1).max()]
        lists = np.where(inside, lists - self.listed.lists_of(self.share).start, -1).astype(np.int32)
        lists = np.take_along_axis(lists, order, axis=1)
        return as_table({"vector": self.listed.vectors(positions), "own": positions, "list": lists})


def in_lists(view: View, near: np.ndarray, count: int, folder: Path) -> Listed:
    """Write the vectors of a view in the order of their lists, unless ``folder`` holds them.

    Args:
        view: N vectors, [D] each.
        near: int32 [N, probes], the lists that each looks into, the one that it lies in first.
        count: of the lists.
        folder: valid for these arguments only.
    """
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            share_of, starts = _shares(view, near, count)
            np.save(temporary / SHARES, share_of, allow_pickle=False)
            np.save(temporary / STARTS, starts, allow_pickle=False)
            _deal(view, near, share_of, temporary)
            _sort(share_of, _record(near.shape[1], view.size), temporary)
    return Listed.read(folder, near.shape[1], view.size)


def _record(probes: int, size: int) -> np.dtype:
    fields = [("place", np.int64), ("list", np.int32, (probes,)), ("vector", np.float32, (size,))]
    return np.dtype(fields, align=True)


def _shares(view: View, near: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of each list, int32 [count], and where the shares begin, [S + 1]; none is without vectors."""
    sizes = sum((np.bincount(near[block, 0], minlength=count) for block in view.blocks(BLOCK)), np.zeros(count, int))
    wanted = (np.cumsum(sizes) - sizes) // max(1, SHARE_BYTES // (4 * view.size))
    there = np.unique(wanted[sizes > 0])
    share_of = np.minimum(np.searchsorted(there, wanted), len(there) - 1).astype(np.int32)
    within = np.array([sizes[share_of == share].sum() for share in range(len(there))])
    return share_of, np.concatenate([[0], np.cumsum(within)])


def _deal(view: View, near: np.ndarray, share_of: np.ndarray, folder: Path) -> None:
    """Every vector into the file of its share."""
    for block in view.blocks(BLOCK):
        records = np.empty(len(block), dtype=_record(near.shape[1], view.size))
        records["place"], records["list"], records["vector"] = block, near[block], view[block]
        _append(records, share_of[records["list"][:, 0]], folder, "share-{}.bin")


def _sort(share_of: np.ndarray, record: np.dtype, folder: Path) -> None:
    """The shares one after the other into one file, each in the order of its lists, and who looks into which."""
    position = 0
    with (folder / RECORDS).open("wb") as target:
        for share in range(int(share_of.max()) + 1):
            file = folder / f"share-{share}.bin"
            dealt = np.memmap(file, dtype=record, mode="r")
            order = np.argsort(dealt["list"][:, 0], kind="stable")
            for start in range(0, len(order), BLOCK):
                records = dealt[order[start : start + BLOCK]]
                target.write(np.ascontiguousarray(records).data)
                lists = records["list"]
                shares = np.sort(share_of[np.where(lists < 0, lists[:, :1], lists)], axis=1)
                first = np.diff(shares, axis=1, prepend=-1) > 0
                positions = np.broadcast_to(np.arange(position, position + len(records))[:, None], first.shape)
                _append(positions[first], shares[first], folder, "visitors-{}.bin")
                position += len(records)
            file.unlink()


def _append(rows: np.ndarray, targets: np.ndarray, folder: Path, name: str) -> None:
    """Each row to the end of the file of its target."""
    order = np.argsort(targets, kind="stable")
    numbers, starts = np.unique(targets[order], return_index=True)
    for number, part in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        with (folder / name.format(number)).open("ab") as file:
            file.write(np.ascontiguousarray(rows[part]).data)  # unlike tofile, fails on a full disk
