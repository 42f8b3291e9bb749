"""What tests read from and write to the bucket of an object store."""

from pathlib import Path

from pyarrow import fs

from tests.helpers.bad_input_makers import message, run_command
from tests.helpers.store_server import KEY, SECRET, SEEN

PARTS = 3
"""Parquet files of the folder of pairs."""
BUCKET = "bucket"
SCORE = ("--model", "backbone", "--output", "scored")


def put(store: fs.FileSystem, file: Path, place: str) -> None:
    write(store, place, file.read_bytes())


def write(store: fs.FileSystem, place: str, content: bytes) -> None:
    with store.open_output_stream(f"{BUCKET}/{place}") as stream:
        stream.write(content)


def names(store: fs.FileSystem, place: str = "") -> list[str]:
    found = store.get_file_info(fs.FileSelector(f"{BUCKET}/{place}", recursive=True, allow_not_found=True))
    return sorted(info.path.removeprefix(f"{BUCKET}/") for info in found if info.type == fs.FileType.File)


def stored(store: fs.FileSystem, place: str) -> bytes:
    with store.open_input_stream(f"{BUCKET}/{place}") as stream:
        return bytes(stream.read())


def requests(server: Path) -> list[str]:
    return (server / SEEN).read_text().splitlines()


def told(command: tuple[str, ...], folder: Path) -> str:
    """The one message of a command that ends with exit code 2."""
    code, output, errors = run_command(command, folder)
    assert code == 2, errors
    assert "Traceback" not in errors + output and errors.count("error [") == 1
    assert SECRET not in errors + output and KEY not in errors + output
    return message(errors)
