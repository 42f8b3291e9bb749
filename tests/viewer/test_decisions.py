"""Decisions: nothing that was acknowledged is lost, nothing is written twice, and two people's files are merged."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.errors import DataError, EnvironmentProblem
from align.viewer import decisions as module
from align.viewer.decisions import (
    EMPTY,
    LABELS,
    Decision,
    DecisionFile,
    Ledger,
    as_line,
    changed_state,
    checksum,
    parse,
    read_decisions,
)  # fmt: skip
from tests.viewer.helpers import client, decide, frame, write

COUNTED = iter(range(1_000_000))


def request(file: DecisionFile, pair: str, action: str, value: Any = None, **other: Any) -> dict[str, Any]:
    """A decision of somebody who has seen everything in the file."""
    base = [head["id"] for head in file.refresh().heads(pair)]
    return {"id": f"request-{next(COUNTED)}", "pair": pair, "content": "c", "action": action, "value": value,
            "base": base} | other  # fmt: skip


def make(file: DecisionFile, pair: str, action: str, value: Any = None) -> Decision:
    return file.append([request(file, pair, action, value)], "t")[0]


def test_states_follow_the_actions(tmp_path: Path) -> None:
    file = DecisionFile(tmp_path / "d.jsonl", "ann")
    expected = EMPTY
    for action, value in (("flip", None), ("note", "why"), ("edit", {"chosen": "x"}), ("keep", None),
                          ("edit", {"chosen": None, "prompt": "p"})):  # fmt: skip
        made = make(file, "a", action, value)
        assert made["before"] == expected
        expected = changed_state(expected, action, value)
        assert made["after"] == expected == file.ledger.outcome("a")[0]
    assert expected == {"label": "keep", "edits": {"prompt": "p"}, "note": "why"}
    assert file.ledger.outcome("b")[0] == EMPTY


def test_undo_goes_back_step_by_step_and_no_further(tmp_path: Path) -> None:
    file = DecisionFile(tmp_path / "d.jsonl", "ann")
    states = [EMPTY]
    for action in ("flip", "keep", "drop"):
        states.append(make(file, "a", action)["after"])
    for state in states[-2::-1]:
        assert make(file, "a", "undo")["after"] == state
    with pytest.raises(DataError, match="nothing to undo"):
        make(file, "a", "undo")
    make(file, "a", "tie")
    assert make(file, "a", "undo")["after"] == EMPTY
    assert len((tmp_path / "d.jsonl").read_text().splitlines()) == 8, "nothing is ever removed"


def test_the_same_id_counts_once_and_another_use_of_it_is_refused(tmp_path: Path) -> None:
    file = DecisionFile(tmp_path / "d.jsonl", "ann")
    one = request(file, "a", "flip")
    first = file.append([one], "t")
    assert file.append([one], "t") == first, "sent again after a lost answer"
    assert len((tmp_path / "d.jsonl").read_text().splitlines()) == 1
    with pytest.raises(DataError, match="another one already"):
        file.append([{**one, "pair": "b"}], "t")


def test_two_tabs_cannot_overwrite_each_other(tmp_path: Path) -> None:
    mine, other = (DecisionFile(tmp_path / "d.jsonl", who) for who in ("ann", "bob"))
    one, two = request(mine, "a", "flip"), request(other, "a", "keep")
    mine.append([one], "t")
    with pytest.raises(DataError, match=r"ann \(flip\)") as found:
        other.append([two], "t")
    assert found.value.code == "decision-stale"
    assert other.ledger.outcome("a")[0]["label"] == "flip", "the other tab has been told what there is"
    make(other, "a", "keep")
    assert mine.refresh().outcome("a")[0]["label"] == "keep"


def test_a_selection_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = DecisionFile(tmp_path / "d.jsonl", "ann")
    make(file, "b", "keep")
    stale = [request(file, "a", "flip"), request(file, "b", "flip", base=[]), request(file, "c", "flip")]
    with pytest.raises(DataError, match="pair b"):
        file.append(stale, "t")
    with pytest.raises(DataError, match="twice"):
        file.append([request(file, "a", "flip"), request(file, "a", "keep")], "t")
    assert file.refresh().decided() == ["b"]
    assert len(file.append([request(file, pair, "flip") for pair in "abc"], "t")) == 3


@pytest.mark.parametrize(
    ("action", "value"),
    [
        ("edit", None), ("edit", {}), ("edit", {"id": "x"}), ("edit", {"chosen": ""}), ("edit", {"chosen": " \n"}),
        ("edit", {"chosen": 3}), ("edit", {"chosen": []}), ("edit", {"chosen": [{"role": "user"}]}), ("note", None),
        ("note", "x" * 10_001), ("explode", None), ("", None),
    ],
)  # fmt: skip
def test_an_impossible_decision_is_refused(tmp_path: Path, action: str, value: Any) -> None:
    file = DecisionFile(tmp_path / "d.jsonl", "ann")
    with pytest.raises(DataError):
        make(file, "a", action, value)
    assert (tmp_path / "d.jsonl").read_bytes() == b""


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("when", ["at once", "half way", "at fsync"])
def test_a_full_disk_loses_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, when: str
) -> None:
    file = DecisionFile(tmp_path / "d.jsonl", "ann")
    make(file, "a", "flip")
    before = (tmp_path / "d.jsonl").read_bytes()
    write, calls = os.write, []

    def full(handle: int, content: bytes) -> int:
        calls.append(1)
        if when == "half way" and len(calls) == 1:
            return write(handle, content[: len(content) // 2])
        raise OSError(code, os.strerror(code))

    def no_sync(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "fsync", no_sync) if when == "at fsync" else patched.setattr(
            module.os, "write", full
        )
        with pytest.raises(EnvironmentProblem, match="NOT saved"):
            make(file, "b", "flip")
    assert (tmp_path / "d.jsonl").read_bytes() == before and file.refresh().decided() == ["a"]
    make(file, "b", "flip")
    assert DecisionFile(tmp_path / "d.jsonl", "x").refresh().decided() == ["a", "b"]


def test_a_real_limit_of_the_disk(tmp_path: Path) -> None:
    """The kernel refuses to let the file grow: what was acknowledged is whole, the rest was never acknowledged."""
    script = """
import resource, signal, sys
from pathlib import Path
from align.errors import EnvironmentProblem
from align.viewer.decisions import DecisionFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
file = DecisionFile(Path(sys.argv[1]), "ann")
done = 0
try:
    for k in range(100):
        file.append([{"id": f"decision-{k}", "pair": str(k), "content": "c", "action": "flip", "base": []}], "t")
        done += 1
except EnvironmentProblem as error:
    print(done, error.code)
"""
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "d.jsonl")], capture_output=True, text=True, check=True
    )
    done, code = found.stdout.split()
    assert code == "disk-full" and int(done) > 3
    lines = (tmp_path / "d.jsonl").read_bytes().split(b"\n")
    assert len(lines) == int(done) + 1 and lines[-1] == b"" and all(map(parse, lines[:-1]))


def test_a_killed_writer_loses_no_acknowledged_decision(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from align.viewer.decisions import DecisionFile
file = DecisionFile(Path(sys.argv[1]), sys.argv[2])
for k in range(100_000):
    name = f"{sys.argv[2]}-{k}-{k}"
    file.append([{"id": name, "pair": name, "content": "c", "action": "flip", "base": []}], "t")
    print(name, flush=True)
"""
    target = tmp_path / "d.jsonl"
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(target), who], stdout=subprocess.PIPE, text=True)
        for who in ("ann", "bob")
    ]
    told: list[str] = []
    for writer in writers:
        assert writer.stdout is not None
        told.append(writer.stdout.readline().strip())
    time.sleep(0.3)
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        told += writer.communicate()[0].split("\n")[:-1]
    found = read_decisions([target])
    assert len(told) > 4 and set(told) <= set(found.decisions) and found.broken <= 1
    assert len(found.decisions) <= len(told) + 2, "at most one of each was written and not yet told"


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    target = tmp_path / "d.jsonl"
    file = DecisionFile(target, "ann")
    make(file, "a", "flip")
    whole = target.read_bytes()
    for cut in (1, 2, 10, whole.index(b"}") + 1, len(whole) - 2):
        target.write_bytes(whole + whole[:cut])
        reader = DecisionFile(target, "bob")
        assert reader.refresh().decided() == ["a"] and reader.ledger.broken == 0, "it may be on its way"
        make(reader, "b", "keep")
        again = DecisionFile(target, "x").refresh()
        assert again.decided() == ["a", "b"] and again.broken == 1
        assert read_decisions([target]).decided() == ["a", "b"]


@pytest.mark.parametrize("change", [("flip", "keep"), ("ann", "eve"), ('"v": 1', '"v": 2')])
def test_a_line_that_somebody_changed_is_named(tmp_path: Path, change: tuple[str, str]) -> None:
    target = tmp_path / "d.jsonl"
    make(DecisionFile(target, "ann"), "a", "flip")
    target.write_text(target.read_text().replace(*change))
    with pytest.raises(DataError, match="row 1"):
        read_decisions([target])


def test_a_file_that_was_replaced_is_not_written(tmp_path: Path) -> None:
    target = tmp_path / "d.jsonl"
    file, other = DecisionFile(target, "ann"), DecisionFile(tmp_path / "other.jsonl", "bob")
    make(file, "a", "flip")
    for pair in "bcd":
        make(other, pair, "keep")
    content = other.path.read_bytes()
    other.path.replace(target)
    with pytest.raises(DataError, match="replaced"):
        file.append([request(other, "x", "keep")], "t")
    assert target.read_bytes() == content


def test_a_disk_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(handle: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(EnvironmentProblem, match="--decisions") as found:
        make(DecisionFile(tmp_path / "d.jsonl", "ann"), "a", "flip")
    assert found.value.code == "decision-lock"


def test_a_folder_on_a_network_is_read_but_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(DecisionFile(tmp_path / "decisions.jsonl", "ann"), "p3", "flip")
    monkeypatch.setattr(module, "shared_file_system", lambda path: "nfs4")
    with client(write(frame(10), tmp_path / "t.parquet"), scratch=tmp_path / "s") as asked:
        found = asked.get("/api/open").json()
        assert not found["can_decide"] and any("nfs4" in note for note in found["notes"])
        pair = asked.get("/api/pair", params={"row": 3}).json()
        assert pair["state"]["label"] == "flip"
        one = {"id": "12345678", "row": 0, "action": "keep", "base": []}
        answer = asked.post("/api/decide", json={"decisions": [one]}).json()["error"]
        assert answer["code"] == "decision-lock" and "NOT saved" in answer["message"]
    assert len((tmp_path / "decisions.jsonl").read_text().splitlines()) == 1


def test_the_kind_of_a_file_system_is_that_of_the_nearest_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from align.viewer import file_systems

    mounts = [("/", "ext4"), ("/home", "nfs4"), ("/home/local", "xfs"), ("/homer", "cifs")]
    parts = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in mounts]
    monkeypatch.setattr(file_systems.psutil, "disk_partitions", lambda all: parts)
    kinds = {"/tmp/x": None, "/home/ann/d.jsonl": "nfs4", "/home/local/d.jsonl": None, "/homer/x": "cifs"}
    assert {path: file_systems.shared_file_system(Path(path)) for path in kinds} == kinds


@st.composite
def histories(draw: st.DrawFn) -> list[list[Decision]]:
    """What two or three people decided about a few pairs, each for themselves."""
    people = []
    for who in ("ann", "bob", "eve")[: draw(st.integers(2, 3))]:
        ledger, made = Ledger(), []
        for number, (pair, action) in enumerate(
            draw(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([*LABELS, "undo"])), max_size=6))
        ):
            before, _ = ledger.outcome(pair)
            undone = ledger.last(pair) if action == "undo" else None
            if action == "undo" and undone is None:
                continue
            after = undone["before"] if undone else changed_state(before, action, None)
            one = {
                "v": 1, "id": f"{who}-{number:06}", "at": f"2026-01-01T00:00:{number:02}", "who": who, "table": "t",
                "pair": pair, "content": "c", "action": action, "before": before, "after": after,
                "base": [head["id"] for head in ledger.heads(pair)],
            } | ({"undoes": undone["id"]} if undone else {})  # fmt: skip
            one["crc"] = checksum(one)
            ledger.add(one)
            made.append(one)
        people.append(made)
    return people


@given(people=histories())
@settings(max_examples=80, deadline=None)
def test_merging_does_not_depend_on_order_and_lists_every_disagreement(
    tmp_path_factory: pytest.TempPathFactory, people: list[list[Decision]]
) -> None:
    folder = tmp_path_factory.mktemp("m")
    files = []
    for number, made in enumerate(people):
        files.append(folder / f"{number}.jsonl")
        files[-1].write_text("".join(map(as_line, made)))
    own = []
    for file in files:
        ledger = read_decisions([file])
        own.append({pair: ledger.outcome(pair)[0]["label"] for pair in "ab"})
    outcomes = []
    for order in permutations(files):
        merged = read_decisions([*order, order[0]])
        outcomes.append({pair: merged.outcome(pair)[0] for pair in "ab"})
        for pair in "ab":
            said = {labels[pair] for labels in own if labels[pair] is not None}
            state, conflict = merged.outcome(pair)
            assert bool(conflict) == (len(said) > 1)
            assert {head["after"]["label"] for head in conflict} == (said if conflict else set())
            assert conflict or state["label"] == next(iter(said), None)
    assert all(outcome == outcomes[0] for outcome in outcomes)


def test_a_conflict_is_settled_by_deciding_again(tmp_path: Path) -> None:
    for who, action in (("ann", "flip"), ("bob", "keep")):
        make(DecisionFile(tmp_path / f"{who}.jsonl", who), "p3", action)
    merged = tmp_path / "merged.jsonl"
    merged.write_bytes((tmp_path / "ann.jsonl").read_bytes() + (tmp_path / "bob.jsonl").read_bytes())
    file = write(frame(10), tmp_path / "t.parquet")
    with client(file, scratch=tmp_path / "s", decisions=merged, who="eve") as asked:
        conflicts = asked.get("/api/conflicts").json()
        assert [one["pair"] for one in conflicts] == ["p3"]
        assert {head["who"]: head["after"]["label"] for head in conflicts[0]["heads"]} == {"ann": "flip", "bob": "keep"}
        assert len(asked.get("/api/pair", params={"row": 3}).json()["conflict"]) == 2
        assert decide(asked, 3, "keep")["state"]["label"] == "keep"
        assert asked.get("/api/conflicts").json() == []
        names = [one["who"] for one in asked.get("/api/pair", params={"row": 3}).json()["history"]]
        assert sorted(names) == ["ann", "bob", "eve"] and names[-1] == "eve"
    assert json.loads(merged.read_text().splitlines()[-1])["who"] == "eve"
