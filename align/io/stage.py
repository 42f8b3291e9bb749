"""One stage writes one folder: its artefacts and ``manifest.json``. A folder that exists is a finished stage."""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from align.distributed import from_main_process, process_rank, wait_until
from align.errors import ConfigError
from align.io.console import log
from align.io.disk import disk_problems
from align.io.files import write_json
from align.io.hashing import digest
from align.io.secrets import redact

MANIFEST = "manifest.json"
PACKAGES = ("margin-align", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "vaderSentiment")
KEY, PARTIAL, REPLACED = "key", ".partial", ".replaced"


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished stage."""

    name: str
    folder: Path
    key: str
    """sha256 of everything the stage was made from; the input of the stages after it."""
    skipped: bool
    seconds: float
    """Wall-clock seconds of the run that made the folder."""


def run_stage(
    name: str,
    folder: Path,
    inputs: Mapping[str, Any],
    work: Callable[[Path], None],
    *,
    collective: bool = False,
) -> Stage:
    """Run ``work`` in a temporary folder and rename it when whole; skip it where a finished folder has the same inputs.

    A stage that was stopped finds its own unfinished folder again, with whatever checkpoints ``work`` left in it,
    as long as its inputs are the same.

    Args:
        name: shown to the user and kept in the manifest.
        folder: where the finished stage lies.
        inputs: JSON values that determine the result: configuration, seed, keys of earlier stages.
        work: writes the artefacts into the folder that it is given.
        collective: under a launcher with several processes, all of them run ``work`` together (training, scoring);
            only the first may then write what ``work`` leaves, or each its own part. Otherwise the first process does
            it all and the others wait for the folder.

    Raises:
        ConfigError: ``folder`` holds what no stage of this name has written; it stays as it is.
    """
    inputs, key = redact(dict(inputs)), stage_key(name, inputs)
    partial = folder.with_name(folder.name + PARTIAL)
    if process_rank() > 0 and not collective:
        return _awaited(name, folder, key)
    begun = from_main_process(lambda: _begin(name, folder, key)) if collective else _begin(name, folder, key)
    if not begun:
        log.info("%s: up to date, skipped (%s)", name, folder)
        return Stage(name, folder, key, True, _seconds(folder))
    log.info("%s: running", name)
    start = time.monotonic()
    with disk_problems(partial):
        work(partial)
    if process_rank() > 0:
        return _awaited(name, folder, key)
    seconds = time.monotonic() - start
    write_json(
        partial / MANIFEST,
        {"stage": name, "key": key, "inputs": inputs, "seconds": seconds, "versions": versions()},
    )
    _replace(partial, folder)
    log.info("%s: done in %.0f s -> %s", name, seconds, folder)
    return Stage(name, folder, key, False, seconds)


def finished_stage(name: str, folder: Path, inputs: Mapping[str, Any]) -> Stage | None:
    """The stage in ``folder`` where it was made from these inputs; nothing is run."""
    manifest, key = read_manifest(folder), stage_key(name, inputs)
    if manifest is None or manifest["key"] != key:
        return None
    return Stage(name, folder, key, True, float(manifest["seconds"]))


def stage_key(name: str, inputs: Mapping[str, Any]) -> str:
    """What ``run_stage`` knows a stage by, whether or not it has run."""
    return digest({"stage": name, **redact(dict(inputs))})


def check_output(folder: Path, stage: str) -> None:
    """Look whether ``folder`` is new or holds an earlier result of ``stage``: a stage replaces what is there.

    Raises:
        ConfigError: it holds something else.
    """
    taken = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    manifest = read_manifest(folder)
    other = not (folder / MANIFEST).exists() if manifest is None else manifest.get("stage") != stage
    if taken and other:
        raise ConfigError(
            f"{folder}: found other files there, expected a new folder or an earlier result of the same command",
            code="output-folder",
            hint="give another folder to write to, or move these files",
        )


def check_files(folder: Path, names: Sequence[str], own: Sequence[str] = ()) -> None:
    """Look whether a command may write files into ``folder`` beside what is there: it replaces none of another's.

    Args:
        folder: where the command writes.
        names: files that others write under the same names.
        own: files or folders that the command alone leaves, before or with its own of ``names``.

    Raises:
        ConfigError: the folder is a finished stage, or holds one of ``names`` and nothing of ``own``.
    """
    found = [name for name in (MANIFEST, *names) if (folder / name).exists()]
    if found and (found[0] == MANIFEST or not any((folder / name).exists() for name in own)):
        raise ConfigError(
            f"{folder / found[0]}: found the result of another command, expected a new folder or an earlier result of "
            "the same command",
            code="output-folder",
            hint="give another folder to write to",
        )


def _begin(name: str, folder: Path, key: str) -> bool:
    """Whether there is something to do; if so, the temporary folder is there and belongs to ``key``."""
    partial = folder.with_name(folder.name + PARTIAL)
    _finish_replacement(folder, key)
    check_output(folder, name)
    manifest = read_manifest(folder)
    if manifest is not None and manifest["key"] == key:
        return False
    note = partial / KEY
    if partial.exists() and (not note.exists() or note.read_text(encoding="utf-8") != key):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    note.write_text(key, encoding="utf-8")
    return True


def _awaited(name: str, folder: Path, key: str) -> Stage:
    """The stage that the first process finishes, once it has."""
    wait_until(lambda: (read_manifest(folder) or {}).get("key") == key)
    return Stage(name, folder, key, False, _seconds(folder))


def _seconds(folder: Path) -> float:
    manifest = read_manifest(folder)
    assert manifest is not None
    return float(manifest["seconds"])


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage, or None where there is none."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not {"key", "seconds"} <= manifest.keys():
        log.warning("%s: cannot be read, so the stage is not taken as finished", path)
        return None
    return manifest


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _replace(new: Path, folder: Path) -> None:
    """Put ``new``, which is whole, in place of ``folder``; killed between any two lines, the next run goes on here."""
    old = folder.with_name(folder.name + REPLACED)
    if folder.exists():
        if old.exists():
            shutil.rmtree(old)
        folder.replace(old)
    (new / KEY).unlink(missing_ok=True)
    new.replace(folder)
    if old.exists():
        shutil.rmtree(old)


def _finish_replacement(folder: Path, key: str) -> None:
    """Do what a run that was killed in ``_replace`` left undone."""
    partial, old = folder.with_name(folder.name + PARTIAL), folder.with_name(folder.name + REPLACED)
    waiting = read_manifest(partial)
    if waiting is not None and waiting["key"] == key:
        _replace(partial, folder)
    elif old.exists() and not folder.exists():
        old.replace(folder)
    elif old.exists():
        shutil.rmtree(old)
