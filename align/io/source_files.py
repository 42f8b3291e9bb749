"""Files of a source: one file, a folder of Parquet files or splits, or a pattern; on a disk or in an object store."""

import glob
import io
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TextIO

from align.errors import ConfigError, DataError
from align.io.object_store import connect, is_remote, store_errors

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXT_SUFFIXES = SUFFIXES[:-1]
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Suffix after one of ``TEXT_SUFFIXES`` -> Arrow's name of the compression."""
SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=[-_.])")
"""Start of the names of files that are splits of a dataset, as ``train.parquet``, ``test-00000-of-00002.parquet``."""
PUSHED = "pushed.json"
"""Object next to those of a pushed folder: their list, and whether the push is complete (align/commands/push.py)."""
HIDDEN = ("_", ".")
"""Prefixes of files in a folder that are not part of its table, as Spark and Hadoop write them."""
REQUESTS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file with rows."""

    name: str
    """Path or address, as in messages."""
    filesystem: "FileSystem | None" = None
    """The store; None: the disk."""
    place: str = ""
    """bucket/key in the store."""

    @property
    def suffix(self) -> str:
        """Suffix of the name, which decides how the file is read."""
        return table_suffix(self.name)

    @contextmanager
    def open(self) -> Iterator[Any]:
        """A path, or an open seekable file of the store, for Arrow."""
        if self.filesystem is None:
            yield Path(self.name)
            return
        with store_errors(self.name):
            stream = self.filesystem.open_input_file(self.place)
        with stream:
            yield stream

    @contextmanager
    def text(self, *, newline: str | None) -> Iterator[TextIO]:
        """The file as text (UTF-8, with or without a byte order mark)."""
        if self.filesystem is None:
            compression = COMPRESSIONS.get(PurePosixPath(self.name).suffix)
            if compression is None:
                with Path(self.name).open(encoding="utf-8-sig", newline=newline) as stream:
                    yield stream
                return
            from pyarrow import input_stream

            with (
                input_stream(self.name, compression=compression) as unpacked,
                io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline=newline) as stream,
            ):
                yield stream
            return
        with store_errors(self.name):
            content = self.filesystem.open_input_stream(self.place)
            with io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline) as stream:
                yield stream

    def state(self) -> list[str]:
        """Name, size and ETag of an object (else its generation or time), which change when it is written again."""
        assert self.filesystem is not None
        with store_errors(self.name), self.filesystem.open_input_file(self.place) as stream:
            headers = {str(key, "utf-8").lower() if isinstance(key, bytes) else str(key).lower(): value
                       for key, value in stream.metadata().items()}  # fmt: skip
            tag = headers.get("etag") or headers.get("generation") or headers.get("last-modified", b"")
            return [PurePosixPath(self.place).name, str(stream.size()), tag.decode("utf-8", "replace")]


def table_suffix(name: str) -> str:
    """Suffix of a file name without that of a compression, which only text has: ``.jsonl`` of ``a.jsonl.gz``."""
    path = PurePosixPath(name)
    inner = PurePosixPath(path.stem).suffix
    return inner if path.suffix in COMPRESSIONS and inner in TEXT_SUFFIXES else path.suffix


def find_files(source: str, split: str | None = None) -> list[SourceFile] | None:
    """The files of a source, sorted by name; None if it is a saved dataset or a hub id.

    Args:
        source: file, folder, pattern or address.
        split: which files of a folder whose files are named by split; None: all of them.

    Raises:
        DataError: there is no such file, or it is not a table, or the folder lacks the split.
    """
    if is_remote(source):
        return _remote(source, split)
    path = Path(source)
    if path.is_file() and table_suffix(path.name) in SUFFIXES:
        return [SourceFile(str(path))]
    if path.is_dir() and table_suffix(path.name) not in TEXT_SUFFIXES:
        names = [str(file) for file in sorted(path.iterdir()) if file.is_file() and _is_part(file.name)]
        return _of_split(source, [SourceFile(name) for name in names], split) or None
    if glob.has_magic(source) and not path.exists():
        return _readable(source, [SourceFile(str(file)) for file in matching_files(source)])
    if table_suffix(path.name) in SUFFIXES:
        reason = "found a folder, expected a file" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {reason}", code="data-missing", hint="check the path")
    return None


def keep_source(source: str, targets: Iterable[Path]) -> None:
    """Check that no file to be written is one that ``source`` is read from.

    Raises:
        ConfigError: a target is a file of the source.
        DataError: the source does not exist.
    """
    given = [] if is_remote(source) else [Path(file.name) for file in find_files(source) or []]
    for target in targets:
        if target.exists() and any(file.samefile(target) for file in given):
            raise ConfigError(
                f"{target}: is read, and would be replaced",
                code="output-folder",
                hint="give another folder to write to",
            )


def matching_files(pattern: str) -> list[Path]:
    """Files on the disk that match a pattern such as ``pairs/*.parquet``, sorted by name."""
    return sorted(path for path in map(Path, glob.glob(pattern)) if path.is_file())  # noqa: PTH207


def fingerprint_address(source: str) -> str:
    """Names, sizes and ETags of the objects of an address as JSON; their content is not read."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return json.dumps(list(pool.map(SourceFile.state, _remote(source, None))))


def _remote(source: str, split: str | None) -> list[SourceFile]:
    filesystem, place = connect(source)
    before = source[: len(source) - len(place)] if source.endswith(place) else source.partition("://")[0] + "://"

    def named(info: "FileInfo") -> SourceFile:
        return SourceFile(before + info.path, filesystem, info.path)

    from pyarrow.fs import FileType

    if glob.has_magic(place):
        pattern = PurePosixPath(place)
        fixed = [part for part in pattern.parts if not glob.has_magic(part)]
        base = PurePosixPath(*pattern.parts[: next(k for k, part in enumerate(pattern.parts) if part not in fixed)])
        deep = len(pattern.parts) - len(base.parts) > 1
        there = _listed(source, filesystem, str(base), deep=deep)
        wanted = [info for info in there if _matches(info.path, pattern)]
        return _readable(source, [named(info) for info in wanted])
    with store_errors(source):
        (info,) = filesystem.get_file_info([place.rstrip("/")])
    if info.type == FileType.File and not place.endswith("/"):
        _check_parents(source, filesystem, place)
        return _readable(source, [named(info)])
    if info.type == FileType.NotFound and table_suffix(place) in SUFFIXES:
        raise DataError(f"{source}: no such object", code="data-missing", hint=_where(filesystem, place))
    there = _listed(source, filesystem, place.rstrip("/"), deep=False)
    found = [named(info) for info in there if _is_part(PurePosixPath(info.path).name)]
    if not found:
        raise DataError(f"{source}: holds no file ending in .parquet", code="data-missing", hint="check the address")
    return _of_split(source, found, split)


def _of_split(source: str, files: list[SourceFile], split: str | None) -> list[SourceFile]:
    """The files of one split, if the names of all files begin with one of several splits; else all files."""
    names = [SPLIT_NAME.match(PurePosixPath(file.name).name) for file in files]
    given = [name[1] if name else "" for name in names]
    if split is None or "" in given or len(set(given)) < 2:
        return files
    if split not in given:
        raise DataError(f"{source}: no split {split!r} (known: {', '.join(sorted(set(given)))})", code="data-split")
    return [file for file, name in zip(files, given, strict=True) if name == split]


def _where(filesystem: "FileSystem", place: str) -> str:
    """The hint for a missing object: check the bucket, or the rest of the address."""
    from pyarrow.fs import FileType

    bucket = place.partition("/")[0]
    with store_errors(bucket):
        (info,) = filesystem.get_file_info([bucket])
    if info.type == FileType.NotFound:
        return f"there is no bucket {bucket!r}: check its name, and which server is asked (AWS_ENDPOINT_URL)"
    return f"the bucket {bucket!r} is there: check the rest of the address"


def _listed(source: str, filesystem: "FileSystem", folder: str, *, deep: bool) -> "list[FileInfo]":
    """Objects below ``folder``, sorted by name; raises if a push into it is incomplete."""
    from pyarrow.fs import FileSelector, FileType

    with store_errors(source):
        there = filesystem.get_file_info(FileSelector(folder, recursive=deep))
    for info in there:
        if PurePosixPath(info.path).name == PUSHED:
            _refuse_unfinished(source, filesystem, info.path)
    _check_parents(source, filesystem, folder)
    return sorted((info for info in there if info.type == FileType.File), key=lambda info: info.path)


def _check_parents(source: str, filesystem: "FileSystem", place: str) -> None:
    """Raise if a push into a folder above ``place`` is incomplete; `align push` may have been given that folder."""
    from pyarrow.fs import FileType

    above = [str(folder / PUSHED) for folder in PurePosixPath(place).parents if len(folder.parts)]
    try:
        found = filesystem.get_file_info(above)
    except OSError:  # the key may have access to this prefix only
        return
    for info in found:
        if info.type == FileType.File:
            _refuse_unfinished(source, filesystem, info.path)


def _refuse_unfinished(source: str, filesystem: "FileSystem", note: str) -> None:
    with store_errors(source), filesystem.open_input_stream(note) as stream:
        complete = b'"complete": true' in stream.read()
    if not complete:
        raise DataError(
            f"{source}: a push into it has not ended",
            code="store-unfinished",
            hint="wait for `align push`, or run it again",
        )


def _matches(place: str, pattern: PurePosixPath) -> bool:
    path = PurePosixPath(place)
    return len(path.parts) == len(pattern.parts) and path.match(str(pattern))


def _is_part(name: str) -> bool:
    split = table_suffix(name) in TEXT_SUFFIXES and SPLIT_NAME.match(name) is not None
    return (name.endswith(".parquet") or split) and not name.startswith(HIDDEN)


def _readable(source: str, files: list[SourceFile]) -> list[SourceFile]:
    """``files``; raises if there are none, or one is not a table."""
    if not files:
        raise DataError(f"{source}: no file matches", code="data-missing", hint="check the path")
    other = next((file for file in files if file.suffix not in SUFFIXES), None)
    if other is not None:
        raise DataError(
            f"{other.name}: found a file ending in {other.suffix!r}, expected {', '.join(SUFFIXES)}",
            code="data-missing",
        )
    return files
