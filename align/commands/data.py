"""`align data check`: summarize a pair source and list its invalid rows."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from align.config import PairsSection
from align.errors import SHOWN, DataError
from align.io.console import log, out

if TYPE_CHECKING:
    from datasets import Dataset


def check_data(source: PairsSection, *, drop_to: Path | None, model: str | None = None) -> None:
    """Print a summary of a pair source and its invalid rows; write valid and invalid rows to ``drop_to`` if given.

    With a ``model``, the valid pairs are also read as its tokenizer reads them, without its weights: its chat template
    must take every row, and what becomes of the pairs as tokens is printed.

    Raises:
        DataError: rows are invalid and ``drop_to`` is None, or nothing can be read, or the chat template refuses rows.
        ModelError: the model has no tokenizer, or no valid chat template.
        ConfigError: ``drop_to`` contains the source, or is a finished stage.
    """
    from align.data.findings import margin_findings, sharing_findings
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
    for sentence in (*sharing_findings(checked.pairs), *margin_findings(checked.pairs)) if len(checked.pairs) else ():
        out.print(sentence, markup=False, soft_wrap=True)
    for problem in checked.problems[:SHOWN]:
        out.print(str(problem), markup=False)
    if len(checked.problems) > SHOWN:
        out.print(f"... and {len(checked.problems) - SHOWN} more")
    if model is not None and len(checked.pairs):
        _print_as_tokens(checked.pairs, model)
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
    kept = load_pairs(source.model_copy(update={"drop_invalid": True}), side_file=side_file, carry=True, thumbs=True)
    write_pairs(kept, drop_to)
    log.info("valid pairs: %s", drop_to / "pairs.parquet")
    if side_file.exists():
        log.info("invalid rows with reasons: %s", side_file)


def _print_as_tokens(pairs: "Dataset", model: str) -> None:
    """Print what becomes of the pairs as tokens of a model."""
    from align.models.message_checks import survey_pairs
    from align.models.row_lengths import beyond_positions

    found = survey_pairs(pairs, model)
    long, limit = beyond_positions(pairs, model, None)
    if long:
        out.print(
            f"{len(long)} of {len(pairs)} pairs are longer than the {limit} positions of {model}: training needs "
            f"max_length: {limit}, which cuts them off, or is refused: {_named(long)}",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    count = len(pairs)
    if found.same:
        out.print(
            f"{len(found.same)} of {count} pairs become the same tokens on both sides, so training leaves them out "
            f"(the chat template or the tokenizer drops what differs): {_named(found.same)}",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    if found.begun:
        out.print(
            f"{len(found.begun)} of {count} pairs begin with {found.before!r}, which the tokenizer adds as well; it is "
            f"there once: {_named(found.begun)}",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    if found.tokens:
        out.print(
            f"{found.others} of {found.tokens} tokens of the responses ({found.others / found.tokens:.1%}) are words "
            "of others than the assistant: they carry no loss, and would under `train.turns: all`",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    out.print(f"{model}: its tokenizer reads all {count} valid pairs", markup=False, soft_wrap=True)


def _named(ids: list[str]) -> str:
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return ", ".join(ids[:SHOWN]) + more
