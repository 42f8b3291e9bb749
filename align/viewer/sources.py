"""What `align view` is given: a pair table or a run -> the Parquet files to look at, none of which is written."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from align.config.columns import TEXT
from align.errors import DataError
from align.io.parquet import write_parquet
from align.io.source_files import find_files
from align.io.stage import MANIFEST
from align.viewer.measured import Measured, folder_measured, run_measured

PAIRS, KEPT, DROPPED, RUN = "pairs.parquet", "kept.parquet", "dropped.parquet", "run.json"
FIRST = ("filter", "margins", "crossfit", "heldout", "pairs", "pairs-reward", "sample")
"""Stages whose table of pairs is shown first, in this order: the most columns come first."""
DEEPEST = 3


@dataclass(frozen=True, slots=True)
class SourceTable:
    """One table of pairs to show."""

    name: str
    files: tuple[Path, ...]
    """Parquet files with id, prompt, chosen and rejected, read in this order."""
    watched: tuple[Path, ...]
    """The files that were given; a change of one of them is reported."""
    folder: Path
    """Where its decisions.jsonl lies."""
    notes: tuple[str, ...] = ()
    """What the page says about how it was read."""
    measured: tuple[Measured, ...] = ()
    """Files with further columns of the same pairs."""


def stamp(files: tuple[Path, ...]) -> tuple[tuple[int, int, int] | None, ...]:
    """(inode, size, modification time in ns) of each file; None for one that is gone."""
    found: list[tuple[int, int, int] | None] = []
    for file in files:
        try:
            state = os.stat(file)  # noqa: PTH116
        except OSError:
            found.append(None)
        else:
            found.append((state.st_ino, state.st_size, state.st_mtime_ns))
    return tuple(found)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, finished or going on."""
    if not folder.is_dir():
        return False
    return (folder / RUN).is_file() or any((child / MANIFEST).is_file() for child in folder.iterdir() if child.is_dir())


def run_tables(folder: Path) -> list[SourceTable]:
    """The pair tables of a run's stages, the one with the most columns first; an unfinished stage has none."""
    found, measured = [], run_measured(folder)
    for inner in _folders(folder, DEEPEST):
        name = str(inner.relative_to(folder))
        both = tuple(inner / part for part in (KEPT, DROPPED) if (inner / part).is_file())
        files = both or ((inner / PAIRS,) if (inner / PAIRS).is_file() else ())
        if files and _as_it_is(files):
            others = tuple(one for one in measured if one.file not in files)
            found.append(SourceTable(f"{folder.name}/{name}", files, files, folder, measured=others))

    def place(table: SourceTable) -> tuple[int, str]:
        stage = table.name.split("/")[1]
        return (FIRST.index(stage) if stage in FIRST else len(FIRST), table.name)

    return sorted(found, key=place)


def is_measurement(folder: Path) -> bool:
    """Whether a folder holds measurements of pairs, but no pair table of its own."""
    own = any((folder / name).is_file() for name in (PAIRS, KEPT, DROPPED))
    return folder.is_dir() and not own and bool(folder_measured(folder))


def open_table(given: str, columns: dict[str, str], split: str, scratch: Path) -> SourceTable:
    """The table that a path names; one that is not Parquet with ids is converted into ``scratch`` first.

    Args:
        given: pair file, folder, pattern, saved dataset or hub id.
        columns: name in the pair table -> name in the source.
        split: split of a dataset.
        scratch: folder for a converted copy; it goes with the viewer.

    Raises:
        DataError: it is missing or unreadable, or no row is a pair.
    """
    path = Path(given)
    parts = tuple(path / part for part in (KEPT, DROPPED) if (path / part).is_file()) if path.is_dir() else ()
    if not parts and path.is_dir() and (path / PAIRS).is_file():
        parts = (path / PAIRS,)
    if not parts:
        parts = tuple(Path(file.name) for file in find_files(given, split) or [] if file.filesystem is None)
    folder = _outside_stages(path if path.is_dir() else parts[0].parent if parts else Path.cwd())
    if parts and not columns and _as_it_is(parts):
        return SourceTable(given, parts, parts, folder)
    return _converted(given, columns, split, scratch, parts, folder)


def _outside_stages(folder: Path) -> Path:
    """The folder, or the one around the stage of a run that it lies in: a stage that runs again replaces its folder."""
    own = folder.absolute()
    stages = [one for one in (own, *list(own.parents)[:DEEPEST]) if (one / MANIFEST).is_file()]
    return stages[-1].parent if stages else folder


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.endswith((".partial", ".replaced", ".tmp")):
            yield child
            if depth > 1:
                yield from _folders(child, depth - 1)


def _as_it_is(files: tuple[Path, ...]) -> bool:
    """Whether all files are Parquet with the columns that the page needs."""
    try:
        return all(file.suffix == ".parquet" and {"id", *TEXT} <= set(pq.read_schema(file).names) for file in files)
    except (OSError, pa.ArrowException):
        return False


def _converted(
    given: str, columns: dict[str, str], split: str, scratch: Path, watched: tuple[Path, ...], folder: Path
) -> SourceTable:
    from align.config import PairsSection
    from align.data.pairs import check_pairs

    checked = check_pairs(PairsSection(path=given, columns=columns, split=split), carry=True)
    if len(checked.pairs) == 0:
        first = f": {checked.problems[0]}" if checked.problems else ""
        raise DataError(f"{given}: no valid pair{first}", code="data-empty", hint="look at `align data check`")
    file = scratch / f"converted-{len(list(scratch.iterdir()))}.parquet"
    table = checked.pairs.with_format("arrow")[:].combine_chunks().replace_schema_metadata(None)
    write_parquet(table, file)
    notes = []
    if checked.invalid:
        notes.append(
            f"{len(checked.invalid)} rows are no valid pairs and are not shown; the first: {checked.problems[0]}"
        )
    return SourceTable(given, (file,), watched, folder, tuple(notes))
