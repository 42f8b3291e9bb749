"""A disk that is full or may not be written: told as what it is, wherever a library notices it."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align.errors import AlignError, EnvironmentProblem

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
LEAST_FREE = 1 << 20
"""Bytes: with less than this a failed write is taken to be the disk's fault."""


def disk_problem(error: BaseException, folder: Path | None = None) -> EnvironmentProblem | None:
    """What the user can do about ``error`` if a disk caused it, else None.

    Args:
        error: anything that was raised; the errors that it came from are looked at too.
        folder: where was being written. Libraries that lose the error number (safetensors, torch) are believed to have
            met a full disk if it is full.
    """
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in FULL | NOT_WRITABLE:
            return _problem(str(chain.filename or folder or "output"), chain.errno in FULL)
        if "No space left on device" in str(chain):
            return _problem(str(folder or "output"), full=True)
        chain = chain.__cause__ or chain.__context__
    if folder is not None and folder.exists() and shutil.disk_usage(folder).free < LEAST_FREE:
        return _problem(str(folder), full=True)
    return None


@contextmanager
def disk_problems(folder: Path) -> Iterator[None]:
    """Turn what a full or read-only disk makes the body raise into an error that says so.

    Raises:
        EnvironmentProblem: the disk of ``folder`` is full or cannot be written.
    """
    try:
        yield
    except AlignError:
        raise
    except Exception as error:
        problem = disk_problem(error, folder)
        if problem is None:
            raise
        raise problem from error


def _problem(where: str, full: bool) -> EnvironmentProblem:
    if full:
        return EnvironmentProblem(
            f"{where}: no space is left on this disk",
            code="disk-full",
            hint="free some; finished stages are whole, and the same command goes on from the last checkpoint",
        )
    return EnvironmentProblem(
        f"{where}: may not be written",
        code="output-folder",
        hint="give another output_dir, or the right to write there",
    )
