"""What is told of work that goes on: how much is done, how fast, and how long it will take."""

import re
from collections.abc import Iterator

import pytest

from align.io import console

LINE = re.compile(r"(\d+) of (\d+) prompts, (\S+) prompts/s, (\d+) s left")


class Clock:
    """A clock that only passes where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)

    def batches(self, count: int, size: int, seconds: float) -> Iterator[int]:
        """Items that come ``size`` at a time, after ``seconds``."""
        for number in range(count):
            self.now += seconds
            yield from range(number * size, (number + 1) * size)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO")
    return caplog


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[float, ...]]:
    return [tuple(float(part) for part in found) for found in LINE.findall(caplog.text)]


def test_a_batch_is_not_taken_for_its_first_item(
    monkeypatch: pytest.MonkeyPatch, lines: pytest.LogCaptureFixture
) -> None:
    """Of four batches of 54 s, those before the one that comes are done, and that one is too."""
    clock = Clock(monkeypatch)
    assert len(list(console.progress(clock.batches(4, 8, 54.0), what="generate", total=32, unit="prompts"))) == 32
    assert [line[:2] for line in told(lines)] == [(8, 32), (16, 32), (24, 32)]
    assert [line[3] for line in told(lines)] == [108, 54, 0]
    assert told(lines)[0][2] == pytest.approx(8 / 54, rel=0.01)


def test_items_that_take_their_time_where_they_are_used(
    monkeypatch: pytest.MonkeyPatch, lines: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    for _ in console.progress(range(10), what="scoring", total=10, unit="prompts"):
        clock.now += 20.0
    assert told(lines) == [(2, 10, 0.05, 160), (4, 10, 0.05, 120), (6, 10, 0.05, 80), (8, 10, 0.05, 40)]
