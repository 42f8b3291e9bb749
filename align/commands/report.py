"""`align report`: render the page of a run, or one page of several."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.errors import ConfigError, DataError
from align.io.console import log
from align.io.files import read_json

REPORT = "report.json"


def render_report(run: Path) -> None:
    """Render RUN/report.html from RUN/report.json.

    Raises:
        DataError: report.json does not exist or is not a report.
    """
    from jinja2 import TemplateError

    from align.reports.run_page import write_report

    _check_there(run)
    try:
        page = write_report(run)
    except (ValueError, LookupError, TypeError, AttributeError, TemplateError) as error:
        raise _no_report(run, error) from None
    log.info("report: %s", page)


def render_runs(runs: Sequence[Path], output: Path | None) -> None:
    """Render one page of several runs, from their report.json files, to ``output``.

    Raises:
        ConfigError: ``output`` is missing or a folder, or a run is there twice.
        DataError: a report.json does not exist or is not a report.
    """
    from jinja2 import TemplateError

    from align.reports.runs_page import render_runs_page, write_runs_page

    if output is None or output.is_dir():
        found = "nothing" if output is None else f"the folder {output}"
        raise ConfigError(
            f"--output: found {found}, expected a file for the page of {len(runs)} runs",
            code="output-folder",
            hint="give --output compare.html",
        )
    names = _names(runs)
    reports: dict[str, dict[str, Any]] = {}
    for name, run in zip(names, runs, strict=True):
        _check_there(run)
        try:
            reports[name] = read_json(run / REPORT)
            render_runs_page({name: reports[name]})
        except (ValueError, LookupError, TypeError, AttributeError, TemplateError) as error:
            raise _no_report(run, error) from None
    write_runs_page(output, reports)
    log.info("report: %s", output)


def _names(runs: Sequence[Path]) -> list[str]:
    """The last folders of the paths; whole paths where two end alike.

    Raises:
        ConfigError: a run is there twice.
    """
    resolved = [run.resolve() for run in runs]
    if len(set(resolved)) < len(resolved):
        twice = next(run for number, run in enumerate(runs) if resolved[number] in resolved[:number])
        raise ConfigError(f"RUN: found {twice} twice, expected different runs", code="output-folder")
    short = [run.name for run in resolved]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


def _check_there(run: Path) -> None:
    if not (run / REPORT).exists():
        raise DataError(f"{run}: holds no {REPORT}", code="report-missing", hint="finish the run with `align run`")


def _no_report(run: Path, error: Exception) -> DataError:
    return DataError(
        f"{run / REPORT}: not a report ({' '.join(str(error).split())})",
        code="report-missing",
        hint="make it again with `align run`",
    )
