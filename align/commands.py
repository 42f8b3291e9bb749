"""What the small verbs do: check data, score pairs, render a report."""

import json
from pathlib import Path

from rich.table import Table
from rich.text import Text

from align.config import ClusterConfig, PairsConfig
from align.console import log, out
from align.errors import SHOWN, DataError
from align.processes import process_rank


def check_data(source: PairsConfig, *, drop_to: Path | None) -> None:
    """Print a summary of a pair source and its offending rows; with ``drop_to`` write both kinds there.

    Raises:
        DataError: rows are invalid and ``drop_to`` is None, or nothing can be read.
        ConfigError: ``drop_to`` holds what is read, or is a finished stage.
    """
    from align.pairs import FILE, check_pairs, load_pairs, summarize, write_pairs
    from align.source_files import keep_source
    from align.stage import check_files

    checked = check_pairs(source)
    table = Table(title=Text(source.path), show_header=False)
    for name, value in {"valid pairs": len(checked.pairs), "invalid rows": len(checked.invalid)}.items():
        table.add_row(name, str(value))
    if len(checked.pairs):
        for name, value in summarize(checked.pairs).items():
            table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
    out.print(table)
    for problem in checked.problems[:SHOWN]:
        out.print(str(problem), markup=False)
    if len(checked.problems) > SHOWN:
        out.print(f"... and {len(checked.problems) - SHOWN} more")
    if drop_to is None:
        if checked.invalid:
            raise DataError(
                f"{source.path}: {len(checked.invalid)} rows are invalid, {len(checked.pairs)} are valid",
                code="data-invalid",
                hint="mend the rows, or set them aside with --drop-invalid",
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


def score_pairs(
    source: PairsConfig,
    model: str,
    output: Path,
    *,
    batch_tokens: int,
    max_length: int,
    calibrated: bool = False,
    cluster: ClusterConfig | None = None,
) -> None:
    """Score a pair source with a reward model and write the table; print the margin metrics as JSON.

    Under a launcher the processes share the pairs.

    Args:
        source: pairs.
        model: reward model, folder or hub id; with the members of its ensemble, where it has any.
        output: folder to write into.
        batch_tokens: padded tokens per batch.
        max_length: tokens per text.
        calibrated: apply the calibration that lies beside the model.
        cluster: whose workers share the pairs.

    Raises:
        AlignError: the pairs, the model or the folder cannot be used.
    """
    import numpy as np

    from align.pairs import FILE, clusters_of, load_pairs, write_pairs
    from align.source_files import keep_source
    from align.stage import check_files
    from reward_models.calibration import evaluate_margins
    from reward_models.ensemble import members, score_with
    from reward_models.margin_map import MarginMap

    keep_source(source.path, [output / FILE])
    check_files(output, [])
    calibration = MarginMap.load(model) if calibrated else None
    pairs = load_pairs(source)
    log.info("scoring %d pairs of %s with %s -> %s", len(pairs), source.path, model, output)
    scored = score_with(
        members(model), pairs, output / ".scoring", batch_tokens=batch_tokens, max_length=max_length,
        calibration=calibration, cluster=cluster,
    )  # fmt: skip
    if process_rank() > 0:
        return
    write_pairs(scored, output)
    out.print_json(json.dumps(evaluate_margins(np.asarray(scored["margin"]), clusters=clusters_of(scored)).to_dict()))
    log.info("margins: %s; train on them with `pairs.path: %s`", output / "pairs.parquet", output / "pairs.parquet")


def render_report(run: Path) -> None:
    """Render RUN/report.html from RUN/report.json.

    Raises:
        DataError: there is no report.json.
    """
    from jinja2 import TemplateError

    from align.reports.page import write_report

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
