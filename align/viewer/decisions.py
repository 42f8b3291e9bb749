"""Decisions of people about pairs: one JSON line each, only ever appended, on disk before they count as made.

A line holds ``v``, ``id``, ``at``, ``who``, ``table``, ``pair`` (id of the pair), ``content`` (digest of its texts when
it was judged), ``action``, ``before`` and ``after`` (states), ``base`` (ids of the decisions that it builds on),
``undoes`` (of an undo) and ``crc``. Decisions that nobody builds on are the heads of a pair; two heads with different
outcomes, which only a merge of two people's files can make, are a conflict.
"""

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.config.columns import TEXT
from align.errors import DataError, EnvironmentProblem
from align.io.disk import disk_problem
from align.viewer.file_systems import shared_file_system

FILE = "decisions.jsonl"
VERSION = 1
LABELS = ("keep", "drop", "flip", "tie")
ACTIONS = (*LABELS, "edit", "note", "undo")
Decision = dict[str, Any]
State = dict[str, Any]
EMPTY: State = {"label": None, "edits": {}, "note": ""}
LONGEST_NOTE = 10_000


def content_hash(values: Mapping[str, Any]) -> str:
    """Digest of the three texts of a pair, by which a later reader knows whether they are those that were judged."""
    text = json.dumps([values[name] for name in TEXT], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def checksum(decision: Mapping[str, Any]) -> str:
    """Digest of a line without its ``crc``; a torn or edited line has another."""
    rest = {key: value for key, value in decision.items() if key != "crc"}
    return hashlib.sha256(
        json.dumps(rest, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ).hexdigest()[:12]


def as_line(decision: Mapping[str, Any]) -> str:
    """A decision as a line of its file."""
    return json.dumps(decision, sort_keys=True) + "\n"


@dataclass(slots=True)
class Ledger:
    """Decisions by id, and what they come to for each pair."""

    decisions: dict[str, Decision] = field(default_factory=dict)
    by_pair: dict[str, list[str]] = field(default_factory=dict)
    broken: int = 0
    """Lines that are no decision, or not whole."""

    def add(self, decision: Decision) -> None:
        """Take a decision in; one that is there already changes nothing."""
        if decision["id"] not in self.decisions:
            self.decisions[decision["id"]] = decision
            self.by_pair.setdefault(decision["pair"], []).append(decision["id"])

    def heads(self, pair: str) -> list[Decision]:
        """The decisions of a pair that no other builds on."""
        own = [self.decisions[key] for key in self.by_pair.get(pair, ())]
        used = {base for decision in own for base in decision["base"]}
        return [decision for decision in own if decision["id"] not in used]

    def outcome(self, pair: str) -> tuple[State, list[Decision]]:
        """(state, conflicting heads): without a conflict the list is empty; in one, the state is empty."""
        heads = self.heads(pair)
        telling = [head for head in heads if head["after"]["label"] or head["after"]["edits"]]
        different = {json.dumps([h["after"]["label"], h["after"]["edits"]], sort_keys=True) for h in telling}
        if len(different) > 1:
            return EMPTY, telling
        notes = "\n".join(dict.fromkeys(head["after"]["note"] for head in heads if head["after"]["note"]))
        state = telling[0]["after"] if telling else EMPTY
        return {**state, "note": notes}, []

    def history(self, pair: str) -> list[Decision]:
        """All decisions about a pair, the oldest first."""
        return sorted((self.decisions[key] for key in list(self.by_pair.get(pair, ()))), key=lambda one: one["at"])

    def decided(self) -> list[str]:
        """Ids of the pairs whose state is not empty, or in conflict."""
        found = []
        for pair in list(self.by_pair):
            state, conflict = self.outcome(pair)
            if conflict or state != EMPTY:
                found.append(pair)
        return found

    def last(self, pair: str) -> Decision | None:
        """The decision that an undo would undo; None if nothing is left to undo."""
        heads = self.heads(pair)
        head = heads[0] if len(heads) == 1 else None
        while head is not None and head["action"] == "undo":
            bases = self.decisions[head["undoes"]]["base"]
            head = self.decisions.get(bases[0]) if len(bases) == 1 else None
        return head


def read_decisions(files: Sequence[Path]) -> Ledger:
    """The decisions of one or several files, each once, in any order of the files.

    Raises:
        DataError: a file is missing, or holds a line that is no decision, other than a last one that was torn.
    """
    ledger = Ledger()
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read ({error.strerror})", code="decision-file", hint="give a decisions.jsonl"
            ) from None
        lines = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            decision = parse(line)
            if decision is not None:
                ledger.add(decision)
            elif line.strip():
                ledger.broken += 1
                if not torn(line):
                    raise DataError(
                        f"{file}:row {number}: found {line[:60].decode('utf-8', 'replace')!r}, expected a decision as "
                        "`align view` writes it, unchanged since",
                        code="decision-file",
                        hint="undo what was changed in this line, or remove it",
                    )
    return ledger


def parse(line: bytes) -> Decision | None:
    """The decision of a line; None if it is none, or not whole."""
    try:
        found = json.loads(line)
        good = (
            isinstance(found, dict)
            and found["v"] == VERSION
            and found["crc"] == checksum(found)
            and found["action"] in ACTIONS
            and all(isinstance(found[key], str) for key in ("id", "pair", "who", "at", "content"))
            and isinstance(found["base"], list)
            and all(found[key].keys() == EMPTY.keys() for key in ("before", "after"))
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return found if good else None


def torn(line: bytes) -> bool:
    """Whether a line is the beginning of a decision whose end was never written."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return b'{"'.startswith(line[:2])
    return False


def changed_state(before: State, action: str, value: Any) -> State:
    """The state after an action.

    Args:
        before: the state.
        action: one of ``ACTIONS`` but undo.
        value: of a note: its text; of an edit: text -> its new content, None to take an edit back.

    Raises:
        DataError: the action cannot have this value.
    """
    if action in LABELS:
        return {**before, "label": action}
    if action == "note":
        if not isinstance(value, str) or len(value) > LONGEST_NOTE:
            raise DataError(f"note: expected text of at most {LONGEST_NOTE} characters", code="decision")
        return {**before, "note": value}
    if action != "edit" or not isinstance(value, dict) or not value or not set(value) <= set(TEXT):
        raise DataError(f"{action}: expected {', '.join(LABELS)}, edit or note, with what it needs", code="decision")
    for name, text in value.items():
        if text is not None and not _is_content(text):
            raise DataError(f"edit of {name}: expected text, or messages with role and content", code="decision")
    edits = {**before["edits"], **value}
    return {**before, "edits": {name: text for name, text in edits.items() if text is not None}}


def _is_content(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn for turn in value)
    )


class DecisionFile:
    """The decisions beside a table; safe for several tabs and several servers on one disk.

    Args:
        path: the file; it need not exist.
        who: name of the person who decides.
    """

    def __init__(self, path: Path, who: str) -> None:
        self.path, self.who = path, who
        self.ledger = Ledger()
        self._read = self._inode = 0
        self._lock = threading.Lock()

    def refresh(self) -> Ledger:
        """Read what others have appended."""
        with self._lock:
            if self.path.exists():
                with self.path.open("rb") as stream:
                    self._take_in(stream.fileno())
        return self.ledger

    def append(self, requests: Iterable[Mapping[str, Any]], table: str) -> list[Decision]:
        """Write decisions, all or none, and return them once they are on the disk.

        Args:
            requests: of each ``id``, ``pair``, ``content``, ``action``, ``value``, and ``base``: the ids of the heads
                that the person saw. An id that is in the file already counts as done.
            table: fingerprint of the table.

        Raises:
            DataError: somebody else has decided since (``decision-stale``); the action is impossible.
            EnvironmentProblem: the file cannot be written, or not locked.
        """
        with self._lock, self._opened() as handle:
            self._take_in(handle)
            known, made = self.ledger.decisions, []
            lines = b""
            for request in _each_pair_once(requests):
                done = known.get(request["id"])
                if done is not None and (done["pair"], done["action"]) != (request["pair"], request["action"]):
                    raise DataError(f"decision {request['id']}: it is another one already", code="decision")
                if done is not None:
                    made.append(done)
                    continue
                decision = self._decide(request, table)
                made.append(decision)
                lines += as_line(decision).encode()
            self._write(handle, lines)
            self._take_in(handle)
        return made

    def _decide(self, request: Mapping[str, Any], table: str) -> Decision:
        pair, action = request["pair"], request["action"]
        heads = self.ledger.heads(pair)
        if sorted(request["base"]) != sorted(head["id"] for head in heads):
            who = ", ".join(f"{head['who']} ({head['action']})" for head in heads) or "nobody"
            raise DataError(
                f"pair {pair}: somebody has decided since you opened it: {who}",
                code="decision-stale",
                hint="look at the pair again",
            )
        before, _ = self.ledger.outcome(pair)
        undone = self.ledger.last(pair) if action == "undo" else None
        if action == "undo" and undone is None:
            raise DataError(f"pair {pair}: nothing to undo", code="decision")
        after = undone["before"] if undone is not None else changed_state(before, action, request.get("value"))
        decision = {
            "v": VERSION, "id": request["id"], "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "who": self.who, "table": table, "pair": pair, "content": request["content"], "action": action,
            "before": before, "after": after, "base": [head["id"] for head in heads],
        }  # fmt: skip
        if undone is not None:
            decision["undoes"] = undone["id"]
        return {**decision, "crc": checksum(decision)}

    def check_place(self) -> None:
        """Check that the file lies on a disk of this machine, whose locks keep two writers apart.

        Raises:
            EnvironmentProblem: it is shared over a network.
        """
        kind = shared_file_system(self.path.resolve())
        if kind is not None:
            raise EnvironmentProblem(
                f"{self.path}: this folder is shared over a network ({kind}), where locks may not keep two people from "
                "overwriting each other; the decision is NOT saved",
                code="decision-lock",
                hint="give a file on a local disk: --decisions FILE",
            )

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The file open for appending and locked against other processes; a torn last line is closed first."""
        self.check_place()
        new = not self.path.exists()
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._refused(error) from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                raise EnvironmentProblem(
                    f"{self.path}: this disk cannot lock files ({error.strerror}), so two people could overwrite each "
                    "other",
                    code="decision-lock",
                    hint="give a file on a local disk: --decisions FILE",
                ) from None
            if new:
                _sync_folder(self.path.parent)
            yield handle
        finally:
            os.close(handle)

    def _take_in(self, handle: int) -> None:
        """Read the whole lines after those already read."""
        state = os.fstat(handle)
        size = state.st_size
        if size < self._read or (self._read and state.st_ino != self._inode):
            raise DataError(
                f"{self.path}: found another file of {size} bytes, expected the one of {self._read} bytes that was "
                "there, or one that has grown: it was replaced",
                code="decision-file",
                hint="put the file back, and start `align view` again",
            )
        self._inode = state.st_ino
        content = os.pread(handle, size - self._read, self._read)
        while (
            content and not content.endswith(b"\n") and len(more := os.pread(handle, size, self._read + len(content)))
        ):
            content += more
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.split(b"\n"):
            decision = parse(line)
            if decision is not None:
                self.ledger.add(decision)
            elif line.strip():
                self.ledger.broken += 1
        self._read += len(whole)

    def _write(self, handle: int, lines: bytes) -> None:
        """Append lines and wait for the disk; after a failure the file is as long as before."""
        if not lines:
            return
        size = os.fstat(handle).st_size
        closing = b"" if size == 0 or os.pread(handle, 1, size - 1) == b"\n" else b"\n"
        try:
            content = closing + lines
            while content:
                content = content[os.write(handle, content) :]
            os.fsync(handle)
        except OSError as error:
            os.ftruncate(handle, size)
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> EnvironmentProblem:
        problem = disk_problem(error, self.path.parent)
        what = problem.message if problem is not None else f"{self.path}: {error.strerror}"
        code = problem.code if problem is not None else "decision-file"
        return EnvironmentProblem(
            f"{what}; the decision is NOT saved", code=code,
            hint="free some space and decide again, or give another file: --decisions FILE",
        )  # fmt: skip


def _each_pair_once(requests: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found = list(requests)
    pairs = [one["pair"] for one in found]
    if len(set(pairs)) < len(pairs):
        raise DataError("decide: found a pair twice in one request, expected each once", code="decision")
    return found


def _sync_folder(folder: Path) -> None:
    """Make a new file's name survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
