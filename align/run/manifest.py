"""The manifest of a run, ``run.json``: inputs and results; and the differences of two manifests."""

import platform
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.config import RunConfig
from align.errors import DataError
from align.io.files import read_json, write_json
from align.io.hashing import hash_file
from align.io.secrets import redact
from align.io.stage import MANIFEST, Stage, versions

FILE = "run.json"
NOT_COMPARED = (MANIFEST, "filter.json", "report.html", "trust.json", "README.md")
"""Files of a stage that contain times, paths or versions, which differ between equal runs."""


def write_run_manifest(config: RunConfig, stages: list[Stage], command: str, until: tuple[str, ...] = ()) -> None:
    """Write ``run.json``: configuration, command, versions, key of every stage, sha256 of every file that it wrote.

    The keys cover the content of data and models, so the manifest distinguishes a changed input from a changed result.
    """
    write_json(
        config.folder / FILE,
        {
            "command": command,
            "until": list(until),
            "config": redact(config.model_dump()),
            "versions": versions() | {"python": platform.python_version()},
            "machine": platform.machine(),
            "stages": {stage.name: stage.key for stage in stages},
            "files": {name: sum_ for stage in stages for name, sum_ in _files(stage.folder).items()},
        },
    )


def read_run_manifest(file: Path) -> tuple[dict[str, Any], RunConfig]:
    """Read a manifest; return it and the configuration in it.

    Raises:
        DataError: the file does not exist, or is not the manifest of a run.
    """
    try:
        found = read_json(file)
        return found, RunConfig.model_validate(found["config"])
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror})",
            code="run-manifest",
            hint="give the run.json of a finished run",
        ) from None
    except (ValueError, LookupError, TypeError, ValidationError) as error:
        raise DataError(
            f"{file}: not the manifest of a run ({' '.join(str(error).split())[:200]})",
            code="run-manifest",
            hint="give the run.json of a finished run",
        ) from None


def manifest_differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Differences of two manifests: ``same_files`` (a count), ``other_inputs`` (stages with another key),
    ``other_files`` and ``other_versions``.
    """
    after = after | {part: {name: after[part].get(name) for name in before[part]} for part in ("stages", "files")}
    return {
        "same_files": sum(after["files"].get(name) == found for name, found in before["files"].items()),
        "other_inputs": _different(before["stages"], after["stages"]),
        "other_files": _different(before["files"], after["files"]),
        "other_versions": {
            name: [before["versions"].get(name), after["versions"].get(name)]
            for name in _different(before["versions"], after["versions"])
        },
    }


def _different(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _files(folder: Path) -> dict[str, str]:
    """sha256 of every file of a stage except ``NOT_COMPARED``."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_COMPARED)
    return {str(path.relative_to(folder.parent)): hash_file(path) for path in found}
