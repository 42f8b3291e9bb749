"""The report of an evaluation, one JSON file and one page, which the verbs of `align eval` share."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.commands.evaluation_tables import COMPLETIONS
from align.errors import ConfigError, DataError
from align.io.console import log, out
from align.io.files import read_json, write_json
from align.io.stage import check_files

REPORT = "report.json"
PAGE = "report.html"
PARTS = frozenset({"reward", "comparisons", "win_tables", "frontier", "benchmarks"})
"""Keys of an evaluation's report."""
MERGED = frozenset({"comparisons", "win_tables"})
"""Those that hold one entry per comparison, which another command adds to."""


def check_report_folder(output: Path) -> None:
    """Check that a report of an evaluation can be written.

    Raises:
        ConfigError: the output is a file, or holds a report or a page of something else.
        DataError: its report.json is not a report.
    """
    if output.is_file():
        raise ConfigError(
            f"{output}: found a file, expected a folder", code="output-folder", hint="give another --output"
        )
    check_files(output, [PAGE], own=[REPORT, COMPLETIONS])
    if (output / REPORT).exists() and not _read_report(output).keys() <= PARTS:
        raise ConfigError(
            f"{output / REPORT}: found another report, expected none or that of an evaluation",
            code="output-folder",
            hint="give another --output",
        )


def page(output: Path) -> None:
    """Render OUTPUT/report.html from OUTPUT/report.json again.

    Raises:
        DataError: there is no report.json.
    """
    from jinja2 import TemplateError

    from align.reports.comparison_page import write_comparison_page

    if not (output / REPORT).exists():
        raise DataError(
            f"{output}: holds no {REPORT}",
            code="report-missing",
            hint="run `align eval reward` or `compare` first",
        )
    report = _read_report(output)
    try:
        write_comparison_page(output / PAGE, report)
    except (LookupError, TypeError, AttributeError, TemplateError) as error:
        raise _no_report(output, " ".join(str(error).split())) from None
    log.info("look at it: open %s", output / PAGE)


def publish(output: Path, part: dict[str, Any], section: dict[str, Any]) -> None:
    """Add a part to the report of all commands, render the page, and print the part's section without its samples."""
    from align.reports.comparison_page import write_comparison_page

    file = output / REPORT
    report = _read_report(output) if file.exists() else {}
    if "comparisons" in part and "win_tables" in report:
        made = part.get("win_tables", {})
        older = {judge: rows for judge, rows in report["win_tables"].items() if judge not in made}
        report = report | {"win_tables": _valid_tables(older, part["comparisons"])}
    for key in MERGED & part.keys():
        part = part | {key: report.get(key, {}) | part[key]}
    write_json(file, report | part)
    write_comparison_page(output / PAGE, report | part)
    out.print_json(json.dumps({key: value for key, value in section.items() if key != "samples"}))


def _valid_tables(tables: Mapping[str, Any], comparisons: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of all against all, judge -> rows, without those in which two policies have another win rate now."""
    stale = {
        judge
        for judge, rows in tables.items()
        for row in rows
        for one in comparisons.values()
        if (one["judge"], one["a"]) == (judge, row["policy"])
        and one["b"] in row["against"]
        and _differ(one["win_rate"]["rate"], row["against"][one["b"]])
    }
    for judge in sorted(stale):
        log.warning("the table of all against all by %s was of other prompts, decoding or policies: left out", judge)
    return {judge: rows for judge, rows in tables.items() if judge not in stale}


def _differ(rate: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return rate["n"] != other["n"] or not math.isclose(rate["value"], other["value"], abs_tol=1e-9)


def _read_report(output: Path) -> dict[str, Any]:
    """The report in OUTPUT/report.json.

    Raises:
        DataError: the file is not JSON, or not an object.
    """
    try:
        report = read_json(output / REPORT)
    except ValueError as error:
        raise _no_report(output, str(error)) from None
    if not isinstance(report, dict):
        raise _no_report(output, f"found a {type(report).__name__}")
    return report


def _no_report(output: Path, why: str) -> DataError:
    return DataError(
        f"{output / REPORT}: not the report of an evaluation ({why})",
        code="report-missing",
        hint="give another --output, or delete the file and evaluate again: completions and scores are kept",
    )
