"""`align filter`: a pair table in, kept and dropped tables out, with all scores and a reason for every dropped pair.

Order: texts (one pass, what the rules need) -> rules -> scores -> importance -> selection -> tables and page. Whatever
takes long is kept in a cache part by part, under the key of what determines it: a stopped filter goes on where it was,
and another choice of weights costs seconds.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from datasets import Dataset

from align.config import ClusterSection, FilterSection
from align.data.text import cells
from align.errors import ConfigError, DataError
from align.filtering.knn.search import Neighbours, kth_distance
from align.filtering.rules import RULES, Table, apply_rules, by_id, place_type
from align.filtering.score_columns import distances, margins, qualities, vectors
from align.filtering.scores import diversity, doubtful
from align.filtering.selection import Scale, greedy, importance, top
from align.filtering.summary import summarise
from align.filtering.tables import Filtered, Reasons
from align.filtering.text_survey import Asked, Survey, overlap_hashes, take_survey
from align.io.console import log
from align.io.hashing import digest


def filter_pairs(
    pairs: Dataset,
    settings: FilterSection,
    cache: Path,
    *,
    held_out: list[str],
    seed: int,
    cluster: ClusterSection | None = None,
) -> Filtered:
    """Rules, scores and selection.

    Args:
        pairs: pair table, with ``margin`` where it is to count.
        settings: what to keep.
        cache: folder for parts of the work; valid for these pairs only.
        held_out: texts of an evaluation set that nothing may share a run of eight words with.
        seed: of the neighbour index.
        cluster: whose workers read texts, embed, measure and search.

    Raises:
        AlignError: the settings do not fit the pairs, a model cannot be used, or the cluster cannot.
    """
    _check(pairs, settings)
    run = _Run(pairs, settings, cache, seed, cluster, {})
    table, broken = run.rules(held_out)
    passed = np.ones(len(pairs), dtype=bool)
    passed[list(broken)] = False
    left = np.flatnonzero(passed).astype(place_type(len(pairs)))
    del passed
    if len(left) < 2:
        raise DataError(f"{len(left)} pairs pass the rules, at least 2 are needed", code="filter-empty")
    embedded, near = run.neighbours(left)
    scores = {"diversity": _spread(diversity(near.distance).astype(np.float32), left, len(pairs))}
    how = near.how()
    del near
    quality = run.qualities(table.survey)
    scores["quality"] = quality["quality"]
    if (margin := margins(pairs, in_spreads=settings.in_spreads)) is not None:
        scores["margin"] = margin
    weights = {name: float(getattr(settings, name)) for name in scores}
    with run.timed("selection"):
        usable = _OfRows(scores, left)
        values, kept = run.selected(usable, weights, embedded, left, table.order)
    columns = quality | {"diversity": scores["diversity"], "importance": values, "kept": kept}
    columns |= {n: found for n, found in (("doubtful", table.doubtful), ("ood", table.ood)) if found is not None}
    with run.timed("summary"):
        summary = summarise(pairs, table, broken, how, kept, embedded, seed)
    parts = {name: (weights[name], Scale.of(usable[name]), scores[name]) for name in scores}
    reasons = Reasons(broken, parts, values, kept, settings.method)
    return Filtered(pairs, columns, reasons, embedded, summary | {"seconds": run.seconds})


@dataclass(frozen=True, slots=True)
class _Run:
    """The steps of a filter, with what all of them need."""

    pairs: Dataset
    settings: FilterSection
    cache: Path
    seed: int
    cluster: ClusterSection | None
    seconds: dict[str, float]

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Note the seconds of a step."""
        return _timed(self.seconds, name)

    def rules(self, held_out: list[str]) -> tuple[Table, dict[int, tuple[str, str]]]:
        """What the rules look at, and what they found."""
        settings = self.settings
        with self.timed("texts"):
            survey = self._survey(held_out)
        margin = margins(self.pairs, in_spreads=False)
        ood, limit = None, np.inf
        with self.timed("distances"):
            if settings.ood is not None:
                ood, limit = distances(self.pairs, settings.ood, self.cache, self.cluster)
        table = Table(
            pairs=self.pairs,
            order=by_id(self.pairs),
            survey=survey,
            longest=settings.longest,
            language=settings.language,
            held_out=held_out,
            ood=ood,
            ood_limit=limit,
            doubtful=None if margin is None else doubtful(margin),
        )
        with self.timed("rules"):
            skip = settings.skip if settings.drop_doubtful else [*settings.skip, "label_noise"]
            return table, apply_rules(table, skip)

    def _survey(self, held_out: list[str]) -> Survey:
        """What the rules need of the texts, from the cache as far as it is there."""
        overlap, skip = overlap_hashes(held_out), self.settings.skip
        asked = Asked(overlap, near="near_duplicate" not in skip, language=self.settings.language is not None)
        folder = self.cache / f"survey-{digest([overlap.tobytes().hex(), asked.near, asked.language])[:16]}"
        return take_survey(self.pairs, asked, folder, processes=self.settings.processes, cluster=self.cluster)

    def neighbours(self, left: np.ndarray) -> tuple[np.ndarray, Neighbours]:
        """Vectors [N, D] of all prompts, and how near those of the pairs ``left`` lie to one another."""
        with self.timed("embedding"):
            embedded, name = vectors(self.pairs, self.settings, self.cache, self.cluster)
        k, method = self.settings.neighbours, self.settings.index
        key = digest([name, sha256(left.tobytes()).hexdigest(), k, method, self.seed])[:16]
        file, folder = self.cache / f"neighbours-{key}.npz", self.cache / f"neighbours-{key}"
        with self.timed("neighbours"):
            if not file.exists():
                kth_distance(
                    embedded, k, seed=self.seed, folder=folder, rows=left, method=method, cluster=self.cluster
                ).write(file)
            shutil.rmtree(folder, ignore_errors=True)
            return embedded, Neighbours.read(file)

    def qualities(self, survey: Survey) -> dict[str, np.ndarray]:
        """The quality columns [N]; not-a-number nowhere."""
        with self.timed("quality"):
            return qualities(self.pairs, survey, self.settings, self.cache, self.cluster)

    def selected(
        self,
        scores: Mapping[str, np.ndarray],
        weights: dict[str, float],
        embedded: np.ndarray,
        left: np.ndarray,
        order: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Importance [N], not-a-number where a rule came first, and bool [N]: kept.

        Args:
            scores: [L] each, of the pairs that pass the rules.
            weights: of the scores.
            embedded: [N, D].
            left: places of the pairs that pass the rules.
            order: places of all pairs, smallest id first.
        """
        settings, count = self.settings, len(self.pairs)
        rank = np.empty_like(order)
        rank[order] = np.arange(count, dtype=rank.dtype)
        values = importance(scores, weights)
        wanted = max(1, round(settings.keep * len(left)))
        if settings.method == "threshold":
            places = np.flatnonzero(values >= settings.minimum)
            if not len(places):
                raise DataError(
                    f"minimum: found no pair with an importance of {settings.minimum:g} or more; "
                    f"the highest is {values.max():.4g}",
                    code="filter-empty",
                    hint="give a smaller --minimum",
                )
        elif settings.method == "greedy":
            base = importance(scores, weights | {"diversity": 0.0})
            spread = 1.0 / (np.std(scores["diversity"]) or 1.0)
            near = np.asarray(embedded)[left]
            places = greedy(base, near, rank[left], wanted, weight=weights["diversity"] * spread)
        else:
            groups = cells(self.pairs, "group").to_numpy().astype(str)[left] if settings.per_group else None
            places = top(values, rank[left], wanted, groups)
        kept = np.zeros(count, dtype=bool)
        kept[left[places]] = True
        return _spread(values, left, count), kept


def _check(pairs: Dataset, settings: FilterSection) -> None:
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
    for column in ("margin", "margin_std") if settings.in_spreads else ("margin",):
        missing = cells(pairs, column).null_count if column in pairs.column_names else 0
        if missing:
            raise DataError(
                f"{column}: {missing} of {len(pairs)} pairs have none", code="filter-margin",
                hint="score all pairs with `align reward score`, or take the column out",
            )  # fmt: skip


def _spread(values: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    """``values`` at ``places`` of an array of ``count``, not-a-number elsewhere."""
    made = np.full(count, np.nan, dtype=values.dtype)
    made[places] = values
    return made


class _OfRows(Mapping[str, np.ndarray]):
    """Some rows of columns, copied one column at a time."""

    def __init__(self, columns: dict[str, np.ndarray], rows: np.ndarray) -> None:
        self.columns = columns
        self.rows = rows

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name][self.rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)
