"""``filter_pairs``: which pairs to train on, and why not the others."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from pydantic import ValidationError

from align.config import FilterSection, nearest
from align.data.findings import report_margins
from align.data.in_memory import NAME, checked_table, pairs_from_dataset
from align.data.pairs import fingerprint
from align.data.training_pairs import report_in_sample
from align.errors import ConfigError, DataError, listed, python_words
from align.filtering import filter_pairs as filtering
from align.filtering.options import check_options
from align.filtering.own_scores import BUILT_IN, check_names, read_scores
from align.filtering.rules import RULES
from align.filtering.tables import Filtered, filtered_rows

ON_REQUEST = "label_noise"
"""The rule that is applied only where ``rules`` names it."""
TAKEN = {"skip": "rules", "drop_doubtful": "rules", "embedding_model": "model", "keep": "keep", "held_out": "held_out"}
"""Fields of the section ``filter`` that are arguments here -> the argument."""


VECTORS = "embeddings.npy"
"""File of the vectors that the caller gives."""


@dataclass(frozen=True, slots=True)
class FilterResult:
    """The pairs, kept and dropped, with the columns of the filter."""

    kept: Dataset
    """The kept pairs with ``quality``, ``diversity``, ``importance`` and the caller's scores; ``doubtful`` where there
    are margins; and the columns of the given table, also those that nothing here reads."""
    dropped: Dataset
    """The other pairs, with the ``reason`` of each."""
    summary: dict[str, Any]
    """Numbers as in filter.json: ``pairs``, ``kept``, ``dropped_by_rule``, ``longer_is_chosen``, ..."""
    found: Filtered = field(repr=False)
    """The filter's own result, for the page."""

    def explain(self, pair_id: str) -> dict[str, Any]:
        """All columns of one pair, with the reason if it was dropped.

        Raises:
            DataError: no pair has this id.
        """
        for table in (self.kept, self.dropped):
            places = pc.indices_nonzero(pc.equal(table.data.column("id"), str(pair_id))).to_pylist()
            if places:
                row: dict[str, Any] = table[places[0]]
                return row
        raise DataError(f"no pair has id {pair_id!r}", code="filter-missing", hint="see the column `id`")

    def write_page(self, path: str | Path) -> None:
        """Write the page of `align filter run`, one HTML file without requests, to ``path``."""
        from align.reports.filter_page import write_filter_page

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_filter_page(target, self.found, NAME)


def filter_pairs(
    pairs: Any,
    *,
    keep: float | None = 0.3,
    rules: Sequence[str] | None = (),
    model: str | Path | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    held_out: Any = None,
    scores: Mapping[str, Any] | None = None,
    weights: Mapping[str, float] | None = None,
    **options: Any,
) -> FilterResult:
    """Apply hard rules, then keep the pairs with the largest margin + quality + diversity, as `align filter run` does.

    Args:
        pairs: what ``pairs_from_dataset`` takes; a ``margin`` counts if there is one.
        keep: share to keep of the pairs that pass the rules, in (0, 1]; None for ``method="threshold"``.
        rules: names of the rules to apply (``align.filtering.rules.RULES``). Empty: all but ``label_noise``, as on the
            command line. None: no rule.
        model: encoder of the prompts: folder or hub id; None: all-MiniLM-L6-v2.
        cache: folder that keeps embeddings and scores for the next filtering of the same pairs; None: none are kept.
        seed: seed of the nearest-neighbor index.
        held_out: evaluation pairs, in any form that ``pairs_from_dataset`` takes; a pair that shares a prompt or
            response with them, or eight consecutive words of a prompt, is dropped.
        scores: scores of your own by name, higher is better: an array [N], in the order of the pairs, or a function of
            the checked pairs that returns one. They enter the importance as the others do and become columns.
        weights: weight of a score by its name (also margin, quality, diversity); your own have weight 1 by default.
        options: further fields of the section ``filter``: ``method``, ``minimum``, ``quality_scorers``, ``language``,
            ... ; ``embeddings`` may be an array, float32 unit vectors [N, D].

    Raises:
        ConfigError: an option or a rule is not known, or does not fit the others; all of them are named.
        DataError: the pairs or a score cannot be used, fewer than two pairs pass the rules, or none is kept.
        ModelError: the encoder or a scorer cannot be loaded.
    """
    scores, weights = scores or {}, weights or {}
    with python_words():
        check_names(scores, weights, options)
        built_in = {name: float(weight) for name, weight in weights.items() if name in BUILT_IN}
        settings = _settings(keep, rules, model, held_out, options | built_in)
    table = checked_table(pairs, NAME, carry=True)
    own = read_scores(scores, weights, table)
    other = [] if held_out is None else pairs_from_dataset(held_out).to_list()
    kept = TemporaryDirectory(prefix="filter-") if cache is None else nullcontext(str(cache))
    with kept as parts:
        folder = Path(parts) / fingerprint(table)[:16]
        with python_words(names={str(folder / VECTORS): "embeddings"}):
            report_in_sample(table, "filter_pairs")
            report_margins(table, "filter_pairs")
            if isinstance(vectors := options.get("embeddings"), np.ndarray):
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / VECTORS, vectors, allow_pickle=False)
                settings = settings.model_copy(update={"embeddings": str(folder / VECTORS)})
            try:
                found = filtering.filter_pairs(table, settings, folder, held_out=other, seed=seed, own=own)
            except filtering.TooFewPass as error:
                error.hint = "the attribute `broken` of this error has the rule and finding of each pair"
                raise
        return _result(found)


def _result(found: Filtered) -> FilterResult:
    rows: dict[bool, list[pa.Table]] = {True: [], False: []}
    for is_kept, part in filtered_rows(found):
        rows[is_kept].append(part)
    kept, dropped = (Dataset(pa.concat_tables(rows[is_kept])) for is_kept in (True, False))
    return FilterResult(kept, dropped, found.summary, found)


def _settings(
    keep: float | None, rules: Sequence[str] | None, model: Any, held_out: Any, options: dict[str, Any]
) -> FilterSection:
    """The section ``filter`` of the arguments.

    Raises:
        ConfigError: see ``filter_pairs``.
    """
    known = [name for name in FilterSection.model_fields if name not in TAKEN]
    problems = [
        f"{name}: not an argument{f'; give {TAKEN[name]}' if name in TAKEN else nearest(name, known)}"
        for name in options
        if name not in known
    ]
    wanted = [*(() if rules is None else [rules] if isinstance(rules, str) else rules)]
    problems += [f"rules: no rule {name!r}{nearest(str(name), list(RULES))}" for name in wanted if name not in RULES]
    if problems:
        raise ConfigError(listed(problems), code="filter-option", hint="see docs/filtering.md")
    applied = wanted or ([] if rules is None else [name for name in RULES if name != ON_REQUEST])
    fields = options | {
        "keep": keep,
        "skip": [name for name in RULES if name not in applied and name != ON_REQUEST],
        "drop_doubtful": ON_REQUEST in applied,
        "held_out": None if held_out is None else "held_out",
    }
    if model is not None:
        fields["embedding_model"] = str(model)
    if isinstance(options.get("embeddings"), np.ndarray):
        fields["embeddings"] = VECTORS
    try:
        settings = FilterSection.model_validate(fields)
    except ValidationError as error:
        found = [f"{item['loc'][0]}: found {item['input']!r}; {item['msg']}" for item in error.errors()]
        raise ConfigError(listed(found), code="filter-option", hint="see docs/filtering.md") from None
    check_options(settings)
    return settings
