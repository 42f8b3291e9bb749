"""What one `align view` has open: tables, their texts and decisions, and runs."""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from align.config.columns import RESPONSES
from align.data.text import count_words
from align.errors import AlignError, DataError
from align.viewer.answers import Answers
from align.viewer.decisions import EMPTY, FILE, LABELS, Decision, DecisionFile, State, content_hash
from align.viewer.queues import estimates, queue_order
from align.viewer.sources import SourceTable, run_tables
from align.viewer.table import PairTable, quoted
from align.viewer.texts import Texts
from align.viewer.views import Views

MOST_DECISIONS = 500
"""Decisions of one request."""
HISTORY = ("id", "at", "who", "action", "before", "after", "undoes")


@dataclass(frozen=True, slots=True)
class Options:
    """How the viewer was started."""

    who: str
    decisions: Path | None = None
    """File of the decisions; None: decisions.jsonl beside each table."""
    text_cache: bool = True


class OpenTable:
    """One table with its texts, views and decisions.

    Args:
        source: its files.
        scratch: folder that goes with the viewer.
        options: how the viewer was started.
    """

    def __init__(self, source: SourceTable, scratch: Path, options: Options) -> None:
        self.source = source
        self.table = PairTable(source, scratch)
        self.texts = Texts(self.table, scratch, cache=options.text_cache)
        self.file = DecisionFile(options.decisions or source.folder / FILE, options.who)
        self.views = Views(self.table, self.texts.search, self._decided, self.queue)
        self._queues: dict[str, np.ndarray] = {}
        self._contents: dict[int, str] = {}
        self.notes = list(self._place_notes())
        """What the page says about deciding."""

    @cached_property
    def fingerprint(self) -> str:
        """Names, sizes and times of the files, digested: which table a decision was made on."""
        return hashlib.sha256(repr((self.source.name, self.table.stamp)).encode()).hexdigest()[:16]

    @property
    def can_decide(self) -> bool:
        """Whether decisions about this table can be kept."""
        return self.table.unique_ids and not self.notes

    def state(self) -> dict[str, Any]:
        """What changes while nobody asks: the text cache, decisions of others, the file of the table."""
        found: dict[str, Any] = {"cache": self.texts.state(), "problem": ""}
        try:
            ledger = self.file.refresh()
        except AlignError as error:
            ledger, found["problem"] = self.file.ledger, error.message
        changed = not self.table.is_unchanged()
        return found | {"decisions": len(ledger.decisions), "broken": ledger.broken, "changed": changed}

    def queue(self, name: str) -> np.ndarray:
        """All rows in the order of a queue."""
        if name not in self._queues:
            self._queues[name] = queue_order(self.table, name)
        return self._queues[name]

    def cell(self, row: int, name: str) -> Any:
        """One loaded value.

        Raises:
            DataError: there is no such row.
        """
        with self.table.query() as cursor:
            found = cursor.execute(f"select {quoted(name)} from pairs where rowid = ?", [row]).fetchone()
        if found is None:
            raise DataError(f"row {row}: the table has {self.table.count} rows", code="view-query")
        return found[0]

    def pair(self, row: int) -> dict[str, Any]:
        """One pair whole: texts, numbers, present decision."""
        key = self.cell(row, "id")
        found = self.texts.pair(row)
        cells = dict(zip(self.table.loaded, self.views.cells([row])[0], strict=True))
        content = content_hash(found["values"])
        ledger = self.file.refresh()
        return {
            "row": row,
            "id": key,
            **found,
            "cells": cells,
            "content": content,
            **self.decision(key, content),
            "numbers": self.numbers(cells),
            "history": [{name: one.get(name) for name in HISTORY} for one in ledger.history(key or "")],
            "words": {name: count_words(found["values"][name]) for name in RESPONSES},
        }

    def numbers(self, cells: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every loaded column of a pair but its id: value, meaning, and the share of the other pairs below it."""
        ranked = [name for name in self.table.numbers() if isinstance(cells[name], float)]
        ranks = self.table.ranks({name: cells[name] for name in ranked})
        return [
            {
                "name": name, "value": cells[name], "meaning": self.table.columns[name].meaning,
                "kind": self.table.columns[name].kind, "rank": ranks.get(name),
            }
            for name in self.table.loaded
            if name != "id"
        ]  # fmt: skip

    def decision(self, key: str | None, content: str | None = None) -> dict[str, Any]:
        """State, heads, conflict of a pair, and whether the decision was made on other texts than ``content``."""
        ledger = self.file.ledger
        heads = ledger.heads(key or "")
        state, conflict = ledger.outcome(key or "")
        return {
            "state": state,
            "heads": [head["id"] for head in heads],
            "by": [{name: head[name] for name in ("who", "at", "action")} for head in heads],
            "conflict": [{"who": head["who"], "after": head["after"]} for head in conflict],
            "other_texts": content is not None and any(head["content"] != content for head in heads),
        }

    def decide(self, requests: Sequence[Mapping[str, Any]]) -> list[Decision]:
        """Write decisions for rows of this table.

        Raises:
            DataError: the request is malformed, the pair has no id of its own, or somebody decided meanwhile.
            EnvironmentProblem: the disk does not take them.
        """
        if not self.table.unique_ids:
            raise DataError(
                f"{self.source.name}: some pairs share an id, so a decision could mean either", code="decision",
                hint="write the table again without the column `id`, or with ids of its own: `align data check`",
            )  # fmt: skip
        if not requests or len(requests) > MOST_DECISIONS:
            raise DataError(f"decide: found {len(requests)} decisions, expected 1 to {MOST_DECISIONS}", code="decision")
        made = []
        for one in requests:
            if type(one.get("row")) is not int or not isinstance(one.get("id"), str) or not 8 <= len(one["id"]) <= 64:
                raise DataError("decide: expected row, id and base of each decision", code="decision")
            base = one.get("base")
            if not isinstance(base, list) or not all(isinstance(head, str) for head in base):
                raise DataError("decide: base: expected the ids of the decisions that were shown", code="decision")
            key = self.cell(one["row"], "id")
            values = self.texts.values(one["row"])
            if one.get("action") == "edit":
                check_edit(one.get("value"), values)
            made.append(
                {
                    "id": one["id"], "pair": key, "content": content_hash(values), "action": str(one.get("action")),
                    "value": one.get("value"), "base": base,
                }
            )  # fmt: skip
        self.table.check_unchanged()
        return self.file.append(made, self.fingerprint)

    def estimates(self) -> dict[str, Any]:
        """What the judged pairs say; see ``queues.estimates``."""
        judged = self.judged()
        found = {row: state["label"] for row, state in judged.items() if state["label"] in LABELS}
        order = self.queue("random") if found else np.zeros(0, dtype=np.int32)
        return {**estimates(self.table, order, found), "other_texts": len(self._judged_rows()) - len(judged)}

    def judged(self) -> dict[int, State]:
        """Row -> state of every pair of this table that has one, made on the texts that the pair has now."""
        return {row: state for row, (state, content) in self._judged_rows().items() if content == self._content(row)}

    def _judged_rows(self) -> dict[int, tuple[State, str]]:
        ledger = self.file.refresh()
        keys = list(ledger.by_pair)
        with self.table.query() as cursor:
            cursor.register("judged", pa.table({"key": pa.array(keys, pa.string())}))
            rows = cursor.execute(
                'select p."id", p.rowid from pairs p where p."id" in (select key from judged)'
            ).fetchall()
        found = {}
        for key, row in rows:
            state, conflict = ledger.outcome(key)
            if not conflict and state != EMPTY:
                found[row] = (state, ledger.heads(key)[0]["content"])
        return found

    def _content(self, row: int) -> str:
        if row not in self._contents:
            self._contents[row] = content_hash(self.texts.values(row))
        return self._contents[row]

    def _place_notes(self) -> Iterator[str]:
        try:
            self.file.check_place()
        except AlignError as error:
            yield f"decisions are refused. {error.message}. {error.hint}"

    def conflicts(self) -> list[dict[str, Any]]:
        """Pairs on which people disagree."""
        ledger = self.file.refresh()
        found = ((key, ledger.outcome(key)[1]) for key in ledger.by_pair)
        return [
            {"pair": key, "heads": [{"who": head["who"], "at": head["at"], "after": head["after"]} for head in heads]}
            for key, heads in found
            if heads
        ]

    def close(self) -> None:
        """Free memory and stop what runs."""
        self.texts.close()
        self.table.close()

    def _decided(self) -> list[str]:
        return self.file.refresh().decided()


class Session:
    """All tables and runs of the viewer; a table is opened when it is first asked for.

    Args:
        tables: what can be shown.
        runs: folders of runs to follow.
        scratch: folder that goes with the viewer.
        options: how it was started.
    """

    def __init__(self, tables: Sequence[SourceTable], runs: Sequence[Path], scratch: Path, options: Options) -> None:
        self.tables, self.runs, self.options = list(tables), list(runs), options
        self._scratch = scratch
        self.answers = Answers(tuple(runs))
        self._open: dict[int, OpenTable] = {}
        self._lock = threading.Lock()

    def place(self, given: str) -> int:
        """The number of a table as an address gives it.

        Raises:
            DataError: there is none of it.
        """
        if not self.tables:
            raise DataError(
                f"{', '.join(map(str, self.runs))}: no stage has written pairs yet", code="view-query",
                hint="reload the page once a stage has ended",
            )  # fmt: skip
        if given.isascii() and given.isdigit() and len(given) < 9 and int(given) < len(self.tables):
            return int(given)
        raise DataError(
            f"table: found {given[:40]!r}, expected 0 to {len(self.tables) - 1}", code="view-query",
            hint="reload the page",
        )  # fmt: skip

    def asked(self, given: str) -> OpenTable:
        """The table that an address names."""
        return self.table(self.place(given))

    def table(self, number: int) -> OpenTable:
        """An open table by its number.

        Raises:
            DataError: there is none, or it cannot be read.
        """
        if not 0 <= number < len(self.tables):
            raise DataError(f"table {number}: there are {len(self.tables)}", code="view-query", hint="reload the page")
        with self._lock:
            if number not in self._open:
                self._open[number] = OpenTable(self.tables[number], self._scratch, self.options)
            return self._open[number]

    def look_again(self) -> None:
        """Take in the tables that the stages of the runs have written since; earlier tables keep their numbers."""
        with self._lock:
            known = {one.name for one in self.tables}
            self.tables += [one for run in self.runs for one in run_tables(run) if one.name not in known]

    def reopen(self, number: int) -> OpenTable:
        """Read a table again after its file has changed."""
        with self._lock:
            earlier = self._open.pop(number, None)
        if earlier is not None:
            earlier.close()
        return self.table(number)

    def close(self) -> None:
        """Close all tables."""
        for one in self._open.values():
            one.close()


def check_edit(value: Any, texts: Mapping[str, Any]) -> None:
    """Check that an edit leaves a pair: its texts of the kind they were, and two different responses.

    Raises:
        DataError: it does not.
    """
    if not isinstance(value, dict):
        return
    after = {**texts, **{name: text for name, text in value.items() if text is not None}}
    for name in value.keys() & texts.keys():
        if isinstance(after[name], str) != isinstance(texts[name], str):
            kind = "text" if isinstance(texts[name], str) else "messages"
            raise DataError(f"edit of {name}: expected {kind}, as in the table", code="decision")
    if after["chosen"] == after["rejected"]:
        raise DataError(
            "edit: both responses would be the same", code="decision", hint="drop the pair, or call it a tie"
        )
