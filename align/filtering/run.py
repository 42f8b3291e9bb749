"""`align filter`: a pair table in, kept and dropped tables out, with all scores and a reason for every dropped pair."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.config import PairsConfig
from align.console import log
from align.errors import ConfigError, DataError
from align.filtering.neighbours import kth_distance
from align.filtering.rules import apply_rules, length_bias
from align.filtering.scores import cached_embedding, diversity, quality
from align.filtering.select import greedy, importance, standardise, top
from align.filtering.texts import plain
from align.pairs import fingerprint, load_pairs
from align.stage import digest, write_json

KEPT, DROPPED, SUMMARY = "kept.parquet", "dropped.parquet", "filter.json"
SCORES = ("margin", "quality", "diversity")


@dataclass(frozen=True, slots=True)
class FilterSettings:
    """What `align filter` is asked for."""

    keep: float
    """Share of the pairs that pass the rules, in (0, 1]."""
    method: str = "top"
    """``top``: one-shot importance; ``greedy``: diversity against what is already kept; ``threshold``."""
    weights: tuple[float, float, float] = (1.0, 0.5, 0.5)
    """Of margin, quality and diversity, on standardised columns; the margin's is 0 where there is none."""
    minimum: float | None = None
    """``threshold``: least importance."""
    neighbours: int = 5
    per_group: bool = False
    skip: tuple[str, ...] = ()
    longest: int = 2048
    embedding_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    seed: int = 0


def filter_pairs(source: PairsConfig, settings: FilterSettings, output: Path, held_out: Path | None = None) -> None:
    """Write ``kept.parquet``, ``dropped.parquet``, ``filter.json`` and ``report.html`` into ``output``.

    Raises:
        AlignError: the pairs, the settings or a model cannot be used.
    """
    pairs = load_pairs(source)
    texts = [] if held_out is None else [plain(row["prompt"]) for row in load_pairs(PairsConfig(path=str(held_out)))]
    table, summary = score_and_select(pairs, settings, texts, output / "embeddings")
    output.mkdir(parents=True, exist_ok=True)
    for name, wanted in ((KEPT, True), (DROPPED, False)):
        rows = table.filter(lambda row, wanted=wanted: row["kept"] == wanted)
        _write(rows.remove_columns("reason") if wanted else rows, output / name)
    write_json(output / SUMMARY, summary | {"source": source.path, "settings": asdict(settings)})
    from align.reports.filter_page import write_page

    write_page(output / "report.html", table, summary, source.path)
    log.info("kept %d of %d pairs: %s", summary["kept"], summary["pairs"], output / KEPT)
    log.info("dropped, each with a reason: %s; look at it: open %s", output / DROPPED, output / "report.html")


def score_and_select(
    pairs: Dataset, settings: FilterSettings, held_out: list[str], cache: Path
) -> tuple[Dataset, dict[str, Any]]:
    """The table with ``quality``, ``diversity``, ``importance``, ``kept`` and ``reason``, and a summary.

    Args:
        pairs: pair table, with ``margin`` where it is to count.
        settings: what to keep.
        held_out: texts of an evaluation set that nothing may share a run of eight words with.
        cache: folder for the embeddings.
    """
    _check(pairs, settings)
    rows = list(pairs)
    broken = apply_rules(rows, skip=settings.skip, held_out=held_out, longest=settings.longest)
    left = [k for k in range(len(rows)) if k not in broken]
    if len(left) < 2:
        raise DataError(f"{len(left)} pairs pass the rules, at least 2 are needed", code="filter-empty")
    key = digest({"pairs": fingerprint(pairs), "model": settings.embedding_model})[:16]
    vectors = cached_embedding([plain(row["prompt"]) for row in rows], settings.embedding_model, cache / f"{key}.npy")
    found = kth_distance(np.asarray(vectors)[left], settings.neighbours, seed=settings.seed)
    columns = {
        "margin": np.array(
            [rows[k]["margin"] for k in left] if "margin" in pairs.column_names else np.zeros(len(left))
        ),
        "quality": np.array([quality(rows[k]) for k in left]),
        "diversity": diversity(found),
    }
    weights = dict(zip(SCORES, settings.weights, strict=True))
    values = importance(columns, weights)
    ids = [str(rows[k]["id"]) for k in left]
    count = max(1, round(settings.keep * len(left)))
    if settings.method == "threshold":
        assert settings.minimum is not None
        chosen = np.flatnonzero(values >= settings.minimum)
    elif settings.method == "greedy":
        base = importance(columns, weights | {"diversity": 0.0})
        spread = 1.0 / (np.std(columns["diversity"]) or 1.0)
        chosen = greedy(base, np.asarray(vectors)[left], ids, count, weight=weights["diversity"] * spread)
    else:
        groups = [str(rows[k]["group"]) for k in left] if settings.per_group else None
        chosen = top(values, ids, count, groups)
    kept = {left[k] for k in chosen}
    table = _table(pairs, left, columns, values, kept, broken, settings.method)
    return table, {
        "pairs": len(rows),
        "passed_rules": len(left),
        "kept": len(kept),
        "dropped_by_rule": _counts([rule for rule, _ in broken.values()]),
        "kept_share_by_group": _group_shares(rows, kept),
        "longer_is_chosen": {"all": length_bias(rows), "kept": length_bias([rows[k] for k in sorted(kept)])},
        "neighbours": {"method": found.method, "recall": found.recall},
        "training_time_saved": 1 - len(kept) / len(rows),
    }


def explain(output: Path, pair_id: str) -> dict[str, Any]:
    """Everything the filter found about one pair.

    Raises:
        DataError: nothing was filtered into ``output``, or it has no such pair.
    """
    if not (output / SUMMARY).exists():
        raise DataError(f"{output}: holds no {SUMMARY}", code="filter-missing", hint="run `align filter` first")
    for name in (KEPT, DROPPED):
        for row in Dataset.from_parquet(str(output / name), keep_in_memory=True):
            if str(row["id"]) == pair_id:
                return dict(row)
    raise DataError(f"{output}: no pair has id {pair_id!r}", code="filter-missing", hint="ids stand in the `id` column")


def _check(pairs: Dataset, settings: FilterSettings) -> None:
    if settings.per_group and "group" not in pairs.column_names:
        raise ConfigError("--per-group: the pairs have no `group` column", code="filter-option")
    if settings.method == "threshold" and settings.minimum is None:
        raise ConfigError("--method threshold: needs --minimum, the least importance", code="filter-option")
    if "margin" not in pairs.column_names and settings.weights[0] != 0:
        log.warning("the pairs have no `margin` column: quality and diversity decide alone")


def _table(
    pairs: Dataset,
    left: list[int],
    columns: dict[str, np.ndarray],
    values: np.ndarray,
    kept: set[int],
    broken: dict[int, tuple[str, str]],
    method: str,
) -> Dataset:
    """All pairs with their scores (None where a rule came first) and a reason for each dropped one."""
    scored: dict[str, list[Any]] = {name: [None] * len(pairs) for name in ("quality", "diversity", "importance")}
    for place, k in enumerate(left):
        for name in ("quality", "diversity"):
            scored[name][k] = float(columns[name][place])
        scored["importance"][k] = float(values[place])
    standard = {name: dict(zip(left, standardise(column), strict=True)) for name, column in columns.items()}
    reasons = []
    for k in range(len(pairs)):
        if k in kept:
            reasons.append("")
        elif k in broken:
            reasons.append(f"{broken[k][0]}: {broken[k][1]}")
        else:
            weakest = min(SCORES, key=lambda name, k=k: standard[name][k])  # type: ignore[misc]
            reasons.append(f"{method}: importance {scored['importance'][k]:.2f}, lowest score {weakest}")
    table = pairs.remove_columns([name for name in (*scored, "kept", "reason") if name in pairs.column_names])
    for name, column in scored.items():
        table = table.add_column(name, column)
    return table.add_column("kept", [k in kept for k in range(len(pairs))]).add_column("reason", reasons)


def _counts(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}


def _group_shares(rows: list[dict[str, Any]], kept: set[int]) -> dict[str, float]:
    if "group" not in rows[0]:
        return {}
    groups = sorted({str(row["group"]) for row in rows})
    members = {group: [k for k, row in enumerate(rows) if str(row["group"]) == group] for group in groups}
    return {group: sum(k in kept for k in found) / len(found) for group, found in members.items()}


def _write(table: Dataset, file: Path) -> None:
    temporary = file.with_suffix(".tmp")
    table.to_parquet(str(temporary))
    temporary.replace(file)
