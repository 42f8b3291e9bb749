"""`align reproduce`: repeat a run from its ``run.json`` and compare inputs and results with it."""

from pathlib import Path
from typing import Any

from align.errors import DataError, listed
from align.io.console import log
from align.io.files import read_json
from align.run.manifest import FILE, manifest_differences, read_run_manifest


def check_reproduced(found: dict[str, Any], manifest: Path) -> None:
    """Check that every stage had the same inputs and wrote the same files.

    Args:
        found: the result of ``same_run``.
        manifest: ``run.json`` of the first run, for the message.

    Raises:
        DataError: something differs; the message lists the likely reasons first.
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
    """Repeat the run of a manifest in ``output`` and compare the two manifests; see ``manifest_differences``.

    Args:
        manifest: ``run.json`` of a finished run; relative paths in it start from the working directory.
        output: folder to write into; not the folder of the run itself.
        command: the command line, for the new manifest.

    Raises:
        DataError: the manifest cannot be used.
    """
    from align.run import pipeline

    before, config = read_run_manifest(manifest)
    again = config.model_copy(update={"output_dir": str(output)})
    if again.folder.resolve() == manifest.parent.resolve():
        raise DataError(f"{output}: holds the run itself", code="run-manifest", hint="give another --output")
    pipeline.check(again)
    pipeline.run_pipeline(again, command=command, until=tuple(before.get("until", ())))
    return manifest_differences(before, read_json(again.folder / FILE))
