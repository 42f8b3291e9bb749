"""Terminal output: logs and progress go to stderr, results to stdout."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from align.secrets import redact_text

T = TypeVar("T")
PLAIN_EVERY_SECONDS = 30.0

LEVELS = ("debug", "info", "warning", "error")
err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)
log = logging.getLogger("align")


def configure(*, quiet: bool = False, level: str = "info") -> None:
    """Send the program's log lines to stderr at ``level`` (``warning`` where ``quiet``, and on every
    process but the first)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    follows = os.environ.get("RANK", "0") != "0"
    log.setLevel("WARNING" if quiet or follows else level.upper())
    if log.level > logging.DEBUG:
        _quieten_libraries()


class _Formatter(logging.Formatter):
    """The whole line, a traceback's too, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The line to write."""
        return redact_text(super().format(record))


def _quieten_libraries() -> None:
    """Keep the bars and notices of the libraries underneath out of this program's log."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "" if err.is_terminal else "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|torch)\.")


def progress(items: Iterable[T], *, what: str, total: int, unit: str) -> Iterator[T]:
    """Yield ``items`` with a progress bar, or one plain line every 30 s where stderr is not a terminal.

    Args:
        items: what to iterate over.
        what: what is being done, e.g. ``scoring``.
        total: number of items.
        unit: name of one item in the plural, e.g. ``batches``.
    """
    if not log.isEnabledFor(logging.INFO):
        yield from items
        return
    if err.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=err, transient=True) as bar:
            yield from bar.track(items, total=total, description=what)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_SECONDS and done:
            rate = done / (now - start)
            log.info(
                "%s: %d of %d %s, %.2g %s/s, %.0f s left", what, done, total, unit, rate, unit, (total - done) / rate
            )
            last = now
        yield item
