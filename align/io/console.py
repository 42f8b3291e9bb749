"""Terminal output: logs and progress go to stderr, results to stdout."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from align.io.secrets import redact_text

T = TypeVar("T")
PLAIN_EVERY_SECONDS = 30.0
LEVELS = ("debug", "info", "warning", "error")
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
out = Console(highlight=False, soft_wrap=True, emoji=False)
log = logging.getLogger("align")


def configure(*, quiet: bool = False, level: str = "info") -> None:
    """Send the program's log lines to stderr at ``level``; at ``warning`` if ``quiet``, and on every rank above 0."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    follows = os.environ.get("RANK", "0") != "0"
    log.setLevel("WARNING" if quiet or follows else level.upper())
    if log.level > logging.DEBUG:
        _quieten_libraries()


class RedactingFormatter(logging.Formatter):
    """Removes secrets from every line, also from tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """The line to write."""
        return redact_text(super().format(record))


def _quieten_libraries() -> None:
    """Turn off progress bars and notices of transformers, datasets and the Hugging Face hub."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "" if err.is_terminal else "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|torch)\.")


def progress(
    items: Iterable[T],
    *,
    what: str,
    total: int,
    unit: str,
    work: Callable[[T], float] | None = None,
    work_unit: str = "",
) -> Iterator[T]:
    """Yield ``items`` with a progress bar, or with a log line every 30 s if stderr is not a terminal.

    Items may come in batches: a line is written where the next one comes, and tells of those before it.

    Args:
        items: what to iterate over.
        what: name of the work, e.g. ``scoring``.
        total: number of items.
        unit: name of one item in the plural, e.g. ``batches``.
        work: amount of work in an item; if given, the rate is shown in ``work_unit`` per second.
        work_unit: name of the unit of work in the plural, e.g. ``tokens``.
    """
    if not log.isEnabledFor(logging.INFO):
        yield from items
        return
    start = last = before = ended = time.monotonic()
    amount = 0.0
    with _bar() if err.is_terminal else nullcontext() as bar:
        task = None if bar is None else bar.add_task(what, total=total, rate="")
        for done, item in enumerate(items):
            now = time.monotonic()
            rate = f"{amount / max(ended - start, 1e-9):.3g} {unit if work is None else work_unit}/s"
            if bar is not None and task is not None:
                bar.update(task, completed=done, rate=rate)
            elif done and now - last >= PLAIN_EVERY_SECONDS and now - before >= (ended - start) / done / 2:
                left = max((total - done) * (ended - start) / done - (now - ended), 0.0)
                log.info("%s: %d of %d %s, %s, %.0f s left", what, done, total, unit, rate, left)
                last = now
            before = now
            yield item
            amount += 1 if work is None else work(item)
            ended = time.monotonic()


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err, transient=True)
