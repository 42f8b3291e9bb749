"""``log.txt`` in a run's folder: the messages of the terminal with their times; the file rotates."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path

from align.distributed import process_rank
from align.errors import AlignError
from align.io.console import RedactingFormatter, log

FILE = "log.txt"
LINE = "%(asctime)s %(levelname)s %(message)s"
MOST_BYTES = 5_000_000
KEPT = 3
"""Number of older files; ``log.txt.1`` is the newest of them."""


class _RunLog(RotatingFileHandler):
    """A log that ends silently when the disk is full: the run itself then fails with a message about the disk."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Stop logging to the file after an OSError."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
            return
        log.removeHandler(self)


@contextmanager
def run_log(folder: Path) -> Iterator[None]:
    """Also write the terminal's messages to ``folder/log.txt``, including an error that ends the run.

    The file keeps the lines of earlier attempts. Process r > 0 of a launcher writes ``log-r.txt`` with its warnings and
    errors. If the file cannot be opened, nothing is logged: a run that has something to write will report the disk.

    Args:
        folder: an existing folder.
    """
    handler = _opened(folder)
    if handler is None:
        yield
        return
    log.addHandler(handler)
    try:
        yield
    except AlignError as error:
        _only_here(handler, f"error {error}", None)
        raise
    except Exception as error:
        _only_here(handler, "stopped by a defect", error)
        raise
    except (KeyboardInterrupt, SystemExit) as stop:
        _only_here(handler, f"stopped ({stop!r})", None)
        raise
    finally:
        log.removeHandler(handler)
        handler.close()


def _opened(folder: Path) -> _RunLog | None:
    rank = process_rank()
    name = FILE if rank == 0 else f"log-{rank}.txt"
    try:
        handler = _RunLog(folder / name, maxBytes=MOST_BYTES, backupCount=KEPT, encoding="utf-8", delay=rank > 0)
    except OSError:
        return None
    handler.setFormatter(RedactingFormatter(LINE))
    return handler


def _only_here(handler: logging.Handler, message: str, error: Exception | None) -> None:
    """Log to the file only: the command line prints the same error itself."""
    caught = None if error is None else (type(error), error, error.__traceback__)
    handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, "%s", (message,), caught))
