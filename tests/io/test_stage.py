"""A stage: skipped when nothing changed, redone when something did, never half there."""

from pathlib import Path

import pytest

from align.errors import ConfigError
from align.io.hashing import fingerprint_source
from align.io.stage import read_manifest, run_stage


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


def test_a_kill_between_any_two_lines_of_the_replacement_is_mended(tmp_path: Path) -> None:
    """Every state that ``_replace`` can leave: the new folder waits under its temporary name, the old one under its."""

    def new(target: Path) -> None:
        (target / "result").write_text("new")

    def never(target: Path) -> None:
        raise AssertionError("a finished stage ran again")

    for state in ("whole, not renamed", "old set aside", "note gone", "old not removed"):
        folder = tmp_path / state
        partial, old = folder.with_name(f"{state}.partial"), folder.with_name(f"{state}.replaced")
        run_stage("s", folder, {"a": 1}, lambda target: (target / "result").write_text("old") and None)
        run_stage("s", tmp_path / "made", {"a": 2}, new)
        if state == "old not removed":
            folder.replace(old)
            (tmp_path / "made").replace(folder)
        else:
            (tmp_path / "made").replace(partial)
            if state != "note gone":
                (partial / "key").write_text("whatever")
            if state != "whole, not renamed":
                folder.replace(old)
        found = run_stage("s", folder, {"a": 2}, never)
        assert found.skipped and (folder / "result").read_text() == "new", state
        assert not partial.exists() and not old.exists() and not (folder / "key").exists(), state


def test_an_old_result_comes_back_where_the_new_one_is_not_whole(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    run_stage("s", folder, {"a": 1}, lambda target: (target / "result").write_text("old") and None)
    folder.replace(tmp_path / "s.replaced")
    found = run_stage("s", folder, {"a": 1}, lambda target: None)
    assert found.skipped and (folder / "result").read_text() == "old" and not (tmp_path / "s.replaced").exists()


def test_a_folder_that_no_stage_has_written_is_not_replaced(tmp_path: Path) -> None:
    folder, kept = tmp_path / "s", tmp_path / "s.old"
    for place in (folder, kept):
        place.mkdir()
        (place / "mine").write_text("keep")
    with pytest.raises(ConfigError, match="s: found other files there, expected a new folder"):
        run_stage("s", folder, {"a": 1}, lambda target: None)
    assert (folder / "mine").read_text() == "keep"
    run_stage("t", tmp_path / "t", {"a": 1}, lambda target: None)
    with pytest.raises(ConfigError, match="t: found other files there"):
        run_stage("s", tmp_path / "t", {"a": 1}, lambda target: None)
    (folder / "mine").unlink()
    run_stage("s", folder, {"a": 1}, lambda target: None)
    run_stage("s", folder, {"a": 2}, lambda target: None)
    assert (kept / "mine").read_text() == "keep"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}'])
def test_a_broken_manifest_is_an_unfinished_stage(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "s"
    run_stage("s", folder, {"a": 1}, lambda target: (target / "result").write_text("old") and None)
    (folder / "manifest.json").write_text(content)
    again = run_stage("s", folder, {"a": 1}, lambda target: (target / "result").write_text("new") and None)
    assert not again.skipped and (folder / "result").read_text() == "new"


def test_a_checkpoint_that_was_not_written_to_its_end_is_left_out(tmp_path: Path) -> None:
    from transformers.trainer_callback import TrainerState

    from align.training.base.checkpoints import last_complete_checkpoint

    assert last_complete_checkpoint(tmp_path / "nothing") is None
    for step in (2, 4, 10, 12, 14):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 4, 10):
        TrainerState(global_step=step).save_to_json(str(tmp_path / f"checkpoint-{step}" / "trainer_state.json"))
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global_step": 12, "log_hist')
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2", "checkpoint-4"]


def test_a_disk_problem_is_seen_through_other_errors(tmp_path: Path) -> None:
    from align.io.disk import disk_problem

    try:
        try:
            raise OSError(28, "No space left on device", "file")
        except OSError as error:
            raise RuntimeError("cannot write") from error
    except RuntimeError as error:
        found = disk_problem(error)
    assert found is not None and found.code == "disk-full" and "file" in found.message
    assert disk_problem(RuntimeError("I/O error: No space left on device (os error 28)"), tmp_path) is not None
    read_only = disk_problem(OSError(30, "Read-only file system", "f"))
    assert read_only is not None and read_only.code == "output-folder"
    assert (
        disk_problem(OSError(2, "No such file"), tmp_path) is None and disk_problem(ValueError("x"), tmp_path) is None
    )
