"""The ids of a table that is read row by row; in SQLite beyond a million, so memory does not bound their number."""

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

IN_MEMORY = 1_000_000
"""Number of ids kept in a dictionary (0.2 to 0.3 GB); if there are more, all of them move to a file."""
CACHE_KIB = 65_536
ID_DIGITS = 16
"""Hexadecimal digits of an id that is a hash."""


class SeenIds:
    """Id -> number of the row that had it first.

    Args:
        file: database for more than ``IN_MEMORY`` ids, overwritten; None keeps all ids in memory.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.few: dict[str, int] = {}
        self.many: sqlite3.Connection | None = None

    def get(self, key: str) -> int | None:
        """Number of the row that had this id first; None if no row had it."""
        if self.many is None:
            return self.few.get(key)
        found = self.many.execute("SELECT row FROM seen WHERE id = ?", (_bytes(key),)).fetchone()
        return None if found is None else int(found[0])

    def add(self, key: str, number: int) -> None:
        """Remember the row of an id, unless an earlier row had it."""
        if self.many is None:
            self.few.setdefault(key, number)
            if self.file is not None and len(self.few) > IN_MEMORY:
                self.many = self._move(self.file)
        else:
            self.many.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (_bytes(key), number))

    def close(self) -> None:
        """Remove the database."""
        if self.many is not None:
            self.many.close()
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _move(self, file: Path) -> sqlite3.Connection:
        """Move the ids from memory to the file, which is of no use after a crash: no journal, no fsync."""
        file.unlink(missing_ok=True)
        made = sqlite3.connect(file, isolation_level=None)
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_KIB}"):
            made.execute(f"PRAGMA {setting}")
        made.execute("CREATE TABLE seen (id BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        made.execute("BEGIN")
        made.executemany("INSERT INTO seen VALUES (?, ?)", ((_bytes(key), row) for key, row in self.few.items()))
        self.few = {}
        return made


def content_id(content: Any, seen: SeenIds) -> str:
    """Hash of a JSON value; a repeated one gets a suffix, ``-2`` for the first repetition."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    key = base = hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]
    repeat = 2
    while seen.get(key) is not None:
        key, repeat = f"{base}-{repeat}", repeat + 1
    return key


def _bytes(key: str) -> bytes:
    """UTF-8 that also encodes lone surrogates, which JSON strings can hold."""
    return key.encode("utf-8", "surrogatepass")
