"""Loading and writing tables of preference pairs.

align/config/columns.py describes the columns of a pair table; align/data/validation.py decides which rows are valid.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from align.config import PairsSection
from align.config.columns import RESPONSES, TEXT
from align.data.messages import text_array
from align.data.near_copies import with_near_copies
from align.data.pair_chunks import PairSpool, one_type
from align.data.readers import Row, stream_source
from align.data.sampling import fair_sample, report_sample
from align.data.seen_ids import SeenIds, content_id
from align.data.thumbs import SINGLE, refuse_thumbs, thumb_columns, thumb_values
from align.data.user_columns import KNOWN, unused_columns, user_array, user_columns
from align.data.validation import Problem, RowReader
from align.errors import DataError, listed
from align.io.arrow_tables import as_dataset
from align.io.console import log
from align.io.files import atomic_write
from align.io.parquet import write_parquet

FILE = "pairs.parquet"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The rows of a source, valid and invalid."""

    pairs: Dataset
    """The valid rows."""
    problems: list[Problem]
    invalid: list[dict[str, Any]]
    """The invalid rows: their values, ``row`` (the number of the row) and ``reason``."""
    unused: list[str]
    """The columns of the source that are not kept."""


def check_pairs(source: PairsSection, *, carry: bool = False) -> CheckResult:
    """Read and validate every row of a source; with ``source.limit``, keep a fair sample of the valid ones.

    Args:
        source: where the pairs come from.
        carry: keep the columns that the program does not read, unchanged.

    Raises:
        DataError: the source is missing, unreadable or empty, or lacks a column.
    """
    checked = check_rows(*stream_source(source), source.path, limit=source.limit, carry=carry)
    if not source.near_copies:
        return checked
    return replace(checked, pairs=with_near_copies(checked.pairs))


def check_rows(
    rows: Iterable[Row], columns: set[str], source: str, *, limit: int | None = None, carry: bool = False
) -> CheckResult:
    """Validate rows, which may be read one by one; of the valid ones, ``PairSpool`` bounds the memory.

    Args:
        rows: their columns have the names of the pair table.
        columns: names of all columns.
        source: name of the rows, for messages.
        limit: number of valid rows to keep; None: all.
        carry: keep the columns that the program does not read, unchanged; the rows have their ``raw`` values.
    """
    single, columns = set(SINGLE) <= columns, thumb_columns(columns)
    reader, own = RowReader(source, columns), user_columns(columns) if carry else []
    valid, problems, invalid = PairSpool(source, own), [], []
    seen, first = SeenIds(), None
    for raw in rows:
        row = replace(raw, values=thumb_values(raw.values)) if single else raw
        pair, found = reader.read(row)
        if pair is not None:
            first = first or pair
            pair["id"] = identify(pair, row, seen, source, found)
            found += other_kind(pair, first, row, source)
        if found:
            problems += found
            invalid.append({**row.values, "row": row.number, "reason": "; ".join(str(item) for item in found)})
        elif pair is not None:
            valid.add(pair | {name: row.raw.get(name) for name in own})
    drawn = None
    if limit is not None:
        drawn, total = fair_sample((str(pair["id"]) for pair in valid), limit)
        report_sample(source, len(drawn), total, "pairs")
    return CheckResult(as_dataset(valid.table(drawn)), problems, invalid, unused_columns(columns))


def load_pairs(
    source: PairsSection, *, side_file: Path | None = None, carry: bool = False, thumbs: bool = False
) -> Dataset:
    """The valid pairs of a source.

    Args:
        source: where the pairs come from; with ``drop_invalid``, invalid rows are dropped and counted.
        side_file: JSONL file for the dropped rows, with the reasons.
        carry: keep the columns that the program does not read, unchanged.
        thumbs: single responses with thumbs are taken as well.

    Raises:
        DataError: invalid rows (the first 20 and a count) without ``drop_invalid``, no row is valid, or single
            responses where pairs are needed.
    """
    checked = check_pairs(source, carry=carry)
    if checked.problems and not (source.drop_invalid and checked.invalid):
        raise unusable(source.path, checked.problems, len(checked.invalid))
    if checked.unused:
        log.info("%s: %s", source.path, describe_unused(checked.unused))
    if checked.invalid:
        log.warning("%s: left out %d invalid rows of %d", source.path, len(checked.invalid),
                    len(checked.invalid) + len(checked.pairs))  # fmt: skip
        if side_file is not None:
            lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in checked.invalid)
            side_file.write_text("".join(lines), encoding="utf-8")
    if len(checked.pairs) == 0:
        raise DataError(f"{source.path}: no valid pair", code="data-empty", hint="look at `align data check`")
    if not thumbs:
        refuse_thumbs(checked.pairs, source.path)
    return checked.pairs


def describe_unused(names: Sequence[str]) -> str:
    """What to tell the user about columns that are not kept, with a mapping for those that look like rewards."""
    known = {f"{word}_{side}": f"reward_{side}" for word in ("score", "rating", "reward") for side in RESPONSES}
    known |= {f"{side}_{word}": f"reward_{side}" for word in ("score", "rating", "reward") for side in RESPONSES}
    known |= {"category": "group", "subset": "group"}
    maps = " ".join(f"--column {known[name]}={name}" for name in names if name in known)
    example = maps or f"e.g. --column group={names[0]}"
    number = "1 column" if len(names) == 1 else f"{len(names)} columns"
    return f"{number} not used: {', '.join(names)} (map them with {example})"


def unusable(path: str, problems: Sequence[Problem], count: int) -> DataError:
    """The error for ``count`` invalid rows of a source; shows the first problems."""
    return DataError(
        f"{path}: {count or 'some'} rows cannot be used:\n{listed([str(problem) for problem in problems])}",
        code=problems[0].code,
        hint="fix the rows, or set them aside: `align data check FILE --drop-invalid`, in a run drop_invalid: true",
    )


def write_pairs(pairs: Dataset, folder: Path) -> None:
    """Write ``folder/pairs.parquet``; the same pairs give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pairs.with_format("arrow")[:].combine_chunks().replace_schema_metadata(None)
    with atomic_write(folder / FILE) as temporary:
        write_parquet(table, temporary)


def with_columns(pairs: Dataset, columns: Mapping[str, np.ndarray]) -> Dataset:
    """The table with ``columns`` (each [N]) appended; columns of the same names are replaced."""
    table = pairs.remove_columns([name for name in columns if name in pairs.column_names])
    for name, values in columns.items():
        table = table.add_column(name, values.tolist())
    return table


def read_pairs(folder: Path) -> Dataset:
    """The table that ``write_pairs`` wrote.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    try:
        return as_dataset(pq.read_table(folder / FILE, partitioning=None))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{folder / FILE}: cannot be read ({error})", code="data-unreadable") from None


def fingerprint(pairs: Dataset) -> str:
    """sha256 over column names and content; independent of the file or cache that holds the table."""
    state = hashlib.sha256(json.dumps(sorted(pairs.column_names)).encode())
    for row in pairs:
        state.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
    return state.hexdigest()


def identify(pair: dict[str, Any], row: Row, seen: SeenIds, source: str, found: list[Problem]) -> str:
    """The row's own id, or a hash of its texts (see ``content_id``); appends a problem if an own id was used before."""
    own = pair.get("id")
    if own is None:
        key = content_id([pair[column] for column in TEXT], seen)
    else:
        key = str(own)
        if (earlier := seen.get(key)) is not None:
            other = f"row {earlier}" + (" of one of the files" if row.file else "")
            expected = f"an id used once ({other} has it too)"
            found.append(Problem(row.file or source, row.number, "id", "pair-duplicate-id", repr(key), expected))
    seen.add(key, row.number)
    return key


def other_kind(pair: dict[str, Any], first: dict[str, Any], row: Row, source: str) -> list[Problem]:
    """A problem if only one of ``pair`` and ``first`` is conversational: the two kinds cannot share a table."""
    plain, wanted = (isinstance(one["prompt"], str) for one in (pair, first))
    if plain == wanted:
        return []
    kinds = ("conversational", "plain text")
    expected = f"{kinds[wanted]}, as in the rows before"
    return [Problem(row.file or source, row.number, "prompt", "pair-mixed", kinds[plain], expected)]


def table_of(pairs: list[dict[str, Any]], columns: Sequence[str], source: str) -> Dataset:
    """These columns of the pairs as a table; ``source`` is for messages.

    Raises:
        DataError: a column has values of two kinds.
    """
    arrays = {}
    for name in columns:
        with one_type(source, name):
            values = [pair.get(name) for pair in pairs]
            make = text_array if name in TEXT else pa.array if name in KNOWN else user_array
            arrays[name] = make(values)
    return as_dataset(pa.table(arrays))
