"""The work of `align data sources` and `align data next-to-check`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from rich.table import Table

from align.config import PairsSection
from align.config.columns import TEXT
from align.data.checked_pairs import load_checked, without_checked
from align.data.next_to_check import random_order, reading_order
from align.data.pairs import load_pairs
from align.data.sampling import fair_sample, report_sample
from align.data.splits import clusters_of, folds_of_clusters
from align.data.training_pairs import SOURCE, source_of
from align.errors import DataError
from align.io.console import log, out
from align.io.files import atomic_write, write_json
from align.stats import below, interval

FILE, FEATURES = "sources.json", "features"
COLUMNS = ("source", "dataset", "group")
"""Columns that may name the source of a pair, in this order."""
MOST = 50_000
"""Pairs that are measured, at most."""
FOLDS, FOLDS_OF_CHECKED = 5, 10
FAIR = ("cross-fitted", "outside")


def source_names(pairs: Dataset, by: str | None, where: str) -> list[str]:
    """The source of every pair, by a column; pairs without a name are one source, ``none``.

    Raises:
        DataError: no such column.
    """
    column = by or next((name for name in COLUMNS if name in pairs.column_names), None)
    if column is None or column not in pairs.column_names:
        raise DataError(
            f"{where}: found the columns {', '.join(pairs.column_names)}, expected one that names the source of each "
            f"pair: {by or ', '.join(COLUMNS)}",
            code="data-column",
            hint="name it: --by annotator",
        )
    return ["none" if name is None else str(name) for name in pairs[column]]


def judge(
    source: PairsSection, model: str, output: Path, *, by: str | None, max_length: int, seed: int
) -> dict[str, Any]:
    """Write ``sources.json``: how the labels of each source agree with the others and the checked pairs; print it.

    Args:
        source: the pairs; ``source.checked``: those that a person has checked.
        model: whose frozen features the heads read, hub id or folder.
        output: folder; the features are cached in it.
        by: column of the sources; None: the first of ``COLUMNS``.
        max_length: tokens of prompt and response together.
        seed: of the folds.

    Raises:
        AlignError: the pairs or the model cannot be used, or there is only one source.
    """
    from align.trust.features import pair_features, uncentered_pca
    from align.trust.linear_proxy import scaled

    pairs = load_pairs(source, carry=True)
    checked = load_checked(source)
    if checked is not None and source.checked is not None:
        pairs = without_checked(pairs, checked, f"--checked {source.checked.path}").pairs
    drawn, total = fair_sample(map(str, pairs["id"]), MOST)
    report_sample(source.path, len(drawn), total, "pairs")
    pairs = pairs.select(drawn) if len(drawn) < total else pairs
    names = source_names(pairs, by, source.path)
    if len(set(names)) == 1:
        raise DataError(
            f"{source.path}: all {len(pairs)} pairs are of one source, {names[0]!r}; expected at least two to compare",
            code="data-too-few",
            hint="name another column: --by annotator",
        )
    texts = [table.select_columns(list(TEXT)) for table in (pairs, checked) if table is not None]
    differences = pair_features(concatenate_datasets(texts), model, output / FEATURES, max_length=max_length)
    x = scaled(uncentered_pca(differences))
    own = None if checked is None else clusters_of(checked)
    found = assess(x[: len(pairs)], names, x[len(pairs) :], clusters_of(pairs), own, seed=seed)
    found |= {"pairs": source.path, "model": model, "seed": seed}
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / FILE, found)
    _print(found)
    log.info("numbers: %s", output / FILE)
    return found


def assess(
    x: np.ndarray, names: list[str], checked: np.ndarray, clusters: np.ndarray, own: np.ndarray | None, *, seed: int
) -> dict[str, Any]:
    """Verdicts on the sources, and what the checked pairs say, as JSON values.

    Args:
        x: [N, D], see ``align.trust.linear_proxy.scaled``.
        names: source of every pair, [N].
        checked: [M, D]; M may be 0.
        clusters: cluster of every pair, [N].
        own: cluster of every checked pair, [M]; None: there are none.
        seed: of the folds.
    """
    from align.trust.checked import checked_agreement, choose_share, judge_sources
    from align.trust.weighted_heads import choose_penalty

    penalty = choose_penalty(x, folds_of_clusters(clusters, FOLDS, seed))
    verdicts = judge_sources(x, names, checked, penalty, clusters=clusters)
    found: dict[str, Any] = {"sources": [one.to_dict() for one in verdicts], "penalty": penalty, "checked": None}
    if own is not None and len(checked):
        choice = choose_share(x, checked, folds_of_clusters(own, FOLDS_OF_CHECKED, seed), penalty)
        agreement = checked_agreement(x, checked, penalty).to_dict()
        found["checked"] = {"pairs": len(checked), "agreement": agreement, **choice.to_dict()}
    return found


def _print(found: dict[str, Any]) -> None:
    table = Table("source", "pairs", "agreement", "expected", "standard errors", "verdict")
    few = []
    for one in found["sources"]:
        verdict = "worse than the others" if one["named"] else "no sign of it"
        if not one["named"] and len(found["sources"]) == 2:
            verdict = "cannot tell: only one other source"
        if one["z"] is None:
            few.append(one["source"])
            verdict = "too few pairs"
        z = "" if one["z"] is None else f"{one['z']:+.1f}"
        table.add_row(
            one["source"], str(one["pairs"]), interval(one["agreement"]), f"{one['expected']:.3f}", z, verdict
        )  # fmt: skip
    out.print(table)
    if few:
        out.print(f"too few pairs for a verdict (fewer than 30, or no others): {', '.join(few)}", markup=False)
    checked = found["checked"]
    if checked is None:
        out.print("no checked pairs: where most sources are wrong, only checked pairs can tell", markup=False)
        return
    shown = interval(checked["agreement"])
    out.print(f"the other pairs agree with {shown} of {checked['pairs']} checked labels", markup=False, soft_wrap=True)
    if below(checked["agreement"], 0.5):
        out.print(
            "most labels contradict the checked ones: believe no verdict above, for the sources are compared with each "
            "other", markup=False, soft_wrap=True,
        )  # fmt: skip
    raised = checked["share"] > checked["default"]
    out.print(
        f"pairs.checked.share: {checked['share']:.3g} "
        + ("(held-out checked pairs gain by more than two standard errors)" if raised else "(the default)"),
        markup=False, soft_wrap=True,
    )  # fmt: skip


def next_to_check(source: PairsSection, output: Path, *, count: int, order: str, by: str | None) -> list[str]:
    """Write the pairs to check next as JSON lines, those that are checked already left out; return their ids.

    Args:
        source: the pairs; ``source.checked``: those that a person has checked.
        output: file.
        count: number of pairs, at most.
        order: ``random``: a sample stratified by source; ``margin``: the lowest cross-fitted or outside margins first.
        by: column of the sources; None: the first of ``COLUMNS`` that is there, or one source.

    Raises:
        DataError: the pairs have no margins, or in-sample ones, or all are checked.
    """
    pairs = load_pairs(source, carry=True)
    checked = load_checked(source)
    if checked is not None and source.checked is not None:
        pairs = without_checked(pairs, checked, f"--checked {source.checked.path}").pairs
    if order == "margin":
        _refuse_unfair(pairs, source.path)
        places = reading_order(np.array([np.nan if m is None else m for m in pairs["margin"]], dtype=np.float64))
    else:
        named = by is not None or any(name in pairs.column_names for name in COLUMNS)
        places = random_order(pairs["id"], source_names(pairs, by, source.path) if named else None)
    chosen = pairs.select(places[:count])
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as temporary:
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in chosen)
        temporary.write_text("".join(lines), encoding="utf-8")
    log.info(
        "%d of %d pairs to check: %s; exchange chosen and rejected where the label is wrong, leave out what cannot be "
        "decided, then give the file as pairs.checked.path", len(chosen), len(pairs), output,
    )  # fmt: skip
    return list(chosen["id"])


def _refuse_unfair(pairs: Dataset, where: str) -> None:
    known = "margin" in pairs.column_names and any(value is not None for value in pairs["margin"])
    if not known:
        raise DataError(
            f"{where}: found no margins, expected a column `margin` of cross-fitted or outside ones",
            code="data-column",
            hint="`align reward train` with reward.folds: 5 writes them to crossfit/pairs, or use --order random",
        )
    if SOURCE in pairs.column_names and source_of(pairs) == "in-sample":
        raise DataError(
            f"{where}: found in-sample margins, which repeat the labels, expected {' or '.join(FAIR)} ones",
            code="trust-in-sample",
            hint="train with reward.folds: 5 and give crossfit/pairs",
        )
