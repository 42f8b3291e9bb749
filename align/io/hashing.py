"""Digests of values and fingerprints of files."""

import hashlib
import json
from glob import has_magic
from pathlib import Path
from typing import Any

from align.io.object_store import is_remote
from align.io.source_files import fingerprint_address, matching_files

CHUNK_BYTES = 1 << 20


def digest(value: Any) -> str:
    """sha256 over the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_source(source: str) -> str:
    """Content hash of a file, a folder or the files that match a pattern; state of the objects of a store.

    Any other name, a hub id, is returned as it is.
    """
    if is_remote(source):
        return fingerprint_address(source)
    path = Path(source)
    if path.is_file():
        return _hash_files([path])
    if path.is_dir():
        return _hash_files(sorted(entry for entry in path.rglob("*") if entry.is_file()))
    return _hash_files(matching_files(source)) if has_magic(source) else source


def hash_file(file: Path) -> str:
    """sha256 of a file's content."""
    state = hashlib.sha256()
    _update(state, file)
    return state.hexdigest()


def _hash_files(files: list[Path]) -> str:
    state = hashlib.sha256()
    for file in files:
        state.update(file.name.encode())
        _update(state, file)
    return state.hexdigest()


def _update(state: "hashlib._Hash", file: Path) -> None:
    with file.open("rb") as stream:
        while block := stream.read(CHUNK_BYTES):
            state.update(block)
