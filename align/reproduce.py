"""A run's manifest, ``run.json``: what it was made from and what came out; and the same run again, compared with it."""

import platform
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.config import RunConfig
from align.console import log
from align.errors import DataError, listed
from align.secrets import redact
from align.stage import MANIFEST, Stage, hash_file, read_json, versions, write_json

FILE = "run.json"
TOLD = (MANIFEST, "filter.json", "report.html", "trust.json")
"""Files of a stage that say when or where it was made; what they conclude stands in the tables beside them."""


def write_run_manifest(config: RunConfig, stages: list[Stage], command: str, until: tuple[str, ...] = ()) -> None:
    """Write ``run.json``: configuration, command, versions, the key of every stage, the sha256 of every file it left.

    The keys cover the content of data and models, so the manifest tells a changed input from a changed result.
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
    """The manifest and the configuration in it.

    Raises:
        DataError: no such file, or not a run's manifest.
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


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What two manifests differ in: inputs (stages made from something else), results (files), versions."""
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


def check_reproduced(found: dict[str, Any], manifest: Path) -> None:
    """Nothing where every stage had the same inputs and left the same files.

    Raises:
        DataError: otherwise, with the likely reason first.
    """
    if not found["other_inputs"] and not found["other_files"]:
        log.info("reproduced: %d files are the same, byte for byte", found["same_files"])
        return
    reasons = [f"{name}: {old} then, {new} now" for name, (old, new) in found["other_versions"].items()]
    reasons += [f"stage {name}: data, model or settings are not what they were" for name in found["other_inputs"]]
    reasons += [f"{name}: another content" for name in found["other_files"]]
    raise DataError(
        f"{manifest}: not reproduced; {found['same_files']} files are the same, but\n{listed(reasons)}",
        code="not-reproduced",
        hint="restore the inputs and versions named first; on another processor, weights may differ in the last digits",
    )


def same_run(manifest: Path, output: Path, *, command: str) -> dict[str, Any]:
    """Run what the manifest describes again, into ``output``, and compare.

    Args:
        manifest: ``run.json`` of a finished run; relative paths in it are taken from the working directory.
        output: where to write; not the folder of the run itself.
        command: what was typed.

    Raises:
        DataError: the manifest cannot be used.
    """
    from align import pipeline

    before, config = read_run_manifest(manifest)
    again = config.model_copy(update={"output_dir": str(output)})
    if again.folder.resolve() == manifest.parent.resolve():
        raise DataError(f"{output}: holds the run itself", code="run-manifest", hint="give another --output")
    pipeline.check(again)
    pipeline.run_pipeline(again, command=command, until=tuple(before.get("until", ())))
    return compare(before, read_json(again.folder / FILE))


def _different(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _files(folder: Path) -> dict[str, str]:
    """sha256 of every file of a stage but those that hold seconds or where the run lies."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in TOLD)
    return {str(path.relative_to(folder.parent)): hash_file(path) for path in found}
