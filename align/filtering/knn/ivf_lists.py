"""Inverted lists in a file: vectors in the order of their lists, and which vectors probe which share of the file.

A share is a run of complete lists with about ``SHARE_BYTES`` of vectors. Lists that are near have near numbers, so a
vector probes few shares, however many there are, and never more than it probes lists. Two passes write the file: one
distributes the vectors to the shares, one sorts each share. Only a block of rows is in memory.
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
class InvertedLists:
    """N vectors, [D] each, in the order of the lists that store them; the index of a vector is its position."""

    folder: Path
    records: np.ndarray
    """[N], memory-mapped: ``place`` in the view, ``list`` [probes], nearest first, -1 for none, and ``vector`` [D]."""
    share_of: np.ndarray
    """[C], the share of each list."""
    starts: np.ndarray
    """[S + 1], first position of each share."""

    @classmethod
    def read(cls, folder: Path, probes: int, size: int) -> "InvertedLists":
        """Read the folder that ``write_inverted_lists`` wrote."""
        records = np.memmap(folder / RECORDS, dtype=_record(probes, size), mode="r")
        share_of, starts = (np.load(folder / name, allow_pickle=False) for name in (SHARES, STARTS))
        return cls(folder, records, share_of, starts)

    def vectors(self, positions: np.ndarray | slice) -> np.ndarray:
        """Vectors at some positions, [P, D], float32."""
        return np.ascontiguousarray(self.records["vector"][positions])

    def blocks(self) -> Iterator[slice]:
        """All positions, ``BLOCK`` at a time."""
        for start in range(0, len(self.records), BLOCK):
            yield slice(start, min(start + BLOCK, len(self.records)))

    def queries(self, share: int) -> "ShareQueries":
        """The vectors that probe a share."""
        positions = np.memmap(self.folder / f"visitors-{share}.bin", dtype=np.int64, mode="r")
        return ShareQueries(self, share, positions)

    def lists_of(self, share: int) -> range:
        """The lists in a share."""
        lists = np.flatnonzero(self.share_of == share)
        return range(int(lists[0]), int(lists[-1]) + 1)


@dataclass(frozen=True, slots=True, eq=False)
class ShareQueries:
    """Vectors that probe a share, as rows of a sharded job (align/sharding/jobs.py)."""

    lists: InvertedLists
    share: int
    positions: np.ndarray
    """int64 [V], ascending."""

    def __len__(self) -> int:
        return len(self.positions)

    def select(self, indices: range) -> Dataset:
        """Some queries as a table: ``vector``, ``own`` position, and ``list``, the probed lists of the share.

        Lists are numbered within the share and padded with -1 to the most that a query probes.
        """
        positions = np.asarray(self.positions[indices.start : indices.stop])
        lists = self.lists.records["list"][positions]
        inside = (lists >= 0) & (self.lists.share_of[lists] == self.share)
        order = np.argsort(~inside, axis=1, kind="stable")[:, : inside.sum(axis=1).max()]
        lists = np.where(inside, lists - self.lists.lists_of(self.share).start, -1).astype(np.int32)
        lists = np.take_along_axis(lists, order, axis=1)
        return as_table({"vector": self.lists.vectors(positions), "own": positions, "list": lists})


def write_inverted_lists(view: View, near: np.ndarray, count: int, folder: Path) -> InvertedLists:
    """Write the vectors of a view in the order of their lists, unless ``folder`` exists.

    Args:
        view: N vectors, [D] each.
        near: int32 [N, probes], the lists that each vector probes; it is stored in the first.
        count: number of lists.
        folder: valid for these arguments only.
    """
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            share_of, starts = _split_into_shares(view, near, count)
            np.save(temporary / SHARES, share_of, allow_pickle=False)
            np.save(temporary / STARTS, starts, allow_pickle=False)
            _distribute(view, near, share_of, temporary)
            _sort_shares(share_of, _record(near.shape[1], view.size), temporary)
    return InvertedLists.read(folder, near.shape[1], view.size)


def _record(probes: int, size: int) -> np.dtype:
    fields = [("place", np.int64), ("list", np.int32, (probes,)), ("vector", np.float32, (size,))]
    return np.dtype(fields, align=True)


def _split_into_shares(view: View, near: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of each list, int32 [count], and the first position of each share, [S + 1]; no share is empty."""
    sizes = sum((np.bincount(near[block, 0], minlength=count) for block in view.blocks(BLOCK)), np.zeros(count, int))
    wanted = (np.cumsum(sizes) - sizes) // max(1, SHARE_BYTES // (4 * view.size))
    filled = np.unique(wanted[sizes > 0])
    share_of = np.minimum(np.searchsorted(filled, wanted), len(filled) - 1).astype(np.int32)
    lengths = np.array([sizes[share_of == share].sum() for share in range(len(filled))])
    return share_of, np.concatenate([[0], np.cumsum(lengths)])


def _distribute(view: View, near: np.ndarray, share_of: np.ndarray, folder: Path) -> None:
    """Append every vector to the file of its share."""
    for block in view.blocks(BLOCK):
        records = np.empty(len(block), dtype=_record(near.shape[1], view.size))
        records["place"], records["list"], records["vector"] = block, near[block], view[block]
        _append(records, share_of[records["list"][:, 0]], folder, "share-{}.bin")


def _sort_shares(share_of: np.ndarray, record: np.dtype, folder: Path) -> None:
    """Concatenate the shares into one file, each in the order of its lists, and write which positions probe which."""
    position = 0
    with (folder / RECORDS).open("wb") as target:
        for share in range(int(share_of.max()) + 1):
            file = folder / f"share-{share}.bin"
            unsorted = np.memmap(file, dtype=record, mode="r")
            order = np.argsort(unsorted["list"][:, 0], kind="stable")
            for start in range(0, len(order), BLOCK):
                records = unsorted[order[start : start + BLOCK]]
                target.write(np.ascontiguousarray(records).data)
                lists = records["list"]
                shares = np.sort(share_of[np.where(lists < 0, lists[:, :1], lists)], axis=1)
                first = np.diff(shares, axis=1, prepend=-1) > 0
                positions = np.broadcast_to(np.arange(position, position + len(records))[:, None], first.shape)
                _append(positions[first], shares[first], folder, "visitors-{}.bin")
                position += len(records)
            file.unlink()


def _append(rows: np.ndarray, targets: np.ndarray, folder: Path, name: str) -> None:
    """Append each row to the file of its target."""
    order = np.argsort(targets, kind="stable")
    numbers, starts = np.unique(targets[order], return_index=True)
    for number, part in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        with (folder / name.format(number)).open("ab") as file:
            file.write(np.ascontiguousarray(rows[part]).data)  # unlike tofile, it raises on a full disk
