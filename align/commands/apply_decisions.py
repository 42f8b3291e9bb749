"""`align data apply`: carry out what people decided in `align view`; the table that was judged stays as it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.config import PairsSection
from align.errors import DataError
from align.io.console import log

SUMMARY, MERGED = "apply.json", "decisions.jsonl"
NAMED = 5


def apply_decisions(
    source: PairsSection, decisions: Sequence[Path], output: Path, *, skip_changed: bool = False
) -> dict[str, Any]:
    """Write the corrected table, what was done, and all decisions together into ``output``.

    Args:
        source: the table that was judged.
        decisions: files of one or several people.
        output: folder for ``pairs.parquet``, ``apply.json`` and ``decisions.jsonl``.
        skip_changed: leave pairs as they are whose texts are not those that were judged.

    Returns:
        The content of ``apply.json``.

    Raises:
        DataError: a file is no file of decisions, holds none, or does not fit the table.
        ConfigError: ``output`` contains the source or a file of decisions, or is the result of another command.
    """
    from align.data.pairs import FILE, load_pairs, write_pairs
    from align.io.files import write_json, write_text
    from align.io.source_files import keep_source
    from align.io.stage import check_files
    from align.viewer.corrections import correct
    from align.viewer.decisions import as_line, read_decisions

    keep_source(source.path, [output / FILE])
    for file in decisions:
        keep_source(str(file), [output / MERGED])
    check_files(output, [FILE, MERGED], own=[SUMMARY])
    ledger = read_decisions(decisions)
    if not ledger.decisions:
        raise DataError(f"{decisions[0]}: holds no decision", code="decision-file", hint="decide in `align view` first")
    found = correct(load_pairs(source, carry=True), ledger, skip_changed=skip_changed)
    summary = {
        "pairs": source.path,
        "decisions": [str(file) for file in decisions],
        "people": sorted({one["who"] for one in ledger.decisions.values()}),
        "rows": len(found.pairs),
        "done": dict(sorted(found.counts.items())),
        "left_out": found.left_out,
        "conflicts": found.conflicts,
        "changed": found.changed,
        "missing": found.missing,
        "torn_lines": ledger.broken,
    }
    output.mkdir(parents=True, exist_ok=True)
    write_pairs(found.pairs, output)
    write_text(output / MERGED, "".join(as_line(one) for one in ledger.decisions.values()))
    write_json(output / SUMMARY, summary)
    for line in told(summary):
        log.warning("%s", line)
    log.info("corrected pairs: %s", output / FILE)
    return summary


def told(summary: dict[str, Any]) -> list[str]:
    """What was not carried out, in sentences."""

    def some(names: Sequence[str]) -> str:
        return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")

    unsettled, changed, missing = ([*summary[name]] for name in ("conflicts", "changed", "missing"))
    lines = []
    if unsettled:
        lines.append(
            f"{len(unsettled)} pairs stay as they are, people disagree: {some([one['pair'] for one in unsettled])}; "
            f"settle them in `align view PAIRS --decisions FILE` with the {MERGED} that is written here"
        )
    if changed:
        lines.append(f"{len(changed)} pairs stay as they are, judged with other texts: {some(changed)}")
    if missing:
        lines.append(f"{len(missing)} judged pairs are not in this table: {some(missing)}")
    if summary["torn_lines"]:
        lines.append(f"{summary['torn_lines']} lines were never written to their end and do not count")
    return lines
