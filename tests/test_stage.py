"""A stage: skipped when nothing changed, redone when something did, never half there."""

from pathlib import Path

import pytest

from align.stage import fingerprint_source, read_manifest, run_stage


def test_done_once_and_redone_on_change(tmp_path: Path) -> None:
    calls = []

    def work(folder: Path) -> None:
        calls.append(folder)
        (folder / "result").write_text(str(len(calls)))

    folder = tmp_path / "stage"
    first = run_stage("s", folder, {"a": 1}, work)
    again = run_stage("s", folder, {"a": 1}, work)
    assert (first.skipped, again.skipped, len(calls)) == (False, True, 1) and first.key == again.key
    changed = run_stage("s", folder, {"a": 2}, work)
    assert changed.key != first.key and (folder / "result").read_text() == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage"]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "result"]


def test_a_failed_stage_leaves_the_earlier_result_and_its_own_progress(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    run_stage("s", folder, {"a": 1}, lambda target: (target / "result").write_text("old") and None)

    def fail(target: Path) -> None:
        (target / "checkpoint").write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        run_stage("s", folder, {"a": 2}, fail)
    assert (folder / "result").read_text() == "old"
    manifest = read_manifest(folder)
    assert manifest is not None and manifest["inputs"] == {"a": 1}
    found = []
    run_stage("s", folder, {"a": 2}, lambda target: found.append((target / "checkpoint").exists()))
    assert found == [True]
    with pytest.raises(RuntimeError):
        run_stage("s", folder, {"a": 3}, fail)
    run_stage("s", folder, {"a": 4}, lambda target: found.append((target / "checkpoint").exists()))
    assert found == [True, False]


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("a")
    before = fingerprint_source(str(file))
    assert before == fingerprint_source(str(file))
    file.write_text("b")
    assert fingerprint_source(str(file)) != before and fingerprint_source("hub/id") == "hub/id"
