"""The texts of a table: one pair, the beginnings of many, and search; by the text cache once it is there."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import uuid
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align.config.columns import TEXT
from align.data.messages import as_messages
from align.viewer.table import AT_ONCE, PairTable
from align.viewer.text_cache import cell_values, plain_text, searched, text_batches

ROOM = 3
"""Times the size of the texts that must be free on the disk of the cache."""
BEGINNING = 160
"""Characters of a text that the list of pairs shows."""
KEPT_SEARCHES = 8
BLOCK = 2 * 122_880
"""Rows of a block of a search: whole row groups of the database, one for each of two threads."""
COPIES = 50
VECTOR = 2048
"""Rows that the database decodes together: rows of one vector cost as much as one of them."""
SETTINGS: dict[str, Any] = {"memory_limit": "200MB", "threads": 2, "access_mode": "READ_ONLY"}


class Texts:
    """The texts of one table.

    Args:
        table: the table.
        scratch: folder for the cache, removed with the viewer.
        cache: whether a cache is built at all.
    """

    def __init__(self, table: PairTable, scratch: Path, *, cache: bool = True) -> None:
        self.table = table
        self._file = scratch / f"texts-{uuid.uuid4().hex}.duckdb"
        self._database: duckdb.DuckDBPyConnection | None = None
        self._process: subprocess.Popen[str] | None = None
        self._turns = threading.BoundedSemaphore(AT_ONCE)
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[str, bool], np.ndarray] = OrderedDict()
        self.frequencies: Counter[str] | None = None
        """Rows of a sample whose prompt has each word; counted when it is first needed."""
        self._done, self._why = 0, ""
        if not cache:
            self._why = "switched off by --no-text-cache"
        elif (needed := ROOM * self._size()) > (free := shutil.disk_usage(scratch).free):
            self._why = f"too little room in {scratch}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed"
        else:
            threading.Thread(target=self._build, daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether the cache is there."""
        return self._database is not None

    def state(self) -> dict[str, Any]:
        """What the page says about the cache."""
        state = "ready" if self.ready else "none" if self._why else "building"
        return {"state": state, "done": self._done, "of": self.table.count, "why": self._why}

    def close(self) -> None:
        """Stop building and free what there is."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._database is not None:
            self._database.close()
        for file in (self._file, self._file.with_name(self._file.name + ".part")):
            file.unlink(missing_ok=True)

    def search(self, text: str, any_case: bool) -> np.ndarray:
        """Ascending numbers (int32) of the rows with ``text`` in one of their three texts; see ``hits``."""
        blocks = [found for _, found in self.hits(text, any_case)]
        return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int32)

    def hits(self, text: str, any_case: bool) -> Iterator[tuple[int, np.ndarray]]:
        """Search block by block: (rows done, ascending numbers, int32, of the block's rows with ``text``).

        Args:
            text: what is looked for in each of the three texts, as it is; no pattern.
            any_case: whether capital and small letters are the same.

        Raises:
            DataError: the file has changed since it was opened.
        """
        key = (text, any_case)
        with self._lock:
            known = self._found.get(key)
            if known is not None:
                self._found.move_to_end(key)
        if known is not None:
            yield self.table.count, known
            return
        self.table.check_unchanged()
        found = []
        for done, block in self._cache_hits(text, any_case) if self.ready else self._file_hits(text, any_case):
            found.append(block)
            yield done, block
        self.table.check_unchanged()
        with self._lock:
            self._found[key] = np.concatenate(found)
            while len(self._found) > KEPT_SEARCHES:
                self._found.popitem(last=False)

    def beginnings(self, rows: Sequence[int]) -> list[list[str]] | None:
        """The first characters of the three texts of these rows; None until the cache is there."""
        if not self.ready:
            return None
        parts = ", ".join(f"left({name}, {BEGINNING})" for name in TEXT)
        groups: dict[int, list[int]] = {}
        for row in rows:
            groups.setdefault(int(row) // VECTOR, []).append(int(row))
        found: dict[int, list[str]] = {}
        with self.cursor() as cursor:
            for group in groups.values():
                for number, *one in cursor.execute(
                    f"select rowid, {parts} from texts where rowid >= ? and rowid <= ?", [min(group), max(group)]
                ).fetchall():
                    found[number] = [" ".join(text.split()) for text in one]
        return [found[int(row)] for row in rows]

    def pair(self, row: int) -> dict[str, Any]:
        """One pair: ``values`` (text or messages of each of the three), ``plain`` (each as text), ``others`` (columns
        that are not in memory).

        Raises:
            DataError: the file has changed since it was opened.
        """
        self.table.check_unchanged()
        others = [name for name, column in self.table.columns.items() if column.kind == "long"]
        values = self.values(row)
        raw = self._from_files(row, others) if others else {}
        self.table.check_unchanged()
        return {
            "values": values,
            "plain": {name: plain_text(value) for name, value in values.items()},
            "others": {name: raw.get(name) for name in others},
        }

    def values(self, row: int) -> dict[str, Any]:
        """Text or messages of each of the three texts of a row; a missing one is an empty text."""
        if not self.ready:
            found = self._from_files(row, TEXT)
            return {name: "" if found.get(name) is None else found[name] for name in TEXT}
        with self.cursor() as cursor:
            one = cursor.execute(f"select {', '.join(TEXT)}, raw from texts where rowid = ?", [row]).fetchone()
        assert one is not None
        cells = json.loads(one[-1]) if one[-1] is not None else [as_messages(text) for text in one[:-1]]
        return {name: "" if cell is None else cell for name, cell in zip(TEXT, cells, strict=True)}

    def copies(self, row: int) -> dict[str, list[int]] | None:
        """Other rows with the same prompt, with the same responses, and with them the other way around; None until the
        cache is there. At most ``COPIES`` of each."""
        if not self.ready:
            return None
        with self.cursor() as cursor:
            own = cursor.execute(f"select {', '.join(TEXT)} from texts where rowid = ?", [row]).fetchone()
            assert own is not None
            prompt, chosen, rejected = own
            rows = cursor.execute(
                "select rowid, chosen = ? and rejected = ?, chosen = ? and rejected = ? from texts "
                "where rowid <> ? and prompt = ? order by 1",
                [chosen, rejected, rejected, chosen, row, prompt],
            ).fetchall()
        found = {
            "same": [number for number, same, _ in rows if same],
            "flipped": [number for number, _, flipped in rows if flipped],
            "prompt": [number for number, *_ in rows],
        }
        return {name: numbers[:COPIES] for name, numbers in found.items()}

    @contextlib.contextmanager
    def cursor(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor over the table ``texts`` of the cache, which must be ready; at most ``AT_ONCE`` together."""
        assert self._database is not None
        with self._turns, self._database.cursor() as cursor:
            yield cursor

    def _cache_hits(self, text: str, any_case: bool) -> Iterator[tuple[int, np.ndarray]]:
        what = f"(?i){re.escape(text)}" if any_case else text
        test = "regexp_matches" if any_case else "contains"
        condition = " or ".join(f"{test}({name}, ?)" for name in TEXT)
        start = 0
        while start < self.table.count:
            end = min(start + BLOCK, self.table.count)
            with self.cursor() as cursor:
                found = cursor.execute(
                    "select rowid::integer as n from texts where rowid >= ? and rowid < ? and "
                    f"({condition}) order by 1",
                    [start, end, *[what] * len(TEXT)],
                ).fetchnumpy()["n"]
            yield end, np.asarray(found, dtype=np.int32)
            start = end

    def _file_hits(self, text: str, any_case: bool) -> Iterator[tuple[int, np.ndarray]]:
        start = 0
        for batch in text_batches(self.table.source.files):
            hit = np.zeros(batch.num_rows, dtype=bool)
            for name in TEXT:
                match = pc.match_substring(searched(batch.column(name)), text, ignore_case=any_case)
                hit |= match.to_numpy(zero_copy_only=False)
            found = start + np.flatnonzero(hit)
            start += batch.num_rows
            yield start, found.astype(np.int32)

    def _from_files(self, row: int, names: Sequence[str]) -> dict[str, Any]:
        for file in self.table.source.files:
            with pq.ParquetFile(file) as table:
                if row >= table.metadata.num_rows:
                    row -= table.metadata.num_rows
                    continue
                group = 0
                while row >= (size := table.metadata.row_group(group).num_rows):
                    row, group = row - size, group + 1
                there = [name for name in names if name in table.schema_arrow.names]
                for batch in table.iter_batches(1024, row_groups=[group], columns=there):
                    if row < batch.num_rows:
                        one = batch.slice(row, 1)
                        return {name: cell_values(one.column(name))[0] for name in there}
                    row -= batch.num_rows
        raise IndexError(f"row {row} is beyond the table")

    def _size(self) -> int:
        """Bytes of the texts, unpacked."""
        size = 0
        for file in self.table.source.files:
            with pq.ParquetFile(file) as table:
                for group in range(table.metadata.num_row_groups):
                    part = table.metadata.row_group(group)
                    columns = (part.column(index) for index in range(part.num_columns))
                    size += sum(
                        one.total_uncompressed_size for one in columns if one.path_in_schema.split(".")[0] in TEXT
                    )
        return size

    def _build(self) -> None:
        command = [sys.executable, "-m", "align.viewer.text_cache", str(self._file), *map(str, self.table.source.files)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stdout is not None and self._process.stderr is not None
        for line in self._process.stdout:
            self._done = int(line)
        error = self._process.stderr.read()
        if self._process.wait() != 0 or self._done != self.table.count:
            reason = (error.strip().splitlines() or ["it was stopped"])[-1]
            self._why = f"it could not be made: {reason}"
            return
        database = duckdb.connect(str(self._file), config=SETTINGS)
        database.execute("set enable_external_access = false")
        database.execute("set lock_configuration = true")
        self._database = database
