"""`align filter`: a pair table in, kept and dropped tables out, with all scores and a reason for every dropped pair.

Order: texts (one pass, what the rules need) -> rules -> scores -> importance -> selection -> tables and page. Whatever
takes long is kept in a cache part by part, under the key of what determines it: a stopped filter goes on where it was,
and another choice of weights costs seconds.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from align.config import FilterConfig, PairsConfig
from align.console import log
from align.errors import ConfigError, DataError
from align.filtering.columns import distances, margins, qualities, vectors
from align.filtering.neighbours import Neighbours, kth_distance
from align.filtering.rules import RULES, Table, apply_rules, length_bias
from align.filtering.scores import diversity, doubtful, effective_number
from align.filtering.select import greedy, importance, standardise, top
from align.filtering.survey import Asked, Survey, overlap_hashes, take_survey
from align.filtering.texts import cells, plain
from align.pair_stream import stream_pairs
from align.pairs import load_pairs
from align.stage import digest, fingerprint_source, write_json

KEPT, DROPPED, SUMMARY = "kept.parquet", "dropped.parquet", "filter.json"
CACHE = "parts"
WRITTEN_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class Filtered:
    """All pairs with what the filter found, [N] each; scores are not-a-number where a rule came first."""

    pairs: Dataset
    columns: dict[str, np.ndarray]
    """quality, diversity, importance, kept, reason and, where there is what they need, doubtful and ood."""
    vectors: np.ndarray
    """[N, D]."""
    summary: dict[str, Any]

    @property
    def kept(self) -> np.ndarray:
        """bool [N]."""
        return self.columns["kept"]


def filter_source(source: PairsConfig, settings: FilterConfig, output: Path, *, seed: int, cache: Path) -> None:
    """Write ``kept.parquet``, ``dropped.parquet``, ``filter.json`` and ``report.html`` into ``output``.

    Args:
        source: where the pairs come from.
        settings: what to keep.
        output: folder.
        seed: of the neighbour index.
        cache: folder for parts of the work.

    Raises:
        AlignError: the pairs, the settings or a model cannot be used.
    """
    seconds: dict[str, float] = {}
    known = source.model_dump() | {"content": fingerprint_source(source.path)}
    own = cache / digest(known)[:16]
    with _timed(seconds, "reading"):
        pairs = stream_pairs(source, own / "pairs.arrow")
    held_out: list[str] = []
    if settings.held_out is not None:
        held_out = [plain(row["prompt"]) for row in load_pairs(PairsConfig(path=settings.held_out))]
    found = filter_pairs(pairs, settings, own, held_out=held_out, seed=seed)
    output.mkdir(parents=True, exist_ok=True)
    from align.reports.filter_page import write_page

    with _timed(seconds, "writing"):
        write_tables(found, output)
        write_page(output / "report.html", found, source.path)
    summary = found.summary | {"seconds": seconds | found.summary["seconds"]}
    write_json(output / SUMMARY, summary | {"source": known, "settings": settings.model_dump(), "seed": seed})
    log.info("kept %d of %d pairs: %s", found.summary["kept"], len(pairs), output / KEPT)
    log.info("dropped, each with a reason: %s; look at it: open %s", output / DROPPED, output / "report.html")


def filter_pairs(pairs: Dataset, settings: FilterConfig, cache: Path, *, held_out: list[str], seed: int) -> Filtered:
    """Rules, scores and selection.

    Args:
        pairs: pair table, with ``margin`` where it is to count.
        settings: what to keep.
        cache: folder for parts of the work; valid for these pairs only.
        held_out: texts of an evaluation set that nothing may share a run of eight words with.
        seed: of the neighbour index.

    Raises:
        AlignError: the settings do not fit the pairs, or a model cannot be used.
    """
    _check(pairs, settings)
    seconds: dict[str, float] = {}
    table, broken = _rules(pairs, settings, cache, held_out, seconds)
    left = np.setdiff1d(np.arange(len(table.ids)), np.fromiter(broken, dtype=np.int64, count=len(broken)))
    if len(left) < 2:
        raise DataError(f"{len(left)} pairs pass the rules, at least 2 are needed", code="filter-empty")
    with _timed(seconds, "embedding"):
        embedded = vectors(pairs, settings, cache)
    with _timed(seconds, "neighbours"):
        near = kth_distance(embedded, settings.neighbours, seed=seed, rows=left, method=settings.index)
    with _timed(seconds, "quality"):
        quality = qualities(pairs, table.survey, settings, cache)
    scores = {"quality": quality["quality"][left], "diversity": diversity(near.distance)}
    if (margin := margins(pairs, in_spreads=settings.in_spreads)) is not None:
        scores["margin"] = margin[left]
    with _timed(seconds, "selection"):
        weights = {name: float(getattr(settings, name)) for name in scores}
        values = importance(scores, weights)
        kept = np.zeros(len(table.ids), dtype=bool)
        kept[left[_select(settings, scores, weights, values, table.ids[left], embedded, left, pairs)]] = True
    parts = {name: weights[name] * standardise(found) for name, found in scores.items()}
    columns = quality | {
        "diversity": _spread(scores["diversity"], left, len(kept)),
        "importance": _spread(values, left, len(kept)),
        "kept": kept,
        "reason": _reasons(broken, left, parts, values, kept, settings.method),
    }
    columns |= {n: found for n, found in (("doubtful", table.doubtful), ("ood", table.ood)) if found is not None}
    with _timed(seconds, "summary"):
        summary = _summary(pairs, table, broken, near, kept, left, embedded, seed)
    return Filtered(pairs, columns, embedded, summary | {"seconds": seconds})


def _rules(
    pairs: Dataset, settings: FilterConfig, cache: Path, held_out: list[str], seconds: dict[str, float]
) -> tuple[Table, dict[int, tuple[str, str]]]:
    """What the rules look at, and what they found."""
    with _timed(seconds, "texts"):
        survey = _survey(pairs, settings, cache, held_out)
    margin = margins(pairs, in_spreads=False)
    with _timed(seconds, "distances"):
        ood, limit = distances(pairs, settings.ood, cache) if settings.ood else (None, np.inf)
    table = Table(
        pairs=pairs,
        ids=cells(pairs, "id").to_numpy().astype(str),
        survey=survey,
        longest=settings.longest,
        language=settings.language,
        held_out=held_out,
        ood=ood,
        ood_limit=limit,
        doubtful=None if margin is None else doubtful(margin),
    )
    with _timed(seconds, "rules"):
        skip = settings.skip if settings.drop_doubtful else [*settings.skip, "label_noise"]
        return table, apply_rules(table, skip)


def _survey(pairs: Dataset, settings: FilterConfig, cache: Path, held_out: list[str]) -> Survey:
    """What the rules need of the texts, from the cache as far as it is there."""
    overlap = overlap_hashes(held_out)
    asked = Asked(overlap, near="near_duplicate" not in settings.skip, language=settings.language is not None)
    key = digest([overlap.tobytes().hex(), asked.near, asked.language])[:16]
    return take_survey(pairs, asked, cache / f"survey-{key}", settings.processes)


def explain(output: Path, pair_id: str) -> dict[str, Any]:
    """Everything the filter found about one pair.

    Raises:
        DataError: nothing was filtered into ``output``, or it has no such pair.
    """
    if not (output / SUMMARY).exists():
        raise DataError(f"{output}: holds no {SUMMARY}", code="filter-missing", hint="run `align filter` first")
    for name in (KEPT, DROPPED):
        rows = pq.read_table(output / name, partitioning=None, filters=[("id", "=", pair_id)]).to_pylist()
        if rows:
            found: dict[str, Any] = rows[0]
            return found
    raise DataError(f"{output}: no pair has id {pair_id!r}", code="filter-missing", hint="ids stand in the `id` column")


def write_tables(found: Filtered, output: Path) -> None:
    """The pairs with their new columns as ``kept.parquet`` and ``dropped.parquet``, a block of rows at a time."""
    names = [name for name in found.columns if name in found.pairs.column_names]
    pairs = found.pairs.remove_columns(names).with_format("arrow")
    targets = {True: output / KEPT, False: output / DROPPED}
    writers: dict[bool, pq.ParquetWriter] = {}
    for start in range(0, len(pairs), WRITTEN_ROWS):
        block = slice(start, min(start + WRITTEN_ROWS, len(pairs)))
        rows = pairs[block].replace_schema_metadata(None)
        for name, values in found.columns.items():
            rows = rows.append_column(name, pa.array(values[block], from_pandas=True))
        for wanted, target in targets.items():
            part = rows.filter(pa.array(found.kept[block] == wanted))
            part = part.drop_columns("reason") if wanted else part
            if wanted not in writers:
                writers[wanted] = pq.ParquetWriter(target.with_suffix(".tmp"), part.schema, compression="zstd")
            writers[wanted].write_table(part)
    for wanted, target in targets.items():
        writers[wanted].close()
        target.with_suffix(".tmp").replace(target)


def _check(pairs: Dataset, settings: FilterConfig) -> None:
    problems = {
        "per_group: the pairs have no `group` column": settings.per_group and "group" not in pairs.column_names,
        "method threshold: needs `minimum`, the least importance": settings.method == "threshold"
        and settings.minimum is None,
        "in_spreads: the pairs have no `margin_std` column": settings.in_spreads
        and not {"margin", "margin_std"} <= set(pairs.column_names),
        "drop_doubtful: the pairs have no `margin` column": settings.drop_doubtful
        and "margin" not in pairs.column_names,
    } | {f"skip: no rule {name!r}; rules are {', '.join(RULES)}": name not in RULES for name in settings.skip}
    wrong = [problem for problem, there in problems.items() if there]
    if wrong:
        raise ConfigError("; ".join(wrong), code="filter-option", hint="see docs/filtering.md")
    if "margin" not in pairs.column_names and settings.margin != 0:
        log.warning("the pairs have no `margin` column: quality and diversity decide alone")
    elif "margin" in pairs.column_names and cells(pairs, "margin").null_count:
        raise DataError(
            f"margin: {cells(pairs, 'margin').null_count} of {len(pairs)} pairs have none", code="filter-margin",
            hint="score all pairs with `align reward score`, or take the column out",
        )  # fmt: skip


def _select(
    settings: FilterConfig,
    scores: dict[str, np.ndarray],
    weights: dict[str, float],
    values: np.ndarray,
    ids: np.ndarray,
    embedded: np.ndarray,
    left: np.ndarray,
    pairs: Dataset,
) -> np.ndarray:
    """Places in ``left`` of the pairs to keep."""
    count = max(1, round(settings.keep * len(left)))
    if settings.method == "threshold":
        return np.flatnonzero(values >= settings.minimum)
    if settings.method == "greedy":
        base = importance(scores, weights | {"diversity": 0.0})
        spread = 1.0 / (np.std(scores["diversity"]) or 1.0)
        return greedy(base, np.asarray(embedded)[left], ids.tolist(), count, weight=weights["diversity"] * spread)
    groups = cells(pairs, "group").to_numpy().astype(str)[left] if settings.per_group else None
    return top(values, ids, count, groups)


def _reasons(
    broken: dict[int, tuple[str, str]],
    left: np.ndarray,
    parts: dict[str, np.ndarray],
    values: np.ndarray,
    kept: np.ndarray,
    method: str,
) -> np.ndarray:
    """Why each pair was dropped, with the least of the ``parts`` of its importance; empty where it was kept."""
    reasons = np.full(len(kept), "", dtype=object)
    for k, (rule, said) in broken.items():
        reasons[k] = f"{rule}: {said}"
    names = list(parts)
    weakest = np.argmin(list(parts.values()), axis=0)
    for place in np.flatnonzero(~kept[left]):
        reasons[left[place]] = f"{method}: importance {values[place]:.2f}, least from {names[weakest[place]]}"
    return reasons


def _summary(
    pairs: Dataset,
    table: Table,
    broken: dict[int, tuple[str, str]],
    near: Neighbours,
    kept: np.ndarray,
    left: np.ndarray,
    embedded: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    words = table.survey.words.sum(axis=1, dtype=np.int64)
    rules = [rule for rule, _ in broken.values()]
    random = np.sort(np.random.default_rng(seed).choice(len(kept), int(kept.sum()), replace=False))
    return {
        "pairs": len(kept),
        "passed_rules": len(left),
        "kept": int(kept.sum()),
        "dropped_by_rule": {name: rules.count(name) for name in RULES if name in rules},
        "groups": _groups(pairs, kept),
        "longer_is_chosen": {
            "all": length_bias(table.survey.words),
            "kept": length_bias(table.survey.words, np.flatnonzero(kept)),
        },
        "neighbours": {"method": near.method, "recall": near.recall},
        "effective_number": {
            "all": effective_number(embedded),
            "kept": effective_number(embedded, np.flatnonzero(kept)),
            "random": effective_number(embedded, random),
        },
        "training_time_saved": float(1 - words[kept].sum() / max(words.sum(), 1)),
        "doubtful": None
        if table.doubtful is None
        else {"all": float(table.doubtful.mean()), "kept": float(table.doubtful[kept].mean())},
        "ood_limit": None if table.ood is None else table.ood_limit,
    }


def _groups(pairs: Dataset, kept: np.ndarray) -> dict[str, dict[str, int]]:
    if "group" not in pairs.column_names:
        return {}
    groups = cells(pairs, "group").to_numpy().astype(str)
    names, which = np.unique(groups, return_inverse=True)
    return {
        str(name): {"pairs": int((which == k).sum()), "kept": int(kept[which == k].sum())}
        for k, name in enumerate(names)
    }


def _spread(values: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    """``values`` at ``places`` of an array of ``count``, not-a-number elsewhere."""
    made = np.full(count, np.nan)
    made[places] = values
    return made


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)
