"""`align reward score`: add rewards and margins to a pair table."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from align.config import ClusterSection, PairsSection
from align.distributed import process_rank
from align.io.console import log, out

if TYPE_CHECKING:
    from datasets import Dataset

    from reward_models.loading import LoadOptions


def score_pairs(
    source: PairsSection,
    model: str,
    output: Path,
    *,
    batch_tokens: int,
    max_length: int,
    calibrated: bool = False,
    cluster: ClusterSection | None = None,
    options: "LoadOptions | None" = None,
) -> None:
    """Score pairs with a reward model, write the table, and print the margin metrics as JSON.

    Under a launcher the processes share the pairs.

    Args:
        source: pairs.
        model: reward model, folder or hub id; for an ensemble all members score.
        output: folder to write into.
        batch_tokens: padded tokens per batch.
        max_length: tokens per text.
        calibrated: apply the calibration in the model folder.
        cluster: the cluster whose workers share the pairs.
        options: how the model is loaded and reads texts; None: the defaults.

    Raises:
        AlignError: the pairs, the model or the folder cannot be used.
    """
    from align.data.pairs import FILE, load_pairs, write_pairs
    from align.io.source_files import keep_source
    from align.io.stage import check_files
    from align.models.message_checks import check_pairs_of
    from reward_models.calibration import MarginMap
    from reward_models.ensemble import members, score_with
    from reward_models.loading import DEFAULTS

    keep_source(source.path, [output / FILE])
    check_files(output, [])
    calibration = MarginMap.load(model) if calibrated else None
    pairs = load_pairs(source, carry=True)
    read = options or DEFAULTS
    check_pairs_of(
        pairs, [str(member) for member in members(model)], trust_remote_code=read.trust_remote_code,
        text_pair=read.text_pair,
    )  # fmt: skip
    log.info("scoring %d pairs of %s with %s -> %s", len(pairs), source.path, model, output)
    scored = score_with(
        members(model), pairs, output / ".scoring", batch_tokens=batch_tokens, max_length=max_length,
        calibration=calibration, cluster=cluster, options=read,
    )  # fmt: skip
    if process_rank() > 0:
        return
    write_pairs(scored, output)
    _report(scored, output)


def _report(scored: "Dataset", output: Path) -> None:
    """Say where the margins come from and print their metrics as JSON."""
    import numpy as np

    from align.data.splits import clusters_of
    from align.data.training_pairs import report_in_sample, source_of
    from reward_models.margin_metrics import evaluate_margins

    if not report_in_sample(scored, "reward score"):
        log.info("margins are %s: 0 of these %d pairs were trained on", source_of(scored), len(scored))
    out.print_json(json.dumps(evaluate_margins(np.asarray(scored["margin"]), clusters=clusters_of(scored)).to_dict()))
    log.info("margins: %s; train on them with `pairs.path: %s`", output / "pairs.parquet", output / "pairs.parquet")
