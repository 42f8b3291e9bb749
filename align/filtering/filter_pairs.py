"""Filter a pair table: scores for all pairs, kept or dropped, and a reason for every dropped pair.

Order: survey of the texts -> rules -> scores -> importance -> selection. Each long step is cached part by part under a
key of its inputs: a stopped filter resumes, and another choice of weights takes seconds.
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.config import ClusterSection, FilterSection
from align.data.text import cells
from align.errors import ConfigError, DataError
from align.filtering.held_out import HeldOut
from align.filtering.knn.search import Neighbors, kth_distance
from align.filtering.options import problems
from align.filtering.own_scores import OwnScore
from align.filtering.rules import RuleInput, apply_rules, by_id, place_type
from align.filtering.score_columns import distances, margins, prompt_embeddings, qualities
from align.filtering.scores import diversity, doubtful
from align.filtering.selection import RobustScale, greedy, importance, top_k, warn_if_unranked, without_effect
from align.filtering.summary import summarize_filter
from align.filtering.tables import Filtered, Reasons
from align.filtering.text_survey import SURVEY, Survey, SurveyJob, take_survey
from align.io.console import log
from align.io.hashing import digest


def filter_pairs(
    pairs: Dataset,
    settings: FilterSection,
    cache: Path,
    *,
    held_out: Sequence[Mapping[str, Any]],
    seed: int,
    cluster: ClusterSection | None = None,
    own: Mapping[str, OwnScore] | None = None,
) -> Filtered:
    """Apply rules, compute scores and select pairs.

    Args:
        pairs: pair table, with ``margin`` if it is to count.
        settings: what to keep.
        cache: folder for parts of the work; valid for these pairs only.
        held_out: pairs of an evaluation set, which no kept pair may overlap with, see ``held_out.overlaps``.
        seed: seed of the nearest-neighbor index and of the random sample in the summary.
        cluster: its workers read texts, embed, score and search.
        own: further scores that enter the importance, by name, [N] each.

    Raises:
        AlignError: the settings do not fit the pairs, or a model or the cluster cannot be used.
    """
    own = own or {}
    _check(pairs, settings, own)
    run = _FilterRun(pairs, settings, cache, seed, cluster, {})
    table, broken = run.rules(held_out)
    passing = _passing(pairs, broken)
    embedded, neighbors = run.neighbors(passing)
    scores = {"diversity": _scatter(diversity(neighbors.distance).astype(np.float32), passing, len(pairs))}
    search = neighbors.method_and_recall()
    del neighbors
    quality = run.qualities(table.survey)
    scores["quality"] = quality["quality"]
    if (margin := margins(pairs, in_spreads=settings.in_spreads)) is not None:
        scores["margin"] = margin
    weights = {name: float(getattr(settings, name)) for name in scores} | {
        name: one.weight for name, one in own.items()
    }
    given = {name: one.values for name, one in own.items()}
    scores |= given
    with run.timed("selection"):
        usable = _SelectedRows(scores, passing)
        values, kept = run.select(usable, weights, embedded, passing, table.order)
    columns = quality | given | {"diversity": scores["diversity"], "importance": values, "kept": kept}
    optional = {"doubtful": table.doubtful, "ood": table.ood}
    columns |= {name: column for name, column in optional.items() if column is not None}
    with run.timed("summary"):
        summary = summarize_filter(pairs, table, broken, search, kept, embedded, seed)
    parts = {name: (weights[name], RobustScale.fit(usable[name]), scores[name]) for name in scores}
    summary["no_effect"] = without_effect(usable, weights)
    warn_if_unranked(values[passing], int(kept.sum()))
    reasons = Reasons(broken, parts, values, kept, settings.method)
    return Filtered(pairs, columns, reasons, embedded, summary | {"seconds": run.seconds})


@dataclass(frozen=True, slots=True)
class _FilterRun:
    """The steps of one filter, with their common inputs."""

    pairs: Dataset
    settings: FilterSection
    cache: Path
    seed: int
    cluster: ClusterSection | None
    seconds: dict[str, float]

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Record the seconds of a step."""
        return timed(self.seconds, name)

    def rules(self, held_out: Sequence[Mapping[str, Any]]) -> tuple[RuleInput, dict[int, tuple[str, str]]]:
        """Apply the rules: their input, and (rule, finding) of the pairs that broke one."""
        settings = self.settings
        known = HeldOut.of(held_out) if held_out else None
        with self.timed("texts"):
            survey = self._survey(known)
        margin = margins(self.pairs, in_spreads=False)
        ood, limit = None, np.inf
        with self.timed("distances"):
            if settings.ood is not None:
                ood, limit = distances(self.pairs, settings.ood, self.cache, self.cluster)
        table = RuleInput(
            pairs=self.pairs,
            order=by_id(self.pairs),
            survey=survey,
            longest=settings.longest,
            language=settings.language,
            held_out=known,
            ood=ood,
            ood_limit=limit,
            doubtful=None if margin is None else doubtful(margin),
        )
        with self.timed("rules"):
            skip = settings.skip if settings.drop_doubtful else [*settings.skip, "label_noise"]
            return table, apply_rules(table, skip)

    def _survey(self, held_out: HeldOut | None) -> Survey:
        """The survey of the texts that the rules need, as far as possible from the cache."""
        skip = self.settings.skip
        compared = held_out is not None and "contamination" not in skip
        overlap = held_out.runs if held_out is not None and compared else np.empty(0, dtype=np.uint64)
        job = SurveyJob(overlap, near="near_duplicate" not in skip, language=self.settings.language is not None)
        folder = self.cache / f"survey-{digest([SURVEY, overlap.tobytes().hex(), job.near, job.language])[:16]}"
        return take_survey(self.pairs, job, folder, processes=self.settings.processes, cluster=self.cluster)

    def neighbors(self, passing: np.ndarray) -> tuple[np.ndarray, Neighbors]:
        """Embeddings [N, D] of all prompts, and k-th nearest neighbor distances among the passing pairs."""
        with self.timed("embedding"):
            embedded, name = prompt_embeddings(self.pairs, self.settings, self.cache, self.cluster)
        k, method = self.settings.neighbours, self.settings.index
        key = digest([name, sha256(passing.tobytes()).hexdigest(), k, method, self.seed])[:16]
        file, folder = self.cache / f"neighbours-{key}.npz", self.cache / f"neighbours-{key}"
        with self.timed("neighbours"):
            if not file.exists():
                kth_distance(
                    embedded, k, seed=self.seed, folder=folder, rows=passing, method=method, cluster=self.cluster
                ).write(file)
            shutil.rmtree(folder, ignore_errors=True)
            return embedded, Neighbors.read(file)

    def qualities(self, survey: Survey) -> dict[str, np.ndarray]:
        """The quality columns [N], of all pairs."""
        with self.timed("quality"):
            return qualities(self.pairs, survey, self.settings, self.cache, self.cluster)

    def select(
        self,
        scores: Mapping[str, np.ndarray],
        weights: dict[str, float],
        embedded: np.ndarray,
        passing: np.ndarray,
        order: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Importance [N], NaN for pairs that broke a rule, and bool [N]: kept.

        Args:
            scores: [L] each, scores of the pairs that pass the rules.
            weights: weights of the scores.
            embedded: embeddings of all prompts, [N, D].
            passing: places of the pairs that pass the rules, [L].
            order: places of all pairs, smallest id first, [N].
        """
        settings, count = self.settings, len(self.pairs)
        rank = np.empty_like(order)
        rank[order] = np.arange(count, dtype=rank.dtype)
        values = importance(scores, weights)
        wanted = max(1, round(settings.share * len(passing)))
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
            vectors = np.asarray(embedded)[passing]
            places = greedy(base, vectors, rank[passing], wanted, weight=weights["diversity"] * spread)
        else:
            groups = cells(self.pairs, "group").to_numpy().astype(str)[passing] if settings.per_group else None
            places = top_k(values, rank[passing], wanted, groups)
        kept = np.zeros(count, dtype=bool)
        kept[passing[places]] = True
        return _scatter(values, passing, count), kept


def _check(pairs: Dataset, settings: FilterSection, own: Mapping[str, OwnScore]) -> None:
    missing_columns = {
        "per_group: the pairs have no `group` column": settings.per_group and "group" not in pairs.column_names,
        "in_spreads: the pairs have no `margin_std` column": settings.in_spreads
        and not {"margin", "margin_std"} <= set(pairs.column_names),
        "drop_doubtful: the pairs have no `margin` column": settings.drop_doubtful
        and "margin" not in pairs.column_names,
    }
    wrong = [*(problem for problem, there in missing_columns.items() if there), *problems(settings)]
    if wrong:
        raise ConfigError("; ".join(wrong), code="filter-option", hint="see docs/filtering.md")
    if "margin" not in pairs.column_names and settings.margin != 0:
        *others, last = ("quality", "diversity", *own)
        log.warning("the pairs have no `margin` column: only %s and %s decide", ", ".join(others), last)
    for column in ("margin", "margin_std") if settings.in_spreads else ("margin",):
        missing = cells(pairs, column).null_count if column in pairs.column_names else 0
        if missing:
            raise DataError(
                f"{column}: {missing} of {len(pairs)} pairs have none", code="filter-margin",
                hint="score all pairs with `align reward score`, or remove the column",
            )  # fmt: skip


class TooFewPass(DataError):
    """Fewer than two pairs pass the rules."""

    broken: Mapping[int, tuple[str, str]] = {}
    """(rule, finding) of the pairs that broke a rule."""


def _passing(pairs: Dataset, broken: Mapping[int, tuple[str, str]]) -> np.ndarray:
    """Places of the pairs that pass the rules, [L].

    Raises:
        TooFewPass: there are fewer than two.
    """
    count = len(pairs)
    passed = np.ones(count, dtype=bool)
    passed[list(broken)] = False
    passing = np.flatnonzero(passed).astype(place_type(count))
    if len(passing) < 2:
        rules = Counter(rule for rule, _ in broken.values()).most_common()
        error = TooFewPass(
            f"found {len(passing)} of {count} pairs that pass the rules, expected at least 2; the rules dropped: "
            + (", ".join(f"{rule} {number}" for rule, number in rules) or "none"),
            code="filter-empty",
            hint="see `reason` in dropped.parquet; --skip RULE turns a rule off (filter.skip in a run)",
        )
        error.broken = broken
        raise error
    return passing


def _scatter(values: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    """Put ``values`` at ``places`` of an array of ``count``; NaN elsewhere."""
    array = np.full(count, np.nan, dtype=values.dtype)
    array[places] = values
    return array


class _SelectedRows(Mapping[str, np.ndarray]):
    """Selected rows of columns, copied one column at a time."""

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
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Record in ``seconds[name]`` how long the block takes."""
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)
