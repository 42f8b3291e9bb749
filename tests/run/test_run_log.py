"""The log of a run's folder, and the progress lines with the remaining time."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.errors import DataError
from align.io import console
from align.io.console import configure, log, progress
from align.run import log as run_log
from align.run.log import FILE, KEPT
from align.training.base import progress as trainer_progress
from align.training.base.progress import PlainProgress

KEY = "hf_" + "a" * 30


@pytest.fixture(autouse=True)
def logging_as_configured() -> Any:
    """The program's own logging, restored afterwards."""
    before, level, propagates = list(log.handlers), log.level, log.propagate
    configure()
    yield
    log.handlers[:], log.propagate = before, propagates
    log.setLevel(level)


def test_it_holds_what_was_said_with_times_and_without_secrets(tmp_path: Path) -> None:
    with run_log.run_log(tmp_path):
        log.info("loading with %s", KEY)
    log.info("after the run")
    (line,) = (tmp_path / FILE).read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO loading with \*\*\*", line)


def test_it_keeps_the_error_that_ended_the_run_and_goes_on_below(tmp_path: Path) -> None:
    for error in (DataError(f"bad row {KEY}", code="data-row", hint="fix it"), RuntimeError(f"no {KEY}")):
        with pytest.raises(type(error)), run_log.run_log(tmp_path):
            raise error
    with pytest.raises(SystemExit), run_log.run_log(tmp_path):
        raise SystemExit(143)
    text = (tmp_path / FILE).read_text()
    assert "ERROR error [data-row] bad row ***\n  do: fix it" in text and KEY not in text
    assert "Traceback (most recent call last)" in text and "RuntimeError: no ***" in text
    assert "SystemExit(143)" in text and text.index("data-row") < text.index("RuntimeError")


def test_it_rotates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run writes bounded files: the newest lines in log.txt, at most ``KEPT`` older files."""
    monkeypatch.setattr(run_log, "MOST_BYTES", 1000)
    with run_log.run_log(tmp_path):
        for step in range(200):
            log.info("step %d", step)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [FILE, *(f"{FILE}.{k}" for k in range(1, KEPT + 1))]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    assert "step 199" in (tmp_path / FILE).read_text() and "step 0\n" not in (tmp_path / f"{FILE}.{KEPT}").read_text()


def test_a_disk_that_fills_up_ends_the_log_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with run_log.run_log(tmp_path):
        handler = log.handlers[-1]
        assert isinstance(handler, run_log.RotatingFileHandler)
        monkeypatch.setattr(handler, "flush", full)
        log.info("first")
        assert handler not in log.handlers
        monkeypatch.undo()
    assert "Logging error" not in capsys.readouterr().err


def test_other_processes_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    configure()
    with run_log.run_log(tmp_path):
        log.info("not this")
        log.warning("this")
    assert [path.name for path in tmp_path.iterdir()] == ["log-1.txt"]
    assert (tmp_path / "log-1.txt").read_text().endswith("WARNING this\n")


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Seconds since the start."""
        return self.now


class Lines(logging.Handler):
    """The logged messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        log.handlers[:] = [self]

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line."""
        self.messages.append(record.getMessage())


def test_a_plain_progress_line_says_how_much_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten items of 20 s each: a line every 40 s (the first after 30), with the remaining time at the rate so far."""
    clock, lines = Clock(), Lines()
    monkeypatch.setattr(console, "time", clock)
    monkeypatch.setattr(console, "err", SimpleNamespace(is_terminal=False))
    for _ in progress(range(10), what="scoring", total=10, unit="batches"):
        clock.now += 20.0
    assert lines.messages[0] == "scoring: 2 of 10 batches, 0.05 batches/s, 160 s left"
    assert lines.messages[-1] == "scoring: 8 of 10 batches, 0.05 batches/s, 40 s left"


def test_a_training_says_how_much_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed at step 100 of 400 and at 5 s a step: the rate counts the steps of this attempt only."""
    clock, lines = Clock(), Lines()
    monkeypatch.setattr(trainer_progress, "time", clock)
    shown, state = PlainProgress("train dpo"), SimpleNamespace(global_step=100, max_steps=400)
    args: Any = (None, state, None)
    shown.on_train_begin(*args)
    for _ in range(7):
        clock.now += 5.0
        state.global_step += 1
        shown.on_log(*args, logs={"loss": 0.5, "other": 1})
        shown.on_step_end(*args)
    assert lines.messages == [
        "train dpo: 300 steps",
        "train dpo: step 106 of 400, 0.2 steps/s, 1470 s left; loss 0.5",
    ]
