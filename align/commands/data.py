"""`align data check`: summarize a pair source and list its invalid rows."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from align.config import PairsSection
from align.errors import SHOWN, DataError
from align.io.console import log, out


def check_data(source: PairsSection, *, drop_to: Path | None) -> None:
    """Print a summary of a pair source and its invalid rows; write valid and invalid rows to ``drop_to`` if given.

    Raises:
        DataError: rows are invalid and ``drop_to`` is None, or nothing can be read.
        ConfigError: ``drop_to`` contains the source, or is a finished stage.
    """
    from align.data.pairs import FILE, check_pairs, describe_unused, load_pairs, write_pairs
    from align.data.statistics import summarize
    from align.io.source_files import keep_source
    from align.io.stage import check_files

    checked = check_pairs(source)
    table = Table(title=Text(source.path), show_header=False)
    for name, value in {"valid pairs": len(checked.pairs), "invalid rows": len(checked.invalid)}.items():
        table.add_row(name, str(value))
    if len(checked.pairs):
        for name, value in summarize(checked.pairs).items():
            table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
    out.print(table)
    if checked.unused:
        out.print(describe_unused(checked.unused), markup=False)
    for problem in checked.problems[:SHOWN]:
        out.print(str(problem), markup=False)
    if len(checked.problems) > SHOWN:
        out.print(f"... and {len(checked.problems) - SHOWN} more")
    if drop_to is None:
        if checked.invalid:
            raise DataError(
                f"{source.path}: {len(checked.invalid)} rows are invalid, {len(checked.pairs)} are valid",
                code="data-invalid",
                hint="fix the rows, or set them aside with --drop-invalid",
            )
        return
    keep_source(source.path, [drop_to / FILE])
    check_files(drop_to, [])
    drop_to.mkdir(parents=True, exist_ok=True)
    side_file = drop_to / "invalid.jsonl"
    side_file.unlink(missing_ok=True)
    write_pairs(load_pairs(source.model_copy(update={"drop_invalid": True}), side_file=side_file), drop_to)
    log.info("valid pairs: %s", drop_to / "pairs.parquet")
    if side_file.exists():
        log.info("invalid rows with reasons: %s", side_file)
