"""The table of preference pairs: loading, splitting, keeping. What makes a row valid stands in align/pair_rules.py.

A pair table is a ``datasets.Dataset`` with ``id``, ``prompt``, ``chosen``, ``rejected`` (trl's explicit-prompt
preference format, plain or conversational) and those of ``OPTIONAL`` that its source or a stage gave it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from align.config import PairsConfig
from align.config.data import COLUMNS
from align.console import log
from align.errors import DataError, listed
from align.pair_rules import SHOWN_CHARACTERS, Problem, RowReader
from align.pair_sources import Row, read_files, read_source
from align.seen_ids import SeenIds

TEXT = ("prompt", "chosen", "rejected")
OPTIONAL = tuple(name for name in COLUMNS if name not in ("id", *TEXT))
FILE = "pairs.parquet"
ID_DIGITS = 16
ROUNDING = 1e-9
"""What floats leave of 1 - 10 * 0.1."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What became of every row of a source."""

    pairs: Dataset
    """Valid rows."""
    problems: list[Problem]
    invalid: list[dict[str, Any]]
    """Rows that cannot be used: the row as it was, ``row`` (its number) and ``reason``."""


def check_pairs(source: PairsConfig) -> CheckResult:
    """Read and validate every row of a source.

    Raises:
        DataError: the source is missing, unreadable or empty, or lacks a column.
    """
    rows, columns = read_source(source)
    reader = RowReader(source.path, columns)
    valid, problems, invalid = [], [], []
    seen, first = SeenIds(), None
    for row in rows:
        pair, found = reader.read(row)
        if pair is not None:
            first = first or pair
            pair["id"] = identify(pair, row, seen, source.path, found)
            found += other_kind(pair, first, row, source.path)
            valid.append(pair)
        if found:
            problems += found
            if pair is not None:
                valid.pop()
            invalid.append({**row.values, "row": row.number, "reason": "; ".join(str(item) for item in found)})
    return CheckResult(_table(valid[: source.limit], source.path), problems, invalid)


def load_pairs(source: PairsConfig, *, side_file: Path | None = None) -> Dataset:
    """The valid pairs of a source.

    Args:
        source: where the pairs come from; with ``drop_invalid`` bad rows are left out and counted.
        side_file: JSONL file for the rows left out, with their reasons.

    Raises:
        DataError: bad rows (the first 20 and a count) without ``drop_invalid``, or no row is left.
    """
    checked = check_pairs(source)
    if checked.problems and not (source.drop_invalid and checked.invalid):
        raise unusable(source.path, checked.problems, len(checked.invalid))
    if checked.invalid:
        log.warning("%s: left out %d invalid rows of %d", source.path, len(checked.invalid),
                    len(checked.invalid) + len(checked.pairs))  # fmt: skip
        if side_file is not None:
            lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in checked.invalid)
            side_file.write_text("".join(lines), encoding="utf-8")
    if len(checked.pairs) == 0:
        raise DataError(f"{source.path}: no valid pair", code="data-empty", hint="look at `align data check`")
    return checked.pairs


def unusable(path: str, problems: Sequence[Problem], count: int) -> DataError:
    """The error that ``count`` rows of a source cannot be used, with the first problems."""
    return DataError(
        f"{path}: {count or 'some'} rows cannot be used:\n{listed([str(problem) for problem in problems])}",
        code=problems[0].code,
        hint="mend the rows, or set them aside: `align data check FILE --drop-invalid`, in a run drop_invalid: true",
    )


def write_pairs(pairs: Dataset, folder: Path) -> None:
    """Write ``folder/pairs.parquet``; the same pairs give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pairs.with_format("arrow")[:].combine_chunks().replace_schema_metadata(None)
    temporary = folder / f"{FILE}.tmp"
    pq.write_table(table, temporary, compression="zstd")
    temporary.replace(folder / FILE)


def with_columns(pairs: Dataset, columns: Mapping[str, np.ndarray]) -> Dataset:
    """The table with ``columns`` (each [N]) at its end, in place of those of the same names."""
    table = pairs.remove_columns([name for name in columns if name in pairs.column_names])
    for name, values in columns.items():
        table = table.add_column(name, values.tolist())
    return table


def read_pairs(folder: Path) -> Dataset:
    """The table that ``write_pairs`` wrote.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    try:
        return Dataset(pq.read_table(folder / FILE, partitioning=None))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{folder / FILE}: cannot be read ({error})", code="data-unreadable") from None


def fingerprint(pairs: Dataset) -> str:
    """sha256 over column names and content, whatever file or cache the table came from."""
    state = hashlib.sha256(json.dumps(sorted(pairs.column_names)).encode())
    for row in pairs:
        state.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
    return state.hexdigest()


def split_by_prompt(pairs: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(train, held out): about ``fraction`` held out, no prompt on both sides (see ``folds_by_prompt``)."""
    if fraction == 0:
        return pairs, pairs.select([])
    share = max(fraction, 1 / max(len(pairs), 1))
    parts = int(1 / share + ROUNDING)
    rest = 1 - parts * share
    held_out = _dealt(pairs, [share] * parts + ([rest] if rest > ROUNDING else []), seed) == 0
    return pairs.select(np.flatnonzero(~held_out)), pairs.select(np.flatnonzero(held_out))


def folds_by_prompt(pairs: Dataset, folds: int, seed: int) -> np.ndarray:
    """Fold [N] in 0..folds-1 of every pair; the pairs of one prompt stay together, folds are of nearly equal size.

    A prompt that more than one pair in 2 ``folds`` shares (an instruction common to a whole dataset) says nothing
    about which pairs belong together: its pairs are dealt out one by one.
    """
    return _dealt(pairs, [1 / folds] * folds, seed)


def _dealt(pairs: Dataset, shares: list[float], seed: int) -> np.ndarray:
    """``folds_by_prompt`` for folds of these shares of the pairs."""
    folds, shared = len(shares), np.array(shares)
    keys = [json.dumps(prompt, sort_keys=True) for prompt in pairs["prompt"]]
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    largest = max(1, len(keys) // (2 * folds))
    units: list[list[int]] = []
    for members in groups.values():
        units += [members] if len(members) <= largest else [[member] for member in members]
    order = np.random.default_rng(seed).permutation(len(units))
    fold = np.empty(len(keys), dtype=np.int64)
    sizes = np.zeros(folds, dtype=np.int64)
    for unit in sorted((units[k] for k in order), key=len, reverse=True):
        smallest = int((sizes / shared).argmin())
        fold[unit] = smallest
        sizes[smallest] += len(unit)
    return fold


def load_prompts(source: str) -> list[Any]:
    """The ``prompt`` of every row of a JSONL, CSV or Parquet file, or of several: text, or a list of messages.

    Raises:
        DataError: file missing, a row without a prompt.
    """
    rows = read_files(source)
    for row in rows:
        if row.unreadable:
            raise DataError(f"{row.file or source}:row {row.number}: {row.unreadable}", code="data-row")
    reader = RowReader(source, {"prompt"})
    problems = [problem for row in rows for problem in reader.text(row, "prompt")]
    if problems:
        raise DataError(f"{source}:\n{listed([str(problem) for problem in problems])}", code="prompt-row")
    if not rows:
        raise DataError(f"{source}: holds no rows", code="data-empty", hint="expected one prompt per row")
    return [row.values["prompt"] for row in rows]


def summarize(pairs: Dataset) -> dict[str, Any]:
    """Counts and mean lengths (words) of a pair table."""
    words = {column: np.array([_words(text) for text in pairs[column]]) for column in TEXT}
    return {
        "pairs": len(pairs),
        "prompts": len({json.dumps(prompt, sort_keys=True) for prompt in pairs["prompt"]}),
        "conversational": not isinstance(pairs["prompt"][0], str),
        **{f"{column}_words": float(count.mean()) for column, count in words.items()},
        "chosen_longer_share": float((words["chosen"] > words["rejected"]).mean()),
        "columns": ", ".join(pairs.column_names),
    }


def clusters_of(pairs: Dataset) -> np.ndarray:
    """Number of the cluster of every pair, int64 [N]: pairs of one prompt are no independent draws.

    A prompt that more than one pair in ten shares (an instruction common to a whole dataset) says nothing about which
    pairs belong together: of its pairs those do that share a response.
    """
    count = len(pairs)
    texts = {name: [_name(text) for text in pairs[name]] for name in TEXT}
    often = Counter(texts["prompt"])
    places: dict[bytes, int] = {}
    links: list[tuple[int, int]] = []
    for k, (prompt, *responses) in enumerate(zip(*texts.values(), strict=True)):
        shared = [prompt + response for response in responses]
        if often[prompt] <= max(2, count // 10):
            shared.append(prompt)
        links += [(k, count + places.setdefault(name, len(places))) for name in shared]
    size = count + len(places)
    graph = coo_matrix((np.ones(len(links)), tuple(np.array(links, dtype=np.int64).reshape(-1, 2).T)), (size, size))
    clusters: np.ndarray = connected_components(graph, directed=False)[1][:count].astype(np.int64)
    return clusters


def gaps(pairs: Dataset, column: str) -> np.ndarray:
    """Places of the pairs that have no value in a column of numbers, int64 [G]."""
    return np.flatnonzero(np.isnan(np.asarray(pairs[column], dtype=np.float64)))


def identify(pair: dict[str, Any], row: Row, seen: SeenIds, source: str, found: list[Problem]) -> str:
    """The row's own id, or a hash of its content made unique for repeated rows; a repeated own id is a problem."""
    own = pair.get("id")
    if own is None:
        content = json.dumps([pair[column] for column in TEXT], sort_keys=True, ensure_ascii=False)
        key = base = hashlib.sha256(content.encode()).hexdigest()[:ID_DIGITS]
        repeat = 2
        while seen.get(key) is not None:
            key, repeat = f"{base}-{repeat}", repeat + 1
    else:
        key = str(own)
        if (earlier := seen.get(key)) is not None:
            other = f"row {earlier}" + (" of one of the files" if row.file else "")
            expected = f"an id used once ({other} has it too)"
            found.append(Problem(row.file or source, row.number, "id", "pair-duplicate-id", repr(key), expected))
    seen.add(key, row.number)
    return key


def other_kind(pair: dict[str, Any], first: dict[str, Any], row: Row, source: str) -> list[Problem]:
    """Plain and conversational rows cannot share a table: a problem where ``pair`` is not of the kind of ``first``."""
    plain, wanted = (isinstance(one["prompt"], str) for one in (pair, first))
    if plain == wanted:
        return []
    kinds = ("conversational", "plain text")
    expected = f"{kinds[wanted]}, as in the rows before"
    return [Problem(row.file or source, row.number, "prompt", "pair-mixed", kinds[plain], expected)]


def _table(valid: list[dict[str, Any]], source: str) -> Dataset:
    columns = ["id", *TEXT, *(name for name in OPTIONAL if any(pair.get(name) is not None for pair in valid))]
    made = {}
    for name in columns:
        with one_type(source, name):
            made[name] = pa.array([pair.get(name) for pair in valid])
    return Dataset(pa.table(made))


@contextmanager
def one_type(source: str, name: str) -> Iterator[None]:
    """Turn what Arrow raises where the values of the column ``name`` are of two kinds into one message.

    Raises:
        DataError: see above.
    """
    try:
        yield
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{source}:{name}: its rows do not fit one column ({' '.join(str(error).split())[:SHOWN_CHARACTERS]})",
            code="pair-type",
            hint="give every row the same kind of value, and every message the same keys",
        ) from None


def _name(text: Any) -> bytes:
    """Digest of a text or messages."""
    return hashlib.blake2b(json.dumps(text, sort_keys=True).encode(), digest_size=16).digest()


def _words(text: Any) -> int:
    return len(text.split()) if isinstance(text, str) else sum(len(turn["content"].split()) for turn in text)
