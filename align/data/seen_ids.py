"""The ids of a table that is read row by row: which row had which, without an end to how many there may be."""

import sqlite3
from pathlib import Path

IN_MEMORY = 1_000_000
"""Ids kept in a dictionary, 0.2 to 0.3 GB; with more all of them lie in a file."""
CACHE_KIB = 65_536


class SeenIds:
    """Id -> number of the row that had it first.

    Args:
        file: for a database once there are more than ``IN_MEMORY``, overwritten; without one all stay in memory.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.few: dict[str, int] = {}
        self.many: sqlite3.Connection | None = None

    def get(self, key: str) -> int | None:
        """Number of the row that had this id, None where there was none."""
        if self.many is None:
            return self.few.get(key)
        found = self.many.execute("SELECT row FROM seen WHERE id = ?", (_bytes(key),)).fetchone()
        return None if found is None else int(found[0])

    def add(self, key: str, number: int) -> None:
        """Remember the row of an id, unless an earlier one had it."""
        if self.many is None:
            self.few.setdefault(key, number)
            if self.file is not None and len(self.few) > IN_MEMORY:
                self.many = self._move(self.file)
        else:
            self.many.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (_bytes(key), number))

    def close(self) -> None:
        """Remove the file."""
        if self.many is not None:
            self.many.close()
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _move(self, file: Path) -> sqlite3.Connection:
        """From memory to the file, which nobody needs after a crash: no journal, no waiting for the disk."""
        file.unlink(missing_ok=True)
        made = sqlite3.connect(file, isolation_level=None)
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_KIB}"):
            made.execute(f"PRAGMA {setting}")
        made.execute("CREATE TABLE seen (id BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        made.execute("BEGIN")
        made.executemany("INSERT INTO seen VALUES (?, ?)", ((_bytes(key), row) for key, row in self.few.items()))
        self.few = {}
        return made


def _bytes(key: str) -> bytes:
    """Any string that JSON can hold, half a character included."""
    return key.encode("utf-8", "surrogatepass")
