"""`align push`: copy a finished folder to an object store so that a partial copy never looks complete.

Objects appear whole or not at all. ``pushed.json`` next to them lists the files of the folder; it holds
``"complete": false`` before the first object is changed and true after the last. ``manifest.json`` files are deleted
first and written last, for readers that look at those alone. Files that ``pushed.json`` lists with their hash are not
copied again.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import ConfigError, DataError
from align.io.console import log, progress
from align.io.hashing import hash_file
from align.io.object_store import connect, is_remote, store_errors
from align.io.source_files import PUSHED
from align.io.stage import MANIFEST, PARTIAL, REPLACED

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

UPDATE_SECONDS = 10.0
"""How often an unfinished push updates ``pushed.json``."""
AT_ONCE = 8
"""Files that are copied concurrently."""
CHUNK_BYTES = 1 << 20
UNFINISHED = (PARTIAL, REPLACED)


@dataclass(frozen=True, slots=True)
class Target:
    """A folder in an object store."""

    address: str
    filesystem: "FileSystem"
    place: str

    def at(self, name: str) -> str:
        """Path of the file ``name`` of the folder in the store."""
        return f"{self.place}/{name}"


def push(
    folder: Path, address: str, *, dry_run: bool = False, public: bool = False, base_model: str | None = None
) -> dict[str, Any] | None:
    """Push ``folder`` to an object store or to the hub; return the plan of an upload that is only planned.

    Args:
        folder: what a command has written.
        address: s3://bucket/prefix, hf://user/name or hf://datasets/user/name.
        dry_run: hub only: upload nothing and use no network.
        public: hub only: the repository may be public.
        base_model: hub only: hub id of an adapter's base model.

    Raises:
        AlignError: see ``push_folder`` and align/commands/push_hub.py; or an option of the hub with a store.
    """
    from align.commands.push_hub import is_hub, plan_upload, upload

    if is_hub(address):
        plan = plan_upload(folder, address, public=public, base_model=base_model)
        if dry_run:
            return plan.describe()
        log.info("push: %s", upload(plan))
        return None
    given = {"--dry-run": dry_run, "--public": public, "--base-model": base_model}
    options = [name for name, value in given.items() if value]
    if options:
        raise ConfigError(
            f"{address}: found {', '.join(options)}, expected an address of the hub with it (hf://user/name)",
            code="hub-address", hint="leave it out",
        )  # fmt: skip
    push_folder(folder, address)
    return None


def push_folder(folder: Path, address: str) -> int:
    """Copy ``folder`` to ``address``; return the number of objects that were copied.

    Raises:
        AlignError: there is nothing to copy, the address holds other objects, or the store fails.
    """
    files = _local(folder)
    if not is_remote(address):
        raise ConfigError(
            f"{address}: found a path, expected an address such as s3://bucket/prefix", code="store-address",
            hint="hf://user/name uploads a model to the hub; to copy to a disk, use cp",
        )  # fmt: skip
    filesystem, place = connect(address)
    target = Target(address, filesystem, place.rstrip("/"))
    with store_errors(address):
        known = _known(target)
    wanted = {name: {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)} for name in files}
    if known == {"complete": True, "files": wanted}:
        log.info("push: %s is up to date, nothing copied", address)
        return 0
    with store_errors(address):
        return _push(folder, target, known["files"], wanted)


def _local(folder: Path) -> list[str]:
    """Finished files of ``folder``, manifests last."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder", code="data-missing", hint="push what a command has written")
    names = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder)
        if path.is_file() and path.suffix != ".tmp" and not any(part.endswith(UNFINISHED) for part in parts.parts):
            names.append(parts.as_posix())
    names = [name for name in names if name != PUSHED]
    if not names:
        raise DataError(f"{folder}: holds no finished file", code="data-empty", hint="push what a command has written")
    return sorted(names, key=lambda name: (_is_manifest(name), name))


def _is_manifest(name: str) -> bool:
    return name.rpartition("/")[2] == MANIFEST


def _known(target: Target) -> dict[str, Any]:
    """The ``pushed.json`` of an earlier push; an empty one if the target is new.

    Raises:
        ConfigError: the target holds objects that no push has written.
    """
    from pyarrow.fs import FileSelector, FileType

    (info,) = target.filesystem.get_file_info([target.at(PUSHED)])
    if info.type == FileType.NotFound:
        there = target.filesystem.get_file_info(FileSelector(target.place, allow_not_found=True))
        if there:
            raise ConfigError(
                f"{target.address}: found other objects there ({there[0].base_name}), "
                "expected nothing or an earlier push",
                code="output-folder",
                hint="give another address",
            )
        return {"complete": False, "files": {}}
    with target.filesystem.open_input_stream(info.path) as stream:
        content = stream.read()
    try:
        known: dict[str, Any] = json.loads(content)
        return {"complete": known["complete"], "files": dict(known["files"])}
    except (ValueError, LookupError, TypeError):
        raise DataError(
            f"{target.address}/{PUSHED}: not the list of a push", code="data-unreadable", hint="give another address"
        ) from None


def _push(folder: Path, target: Target, known: dict[str, Any], wanted: dict[str, Any]) -> int:
    """Copy files that ``known`` lacks or has with another hash; delete objects that are no longer in the folder."""
    copied = {name: made for name, made in wanted.items() if known.get(name) == made and not _is_manifest(name)}
    missing = [name for name in wanted if name not in copied]
    _write_list(target, {name: copied.get(name) for name in known | wanted}, complete=False)
    for name in known:
        if _is_manifest(name) or name not in wanted:
            _delete(target, name)
    noted = time.monotonic()
    for name in progress(_copies(folder, target, missing, wanted), what="pushing", total=len(missing), unit="files"):
        copied[name] = wanted[name]
        if time.monotonic() - noted > UPDATE_SECONDS:
            _write_list(target, {other: copied.get(other) for other in wanted}, complete=False)
            noted = time.monotonic()
    _write_list(target, wanted, complete=True)
    log.info("push: %d files copied, %d were there: %s", len(missing), len(wanted) - len(missing), target.address)
    return len(missing)


def _copies(folder: Path, target: Target, names: list[str], wanted: dict[str, Any]) -> Iterator[str]:
    """Copy files concurrently, the manifests after all others; yield the name of each copied file.

    The copies run in threads because signals are raised in the main thread only: if the program is stopped, files in
    flight are still copied to their end. pyarrow would turn the part already written to a dropped stream into an
    object.
    """
    for manifests in (False, True):
        chosen = [name for name in names if _is_manifest(name) == manifests]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            running = [pool.submit(_copy, folder / name, target, name, wanted[name]) for name in chosen]
            try:
                for name, copy in zip(chosen, running, strict=True):
                    copy.result()
                    yield name
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _write_list(target: Target, files: dict[str, Any], *, complete: bool) -> None:
    content = json.dumps({"complete": complete, "files": files}, indent=1).encode()
    stream = target.filesystem.open_output_stream(target.at(PUSHED))
    stream.write(content)
    stream.close()


def _delete(target: Target, name: str) -> None:
    from pyarrow.fs import FileType

    (info,) = target.filesystem.get_file_info([target.at(name)])
    if info.type == FileType.File:
        target.filesystem.delete_file(info.path)


def _copy(file: Path, target: Target, name: str, made: dict[str, Any]) -> None:
    """Copy one file.

    Raises:
        DataError: the file changed during the copy, or can no longer be read.
        OSError: the store failed; an earlier object is unchanged.
    """
    state = hashlib.sha256()
    stream = target.filesystem.open_output_stream(target.at(name))
    try:
        for block in _blocks(file):
            state.update(block)
            stream.write(block)
        if state.hexdigest() != made["sha256"]:
            raise DataError(f"{file}: changed while it was copied", code="store-changed", hint="push it later")
        stream.close()
    except DataError:
        stream.close()
        _delete(target, name)
        raise
    except OSError:
        with suppress(OSError):
            stream.close()
        raise


def _blocks(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as content:
            while block := content.read(CHUNK_BYTES):
                yield block
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})", code="data-unreadable") from None
