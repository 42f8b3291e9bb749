"""A pair table with the decisions of people carried out: flips, edits, ties, dropped pairs; with their provenance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from align.config.columns import RESPONSES, TEXT, VOTES
from align.data.messages import JSON_MESSAGES, text_array, without_nulls
from align.errors import DataError, listed
from align.viewer.decisions import Ledger, State, content_hash
from align.viewer.text_cache import cell_values

PROVENANCE = ("decision", "decided_by", "decided_at", "decision_id")
"""Columns that say of each pair what a person decided; empty where nobody did."""
SIGNED = ("margin", "teacher_margin")
"""Columns whose sign is that of the label."""
MADE_FROM_LABEL = ("importance", "doubtful", "trust", "label_share")
"""Columns that were computed from the label as it was; empty after a flip or a tie."""
MADE_FROM_TEXTS = (
    "reward_chosen", "reward_rejected", "margin", "margin_std", "margin_source", "ood", "teacher_margin", "quality",
    "diversity", "chosen_finish_reason", "rejected_finish_reason", "ref_chosen_logps", "ref_rejected_logps",
    *MADE_FROM_LABEL,
)  # fmt: skip
"""Columns that were computed from the texts as they were; empty after an edit."""
PREFIXES_FROM_LABEL = ("influence", "adamw")
PREFIXES_FROM_TEXTS = ("quality_", *PREFIXES_FROM_LABEL)
"""Beginnings of the names of further such columns."""
TIES_OUT = "tie, left out: the table has no votes to say it with"


@dataclass(slots=True)
class Corrected:
    """The result of ``correct``."""

    pairs: Dataset
    counts: dict[str, int] = field(default_factory=dict)
    """Kind of change -> pairs."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Id of a pair that is no longer in the table -> why."""
    conflicts: list[dict[str, Any]] = field(default_factory=list)
    """Pairs on which people disagree; they stay as they are."""
    changed: list[str] = field(default_factory=list)
    """Ids of pairs that were judged with other texts than they have; they stay as they are."""
    missing: list[str] = field(default_factory=list)
    """Ids that were judged and that the table does not have."""


def correct(pairs: Dataset, ledger: Ledger, *, skip_changed: bool = False) -> Corrected:
    """Carry out decisions.

    A flip turns both responses around and every column that speaks of one of them or has the label's sign; a person's
    vote takes the place of those of raters. What was computed from a label or from texts that are no longer there
    becomes empty.

    Args:
        pairs: the table that the decisions were made about, with its further columns.
        ledger: the decisions.
        skip_changed: leave pairs as they are whose texts are not those that were judged, instead of refusing.

    Raises:
        DataError: texts have changed since they were judged, an edit leaves two equal responses, or a pair of a bag is
            flipped.
    """
    places = {key: place for place, key in enumerate(pairs["id"])}
    found = Corrected(pairs)
    found.missing = [key for key in ledger.by_pair if key not in places]
    judged = [key for key in ledger.by_pair if key in places]
    contents = _contents(pairs, [places[key] for key in judged])
    states: dict[str, State] = {}
    for key, content in zip(judged, contents, strict=True):
        state, conflict = ledger.outcome(key)
        heads = ledger.heads(key)
        if conflict:
            found.conflicts.append(
                {"pair": key, "heads": [{name: head[name] for name in ("who", "at", "after")} for head in conflict]}
            )
        elif state["label"] or state["edits"]:
            if any(head["content"] != content for head in heads):
                found.changed.append(key)
            else:
                states[key] = state
    if found.changed and not skip_changed:
        raise DataError(
            f"{len(found.changed)} pairs have other texts than when they were judged:\n{listed(found.changed)}",
            code="decision-other-texts",
            hint="give the table that was judged, or leave these pairs as they are: --skip-changed",
        )
    return _carried_out(found, ledger, states, places)


def _carried_out(found: Corrected, ledger: Ledger, states: Mapping[str, State], places: Mapping[str, int]) -> Corrected:
    pairs = found.pairs
    names = set(pairs.column_names)
    taken = pairs.select([places[key] for key in states]).with_format("arrow")[:]
    cells = {name: _cells(taken[name].combine_chunks(), name) for name in taken.column_names}
    rows = {key: {name: values[place] for name, values in cells.items()} for place, key in enumerate(states)}
    keep: dict[str, dict[str, Any]] = {}
    for key, state in states.items():
        row = _edited(key, rows[key], state["edits"])
        kind = state["label"] or "edit"
        if kind == "drop" or (kind == "tie" and not ({*VOTES} <= names or "vote_share" in names)):
            found.left_out[key] = "dropped" if kind == "drop" else TIES_OUT
        else:
            keep[key] = _labeled(key, row, kind)
        found.counts[kind] = found.counts.get(kind, 0) + 1
        if state["edits"] and kind != "edit":
            found.counts["edit"] = found.counts.get("edit", 0) + 1
    found.pairs = _with_provenance(_replaced(pairs, places, keep, found.left_out), ledger, states)
    return found


def _cells(column: pa.Array, name: str) -> list[Any]:
    """The values of a column; texts and messages as a training reads them."""
    return cell_values(column) if name in TEXT else column.to_pylist()


def _contents(pairs: Dataset, rows: Sequence[int]) -> list[str]:
    """Digest of the texts of each of these rows, as the viewer computes it."""
    if not rows:
        return []
    taken = pairs.select(rows).with_format("arrow")[:]
    columns = [cell_values(taken[name].combine_chunks()) for name in TEXT]
    cells = zip(*columns, strict=True)
    return [
        content_hash({name: "" if cell is None else cell for name, cell in zip(TEXT, row, strict=True)})
        for row in cells
    ]


def _edited(key: str, row: dict[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    if not edits:
        return row
    row = {**row, **edits}
    if row["chosen"] == row["rejected"]:
        raise DataError(
            f"pair {key}: its edits leave two equal responses", code="decision", hint="drop it in `align view`"
        )
    gone = {name for name in row if name in MADE_FROM_TEXTS or name.startswith(PREFIXES_FROM_TEXTS)}
    return {name: None if name in gone else value for name, value in row.items()}


def _labeled(key: str, row: dict[str, Any], kind: str) -> dict[str, Any]:
    """The row after keep, edit, flip or tie."""
    if kind in ("keep", "edit"):
        return row
    if row.get("bag") is not None:
        raise DataError(
            f"pair {key}: it is one of bag {row['bag']!r}, of which only the share of votes is known, and a {kind} "
            "would change it",
            code="decision",
            hint="drop the pair instead",
        )
    made = {name: row[_other_side(name, row)] if kind == "flip" else value for name, value in row.items()}
    if kind == "flip":
        made |= {name: -row[name] for name in SIGNED if row.get(name) is not None}
    votes = {VOTES[0]: float(kind == "flip"), VOTES[1]: 0.0, VOTES[2]: float(kind == "tie")}
    votes["vote_share"] = 1.0 if kind == "flip" else 0.5
    made |= {name: value for name, value in votes.items() if name in row}
    gone = {name for name in made if name in MADE_FROM_LABEL or name.startswith(PREFIXES_FROM_LABEL)}
    return {name: None if name in gone else value for name, value in made.items()}


def _other_side(name: str, row: Mapping[str, Any]) -> str:
    """The column that says of the other response what this one says of its own."""
    for own, other in (RESPONSES, RESPONSES[::-1]):
        parts = name.split("_")
        if own in parts:
            turned = "_".join(other if part == own else part for part in parts)
            return turned if turned in row else name
    return name


def _replaced(
    pairs: Dataset, places: Mapping[str, int], rows: Mapping[str, dict[str, Any]], gone: Mapping[str, str]
) -> Dataset:
    """The table with ``rows`` in the places of their pairs, without those in ``gone``."""
    order = list(range(len(pairs)))
    made = pairs
    if rows:
        chosen = [places[key] for key in rows]
        pairs = _wide_enough(pairs, list(rows.values()))
        before = pairs.select(chosen).with_format("arrow")[:].combine_chunks()
        columns = {}
        for one in before.schema:
            old = before[one.name].combine_chunks()
            new = [row[one.name] for row in rows.values()]
            columns[one.name] = old if _cells(old, one.name) == new else _array(one, new)
        changed = Dataset(pa.table(columns, schema=before.schema))
        changed = changed if changed.features == pairs.features else changed.cast(pairs.features)
        for number, place in enumerate(chosen):
            order[place] = len(pairs) + number
        made = concatenate_datasets([pairs, changed])
    out = {places[key] for key in gone}
    return made.select([row for place, row in enumerate(order) if place not in out])


def _wide_enough(pairs: Dataset, rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """The table with columns of messages that can hold the corrected ones: a tool call may change sides by a flip."""
    table = pairs.with_format("arrow")[:]
    narrow = [name for name in TEXT if _array_or_none(table.schema.field(name), [row[name] for row in rows]) is None]
    for name in narrow:
        values = [without_nulls(value) for value in _cells(table[name].combine_chunks(), name)]
        table = table.set_column(table.column_names.index(name), name, text_array(values, JSON_MESSAGES))
    return Dataset(table.replace_schema_metadata(None)) if narrow else pairs


def _array_or_none(column: pa.Field, values: list[Any]) -> pa.Array | None:
    """The values of a column of texts, of its type; None if it cannot hold them unchanged."""
    try:
        made = text_array(values, column.type)
    except (pa.ArrowException, TypeError, ValueError):
        return None
    return made if cell_values(made) == [without_nulls(value) for value in values] else None


def _array(column: pa.Field, values: list[Any]) -> pa.Array:
    """The values of a column, of its type.

    Raises:
        DataError: it cannot hold one of them.
    """
    try:
        made = _array_or_none(column, values) if column.name in TEXT else pa.array(values, column.type)
    except (pa.ArrowException, TypeError, ValueError):
        made = None
    if made is None:
        raise DataError(
            f"column {column.name}: its type {column.type} cannot hold a corrected value", code="decision",
            hint="write the table again with a wider type",
        )  # fmt: skip
    return made


def _with_provenance(pairs: Dataset, ledger: Ledger, states: Mapping[str, State]) -> Dataset:
    """The table with the columns ``PROVENANCE``; of an earlier correction it keeps what this one says nothing about."""
    found: dict[str, list[str | None]] = {
        name: list(pairs[name]) if name in pairs.column_names else [None] * len(pairs) for name in PROVENANCE
    }
    for place, key in enumerate(pairs["id"]):
        if key in states:
            head = ledger.heads(key)[-1]
            own = (states[key]["label"] or "edit", head["who"], head["at"], head["id"])
            for name, value in zip(PROVENANCE, own, strict=True):
                found[name][place] = value
    rest = pairs.remove_columns([name for name in PROVENANCE if name in pairs.column_names])
    table = rest.with_format("arrow")[:]
    for name, values in found.items():
        table = table.append_column(name, pa.array(values, pa.string()))
    return Dataset(table.replace_schema_metadata(None))
