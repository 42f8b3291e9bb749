"""Write files and folders as a whole, by a temporary name and a rename; read and write JSON."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"
"""Ending of the temporary names."""


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``file`` to write to, and rename it to ``file`` after the body.

    A reader never sees half of the file, and a body that raises or is killed leaves an earlier ``file`` as it was. To
    save an array, open the path: numpy adds ``.npy`` to a path, and nothing to an open file.
    """
    temporary = file.with_name(file.name + TEMPORARY)
    try:
        yield temporary
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder next to ``folder`` and rename it to ``folder``, a new name, after the body."""
    temporary = folder.with_name(folder.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)  # an earlier run was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(file: Path, text: str) -> None:
    """Write a text in UTF-8 by ``atomic_write``."""
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    """Write a value as indented JSON by ``atomic_write``; what JSON has no type for is written as ``str`` of it."""
    write_text(file, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
