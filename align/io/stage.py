"""A stage writes one folder with its results and ``manifest.json``; the folder exists only once it is complete."""

import json
import os
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
    """sha256 of all inputs of the stage; an input of the stages after it."""
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
    """Run ``work`` in a temporary folder and rename it at the end; skip it if ``folder`` has the same inputs.

    A stopped stage resumes in its unfinished folder, with all checkpoints that ``work`` left there, if its inputs are
    unchanged.

    Args:
        name: name for messages and the manifest.
        folder: folder of the finished stage.
        inputs: JSON values that determine the result: configuration, seed, keys of earlier stages.
        work: writes the results into the folder that it is given.
        collective: all processes of a launcher run ``work`` together (training, scoring); then only rank 0 writes
            results, or each rank its own part. Otherwise rank 0 runs ``work`` and the others wait for the folder.

    Raises:
        ConfigError: ``folder`` contains files that no stage of this name wrote; they are left unchanged.
    """
    inputs, key = redact(dict(inputs)), stage_key(name, inputs)
    partial = folder.with_name(folder.name + PARTIAL)
    if process_rank() > 0 and not collective:
        return _wait_for_stage(name, folder, key)
    begun = from_main_process(lambda: _begin(name, folder, key)) if collective else _begin(name, folder, key)
    if not begun:
        log.info("%s: up to date, skipped (%s)", name, folder)
        return Stage(name, folder, key, True, _seconds(folder))
    log.info("%s: running", name)
    start, cpu = time.monotonic(), _cpu_seconds()
    with disk_problems(partial):
        work(partial)
    if process_rank() > 0:
        return _wait_for_stage(name, folder, key)
    seconds = time.monotonic() - start
    took = {"seconds": seconds, "cpu_seconds": _cpu_seconds() - cpu}
    write_json(
        partial / MANIFEST,
        {"stage": name, "key": key, "inputs": inputs, **took, "versions": versions()},
    )
    _replace(partial, folder)
    log.info("%s: done in %.0f s -> %s", name, seconds, folder)
    return Stage(name, folder, key, False, seconds)


def finished_stage(name: str, folder: Path, inputs: Mapping[str, Any]) -> Stage | None:
    """The finished stage in ``folder`` if it was made from these inputs, else None; nothing is run."""
    manifest, key = read_manifest(folder), stage_key(name, inputs)
    if manifest is None or manifest["key"] != key:
        return None
    return Stage(name, folder, key, True, float(manifest["seconds"]))


def stage_key(name: str, inputs: Mapping[str, Any]) -> str:
    """Key of a stage: sha256 of its name and its inputs without secrets."""
    return digest({"stage": name, **redact(dict(inputs))})


def check_output(folder: Path, stage: str) -> None:
    """Check that ``folder`` is new or an earlier result of ``stage``, because a stage replaces its folder.

    Raises:
        ConfigError: it contains anything else.
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
    """Check that a command that writes ``names`` into ``folder`` overwrites no file of another command.

    Args:
        folder: folder that the command writes into.
        names: files of the command whose names other commands use as well.
        own: files or folders that no other command writes, written before or together with ``names``.

    Raises:
        ConfigError: the folder is a finished stage, or contains one of ``names`` and nothing of ``own``.
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
    """Whether the stage has to run; if so, create its temporary folder for ``key``, or keep an unfinished one."""
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


def _wait_for_stage(name: str, folder: Path, key: str) -> Stage:
    """Wait for rank 0 to finish the stage, and return it."""
    wait_until(lambda: (read_manifest(folder) or {}).get("key") == key)
    return Stage(name, folder, key, False, _seconds(folder))


def _cpu_seconds() -> float:
    """CPU seconds of this process and its finished children."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _seconds(folder: Path) -> float:
    manifest = read_manifest(folder)
    assert manifest is not None
    return float(manifest["seconds"])


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage; None if it is missing or cannot be read."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not {"key", "seconds"} <= manifest.keys():
        log.warning("%s: cannot be read, so the stage counts as unfinished", path)
        return None
    return manifest


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _replace(new: Path, folder: Path) -> None:
    """Replace ``folder`` by the complete folder ``new``; after a kill at any line, the next run finishes this."""
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
    """Finish a replacement that a kill interrupted in ``_replace``."""
    partial, old = folder.with_name(folder.name + PARTIAL), folder.with_name(folder.name + REPLACED)
    waiting = read_manifest(partial)
    if waiting is not None and waiting["key"] == key:
        _replace(partial, folder)
    elif old.exists() and not folder.exists():
        old.replace(folder)
    elif old.exists():
        shutil.rmtree(old)
