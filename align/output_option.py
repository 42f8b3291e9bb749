"""`--output`: a folder on a disk, which `align push` copies to an object store."""

from pathlib import Path
from typing import Any

import typer

from align.stores import local_path


def output_folder(what: str) -> Any:
    """The option that names a folder to write; ``what`` is its help."""
    return typer.Option(help=what, parser=_on_disk, metavar="FOLDER")


def _on_disk(given: str | Path) -> Path:
    folder = Path(local_path(str(given), what="--output"))
    if folder.is_file():
        raise typer.BadParameter(f"{folder}: found a file, expected a folder")
    return folder
