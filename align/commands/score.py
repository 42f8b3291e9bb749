"""`align reward score`: add rewards and margins to a pair table."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from align.config import ClusterSection, PairsSection
from align.distributed import process_rank
from align.io.console import log, out

if TYPE_CHECKING:
    from datasets import Dataset

    from reward_models.implicit import ImplicitSource
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
    implicit: "ImplicitSource | None" = None,
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
        implicit: the model is a policy, and this its reference and beta.

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
    calibration = MarginMap.load(model) if calibrated and implicit is None else None
    pairs = load_pairs(source, carry=True)
    read = options or DEFAULTS
    check_pairs_of(
        pairs, [str(member) for member in members(model)], trust_remote_code=read.trust_remote_code,
        text_pair=read.text_pair,
    )  # fmt: skip
    log.info("scoring %d pairs of %s with %s -> %s", len(pairs), source.path, model, output)
    if implicit is not None:
        scored = _by_policy(pairs, implicit, batch_tokens, max_length, read, alone=not calibrated and cluster is None)
        if process_rank() == 0:
            write_pairs(scored, output)
            _report(scored, output)
        return
    scored = score_with(
        members(model), pairs, output / ".scoring", batch_tokens=batch_tokens, max_length=max_length,
        calibration=calibration, cluster=cluster, options=read,
    )  # fmt: skip
    if process_rank() > 0:
        return
    write_pairs(scored, output)
    _report(scored, output)


def _by_policy(
    pairs: "Dataset",
    source: "ImplicitSource",
    batch_tokens: int,
    max_length: int,
    options: "LoadOptions",
    *,
    alone: bool,
) -> "Dataset":
    """The pairs with the implicit rewards of a policy.

    Raises:
        ConfigError: a calibration or a cluster, which are of reward models.
    """
    from align.data.training_pairs import UNKNOWN, with_source
    from align.errors import ConfigError
    from reward_models.implicit import ImplicitReward

    if not alone:
        raise ConfigError(
            "--implicit: found --calibrated or --cluster, which are of reward models", code="implicit-reward",
            hint="leave them out",
        )  # fmt: skip
    log.info("implicit reward: %g times the log-ratio of %s to %s", source.beta, source.policy, source.reference)
    model = ImplicitReward(
        source, batch_tokens=batch_tokens, max_length=max_length, trust_remote_code=options.trust_remote_code
    )
    return with_source(model.score_pairs(pairs), [UNKNOWN] * len(pairs))


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
