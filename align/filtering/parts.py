"""Work over a long table in parts that are kept: a stopped run goes on at the first part that is missing."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from align.console import progress

ROWS = 8192
Arrays = dict[str, np.ndarray]


def in_parts(
    work: Callable[[int, int], Arrays], count: int, folder: Path, *, what: str, processes: int = 1, rows: int = ROWS
) -> None:
    """Call ``work(start, stop)`` for every part of ``count`` rows that ``folder`` lacks, and keep what it returns.

    Args:
        work: arrays with one entry per row; with more than one process it must be picklable.
        count: rows of the table.
        folder: gets one .npz per part; valid for the same table, work and ``rows`` only.
        what: shown as progress.
        processes: that work at the same time.
        rows: of a part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [start for start in range(0, count, rows) if not _file(folder, start).exists()]
    one = partial(_one, work, folder, count, rows)
    if processes == 1 or len(missing) < 2 * processes:
        for start in progress(missing, what=what, total=len(missing), unit="parts"):
            one(start)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for _ in progress(pool.map(one, missing), what=what, total=len(missing), unit="parts"):
            pass


def gathered(folder: Path, count: int, names: tuple[str, ...], rows: int = ROWS) -> Arrays:
    """The arrays called ``names`` of all parts, joined."""
    found: dict[str, np.ndarray] = {}
    for start, part in parts(folder, count, rows):
        for name in names:
            if name not in found:
                found[name] = np.empty((count, *part[name].shape[1:]), dtype=part[name].dtype)
            found[name][start : start + len(part[name])] = part[name]
    return found


def parts(folder: Path, count: int, rows: int = ROWS) -> Iterator[tuple[int, Mapping[str, np.ndarray]]]:
    """(first row, arrays) of every part."""
    for start in range(0, count, rows):
        with np.load(_file(folder, start), allow_pickle=False) as part:
            yield start, part


def _one(work: Callable[[int, int], Arrays], folder: Path, count: int, rows: int, start: int) -> None:
    made = work(start, min(start + rows, count))
    temporary = _file(folder, start).with_suffix(".tmp.npz")
    np.savez(temporary, allow_pickle=False, **made)
    temporary.replace(_file(folder, start))


def _file(folder: Path, start: int) -> Path:
    return folder / f"{start:010d}.npz"
