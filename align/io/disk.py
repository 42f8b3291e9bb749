"""Recognize a full or read-only disk in the errors of any library, and report it as such."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align.errors import AlignError, EnvironmentProblem

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
LEAST_FREE = 1 << 20
"""Bytes; with less free space than this, the cause of a failed write is taken to be a full disk."""


def disk_problem(error: BaseException, folder: Path | None = None) -> EnvironmentProblem | None:
    """What the user can do about ``error`` if a disk caused it, else None.

    Args:
        error: any exception; the exceptions that caused it are checked as well.
        folder: folder that was written to. Some libraries (safetensors, torch) lose the error number; for their errors
            a full disk of this folder is taken as the cause.
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
    """Replace an exception of the body that a full or read-only disk caused by one that says so.

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
            hint="free some space; finished stages are complete, and the same command resumes from the last checkpoint",
        )
    return EnvironmentProblem(
        f"{where}: no permission to write",
        code="output-folder",
        hint="give another output_dir, or permission to write there",
    )
