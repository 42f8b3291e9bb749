"""Checked pairs: pairs whose label a person vouches for, put among the training pairs with a share of the weight."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset

from align.config import PairsSection
from align.config.columns import CHECKED, RESPONSES, WEIGHT
from align.data.overlap import trained_on
from align.data.pairs import load_pairs, with_columns
from align.data.text import plain, text_key
from align.errors import SHOWN, DataError
from align.io.arrow_tables import as_dataset
from align.io.console import log

KNOWN_SHARES = ((0, 0.0), (50, 0.1), (200, 0.25))
"""(checked pairs, their share of the total weight): measured at 50 and 200, interpolated linearly, constant beyond."""
PREFIX = "checked:"
"""Begins the id of a checked pair that another pair has."""


class Replaced(NamedTuple):
    """Training pairs without those that were checked."""

    pairs: Dataset
    same: int
    """Pairs that were checked and kept their label."""
    flipped: int
    """Pairs whose label the check turned around."""


def default_share(checked: int, others: int) -> float:
    """Share of the total weight that checked pairs get; never less than their share of the pairs.

    Args:
        checked: number of checked pairs.
        others: number of the other pairs.
    """
    counts, shares = zip(*KNOWN_SHARES, strict=True)
    return max(float(np.interp(checked, counts, shares)), checked / max(checked + others, 1))


def checked_weight(checked: int, total: float, share: float) -> float:
    """Weight of each checked pair such that all of them have ``share`` of the total weight.

    Args:
        checked: number of checked pairs, at least 1.
        total: sum of the other pairs' weights.
        share: in (0, 1).
    """
    return share / (1 - share) * total / checked


def load_checked(source: PairsSection) -> Dataset | None:
    """The checked pairs of a source; None if it names none.

    Raises:
        DataError: they cannot be read, have weights of their own, or one pair is there with both labels.
    """
    if source.checked is None:
        return None
    return valid_checked(load_pairs(source.checked.source, carry=True), f"pairs.checked: {source.checked.path}")


def valid_checked(checked: Dataset, where: str) -> Dataset:
    """Checked pairs, each once.

    Raises:
        DataError: they have weights of their own, or one pair is there with both labels.
    """
    if WEIGHT in checked.column_names:
        raise DataError(
            f"{where}: found a column `{WEIGHT}`, expected none: the share gives every checked pair the same weight",
            code="checked-pairs",
            hint="leave the column out, and set `share`",
        )
    keys = _keys(checked)
    first: dict[frozenset[bytes], int] = {}
    kept = []
    for row, (pair, chosen) in enumerate(keys):
        earlier = first.setdefault(pair, row)
        if keys[earlier][1] != chosen:
            raise DataError(
                f"{where}: the pairs {checked[earlier]['id']!r} and {checked[row]['id']!r} are the same with opposite "
                "labels, expected one of them",
                code="checked-pairs",
                hint="check this pair again, and leave it out if it cannot be decided",
            )
        if earlier == row:
            kept.append(row)
    if len(kept) < len(checked):
        log.warning("%s: %d of %d pairs are there twice and count once", where, len(checked) - len(kept), len(checked))
    return checked if len(kept) == len(checked) else checked.select(kept)


def without_checked(pairs: Dataset, checked: Dataset, where: str) -> Replaced:
    """Leave the checked pairs out of the others, which they replace; the log tells how many had another label.

    A pair is the same if its prompt and its two responses are, in either order, whatever their case, white space and
    Unicode form.

    Raises:
        DataError: every pair is a checked one.
    """
    known = dict(_keys(checked))
    found = [known.get(pair) == chosen if pair in known else None for pair, chosen in _keys(pairs)]
    left = [row for row, same in enumerate(found) if same is None]
    same, flipped = found.count(True), found.count(False)
    if not left:
        raise DataError(
            f"{where}: all {len(pairs)} training pairs are checked ones, expected others as well",
            code="checked-pairs",
            hint="train on the checked pairs: give their file as `pairs.path`",
        )
    if len(left) < len(pairs):
        log.warning(
            "%s: %d of %d training pairs are replaced by checked ones, of which %d have the other label", where,
            same + flipped, len(pairs), flipped,
        )  # fmt: skip
    return Replaced(pairs if len(left) == len(pairs) else pairs.select(left), same, flipped)


def without_held_out(checked: Dataset, held_out: Dataset, where: str) -> Dataset:
    """Checked pairs that are not held out; the log tells how many are.

    Raises:
        DataError: all are.
    """
    found = trained_on(checked, held_out)
    if not found.any():
        return checked
    names = ", ".join(repr(checked[int(row)]["id"]) for row in np.flatnonzero(found)[:SHOWN])
    if found.all():
        raise DataError(
            f"{where}: all {len(checked)} pairs, or their responses, are held out, the first {names}; expected others",
            code="checked-pairs",
            hint="take them out of the held-out pairs",
        )
    log.warning("%s: %d of %d pairs, or their responses, are held out and were left out: %s", where, found.sum(),
                len(checked), names)  # fmt: skip
    return checked.select(np.flatnonzero(~found))


def add_checked(pairs: Dataset, checked: Dataset, share: float | None, where: str) -> Dataset:
    """The pairs followed by the checked ones, with the columns ``weight`` and ``checked``.

    Args:
        pairs: training pairs without the checked ones; their weights stay as they are.
        checked: from ``load_checked``. Columns that ``pairs`` lack are left out, others are filled with gaps.
        share: of the total weight that the checked pairs get; None: ``default_share``.
        where: name of the checked pairs, for messages.

    Raises:
        DataError: the two tables do not go together, or the other pairs have no weight.
    """
    weights = np.array(pairs[WEIGHT] if WEIGHT in pairs.column_names else np.ones(len(pairs)), dtype=np.float64)
    total = float(weights.sum())
    if not np.isfinite(total) or total <= 0:
        raise DataError(
            f"{where}: the weights of the {len(pairs)} other pairs sum to {total:g}, expected a number above 0",
            code="checked-pairs",
            hint="give every pair a weight, and some of them one above 0",
        )
    part = default_share(len(checked), len(pairs)) if share is None else share
    weight = checked_weight(len(checked), total, part)
    taken = set(pairs["id"])
    ids = [f"{PREFIX}{name}" if name in taken else name for name in checked["id"]]
    log.info("%s: %d checked pairs among %d others, with %.3g of the total weight (%.3g each)", where, len(checked),
             len(pairs), part, weight)  # fmt: skip
    own = with_columns(pairs, {WEIGHT: weights, CHECKED: np.zeros(len(pairs), dtype=bool)})
    new = with_columns(
        checked.remove_columns("id").add_column("id", ids),
        {WEIGHT: np.full(len(checked), weight), CHECKED: np.ones(len(checked), dtype=bool)},
    )
    return _stacked(own, new, where)


def checked_share(pairs: Dataset) -> float | None:
    """Share of the total weight that the checked pairs of a table have; None without any."""
    flags = checked_rows(pairs)
    if not flags.any():
        return None
    weights = np.asarray(pairs[WEIGHT], dtype=np.float64)
    return float(weights[flags].sum() / weights.sum())


def checked_rows(pairs: Dataset) -> np.ndarray:
    """Which pairs of a table are checked ones, bool [N]."""
    if CHECKED not in pairs.column_names:
        return np.zeros(len(pairs), dtype=bool)
    return np.array([value is True for value in pairs[CHECKED]], dtype=bool)


def divided(pairs: Dataset) -> tuple[Dataset, Dataset]:
    """(the other pairs, the checked ones) of a table."""
    flags = checked_rows(pairs)
    return pairs.select(np.flatnonzero(~flags)), pairs.select(np.flatnonzero(flags))


def together(others: Dataset, checked: Dataset, share: float, where: str) -> Dataset:
    """Put the checked pairs of a table back among those of its other pairs that a filter kept, with their share."""
    bare = checked.remove_columns([name for name in (WEIGHT, CHECKED) if name in checked.column_names])
    return add_checked(others, bare, share, where)


def _stacked(pairs: Dataset, checked: Dataset, where: str) -> Dataset:
    first, second = (table.with_format("arrow")[:].combine_chunks() for table in (pairs, checked))
    columns = []
    for field in first.schema:
        try:
            if field.name in second.column_names:
                columns.append(second[field.name].cast(field.type))
            else:
                columns.append(pa.nulls(len(second), field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, KeyError):
            raise DataError(
                f"{where}: column {field.name!r} holds {second[field.name].type}, and {field.type} in the training "
                "pairs; expected the same",
                code="checked-pairs",
                hint="write both files in one form: texts in both, or messages in both",
            ) from None
    made = pa.table(columns, schema=first.schema.remove_metadata())
    return as_dataset(pa.concat_tables([first.replace_schema_metadata(None), made]))


def _keys(pairs: Dataset) -> list[tuple[frozenset[bytes], bytes]]:
    """(key of the pair whichever label it has, key of its chosen response) of every pair."""
    return [_key(row) for row in pairs.select_columns(["prompt", *RESPONSES])]


def _key(row: Mapping[str, Any]) -> tuple[frozenset[bytes], bytes]:
    prompt = text_key(plain(row["prompt"]))
    chosen, rejected = (prompt + text_key(plain(row[name])) for name in RESPONSES)
    return frozenset({chosen, rejected}), chosen
