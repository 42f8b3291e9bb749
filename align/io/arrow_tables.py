"""Arrow tables in memory as datasets, without the copies that datasets makes to name one."""

import hashlib
import io
from typing import Any

import pyarrow as pa
from datasets import Dataset

FINGERPRINT_BYTES = 8


class _Digest(io.RawIOBase):
    """A file that keeps only the digest of what is written."""

    def __init__(self) -> None:
        self.state = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.state.update(content)
        return len(content)


def as_dataset(table: pa.Table) -> Dataset:
    """The table as a dataset that shares its memory; equal tables, in equal chunks, have the same fingerprint.

    ``Dataset(table)`` pickles the table for its fingerprint, which takes three times its memory.
    """
    digest = _Digest()
    with pa.PythonFile(digest, mode="w") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return Dataset(table, fingerprint=digest.state.hexdigest())
