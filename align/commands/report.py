"""`align report`: render the page of a run."""

from pathlib import Path

from align.errors import DataError
from align.io.console import log


def render_report(run: Path) -> None:
    """Render RUN/report.html from RUN/report.json.

    Raises:
        DataError: report.json does not exist or is not a report.
    """
    from jinja2 import TemplateError

    from align.reports.run_page import write_report

    if not (run / "report.json").exists():
        raise DataError(f"{run}: holds no report.json", code="report-missing", hint="finish the run with `align run`")
    try:
        page = write_report(run)
    except (ValueError, LookupError, TypeError, AttributeError, TemplateError) as error:
        raise DataError(
            f"{run / 'report.json'}: not a report ({' '.join(str(error).split())})",
            code="report-missing",
            hint="make it again with `align run`",
        ) from None
    log.info("report: %s", page)
