"""Ids seen so far, the same in a file as in a dictionary; ids made from content."""

from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.config import PairsSection
from align.data import seen_ids
from align.data.pairs import load_pairs
from align.data.seen_ids import SeenIds, content_id
from align.data.streaming import stream_pairs
from align.errors import DataError
from tests.helpers.builders import rows
from tests.helpers.command_line import jsonl


@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=3), max_size=30), st.integers(0, 8))
def test_in_a_file_as_in_memory(tmp_path_factory: pytest.TempPathFactory, keys: list[str], few: int) -> None:
    """Whatever the keys and however few fit into memory; nothing is left behind."""
    file = tmp_path_factory.mktemp("seen") / "pairs.ids"
    expected: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seen_ids, "IN_MEMORY", few)
        seen = SeenIds(file)
        for number, key in enumerate(keys):
            assert seen.get(key) == expected.get(key)
            seen.add(key, number)
            expected.setdefault(key, number)
        assert (seen.many is not None) == (len(expected) > few)
        seen.close()
    assert not file.exists()


def test_more_pairs_than_ids_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Own ids, ids made of the content, repeated rows, an id that comes twice."""
    monkeypatch.setattr(seen_ids, "IN_MEMORY", 3)
    made = [{k: v for k, v in row.items() if k != "id"} for row in rows(6)]
    source = PairsSection(path=str(tmp_path / jsonl(tmp_path / "pairs.jsonl", made * 3)))
    found = stream_pairs(source, tmp_path / "pairs.arrow")
    assert found["id"][:] == load_pairs(source)["id"][:] and len(set(found["id"][:])) == 18
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.arrow", "pairs.jsonl"]
    twice = tmp_path / jsonl(tmp_path / "twice.jsonl", [row | {"id": f"p{k % 5}"} for k, row in enumerate(rows(6))])
    with pytest.raises(DataError, match=r"row 6:id: found 'p0', expected an id used once \(row 1 has it too\)"):
        stream_pairs(PairsSection(path=str(twice)), tmp_path / "twice.arrow")


def test_an_id_of_content_is_its_hash_and_unique() -> None:
    """Key order does not matter; a repetition gets a number; a value that JSON lacks is read as its text."""
    seen = SeenIds()
    first = content_id({"a": 1, "b": "é"}, seen)
    assert first == "72098b2a2208bcd8" and content_id({"b": "é", "a": 1}, seen) == first
    for expected in (first, f"{first}-2", f"{first}-3"):
        assert content_id({"b": "é", "a": 1}, seen) == expected
        seen.add(expected, 1)
    assert content_id([date(2024, 5, 1)], seen) == content_id(["2024-05-01"], seen)
