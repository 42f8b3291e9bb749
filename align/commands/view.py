"""`align view`: open pair tables and runs in the browser."""

import getpass
import os
import secrets
import shutil
import socket
import tempfile
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import ConfigError, DataError, EnvironmentProblem
from align.io.console import log, out
from align.viewer.extra import require_extra
from align.viewer.measured import Measured, folder_measured
from align.viewer.sources import SourceTable, is_measurement, is_run, open_table, run_tables

if TYPE_CHECKING:
    from align.viewer.session import Session

HOST = "127.0.0.1"
CLOSING_SECONDS = 1
"""How long open streams of events may delay the end."""
SCRATCH = "align-view-"
"""Start of the name of a viewer's folder for caches; its process id follows, so that a killed one's can be removed."""


def view(
    given: Sequence[str],
    *,
    port: int = 0,
    browser: bool = True,
    who: str | None = None,
    decisions: Path | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    text_cache: bool = True,
) -> None:
    """Serve the page until Ctrl-C; the first line of the output is its address.

    Args:
        given: pair tables, folders of runs, and folders of measurements of the pairs.
        port: of the server; 0: any free one.
        browser: whether the page is opened in the browser.
        who: name that goes with decisions; None: that of the user on this machine.
        decisions: file of the decisions; None: decisions.jsonl beside each table.
        columns: name in the pair table -> name in the source.
        split: split of a dataset.
        text_cache: whether texts are copied to the disk for fast search.

    Raises:
        EnvironmentProblem: packages are missing, or the port is in use.
        DataError: a table is missing or unreadable, or a run has none yet.
    """
    require_extra()
    import uvicorn

    from align.viewer.server import make_app

    with listening(port) as bound, opened(
        given, who=who, decisions=decisions, columns=columns or {}, split=split, text_cache=text_cache
    ) as session:  # fmt: skip
        number = bound.getsockname()[1]
        token = secrets.token_urlsafe(24)
        address = f"http://{HOST}:{number}/#{token}"
        app = make_app(session, token, number)
        config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=CLOSING_SECONDS)
        log.info("look at %s; Ctrl-C ends it", ", ".join(given))
        out.print(address, markup=False, soft_wrap=True)
        if browser:
            webbrowser.open(address)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[bound])
        log.info("closed; every decision that the page showed as saved is in its file")


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket of this machine alone.

    Raises:
        EnvironmentProblem: the port is in use, or not allowed.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((HOST, port))
            bound.listen()
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise EnvironmentProblem(
                f"--port {port}: cannot be used ({reason})", code="view-port", hint="leave --port out: any free one"
            ) from None
        yield bound


@contextmanager
def opened(
    given: Sequence[str],
    *,
    who: str | None,
    decisions: Path | None,
    columns: Mapping[str, str],
    split: str,
    text_cache: bool,
) -> "Iterator[Session]":
    """The session of these tables and runs, with its folder for caches, which is removed at the end.

    Raises:
        ConfigError: nothing is given, or one decision file for several folders.
        DataError: a table is missing or unreadable.
    """
    from align.viewer.session import Options, Session

    if not given:
        raise ConfigError("view: expected a pair table or a run", code="config-option")
    _remove_orphans()
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-") as name:
        scratch = Path(name)
        tables, runs = _given(given, dict(columns), split, scratch)
        if not tables and not runs:
            raise DataError(
                f"{given[0]}: holds measurements and no pairs", code="data-empty",
                hint="give the pair table too: align view PAIRS FOLDER",
            )  # fmt: skip
        session = Session(tables, runs, scratch, Options(who or _user(), decisions, text_cache))
        if tables:
            session.table(0)
        try:
            yield session
        finally:
            session.close()


def _given(
    given: Sequence[str], columns: dict[str, str], split: str, scratch: Path
) -> tuple[list[SourceTable], list[Path]]:
    """The tables and the runs that are given; folders of measurements belong to every table."""
    tables: list[SourceTable] = []
    runs: list[Path] = []
    measured: list[Measured] = []
    for one in given:
        folder = Path(one)
        if is_run(folder):
            runs.append(folder)
            tables += run_tables(folder)
        elif is_measurement(folder):
            measured += folder_measured(folder)
        else:
            tables.append(open_table(one, columns, split, scratch))
    return [replace(table, measured=(*table.measured, *measured)) for table in tables], runs


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "unknown"


def _remove_orphans() -> None:
    """Remove the caches of viewers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        number = folder.name.removeprefix(SCRATCH).partition("-")[0]
        if number.isdigit() and not _is_alive(int(number)) and folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
