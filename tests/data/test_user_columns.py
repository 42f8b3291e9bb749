"""Columns that the program does not read: unchanged in the tables that it writes, whatever they hold."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.commands.score import score_pairs
from align.config import PairsSection
from align.data.pairs import check_pairs, fingerprint, load_pairs, read_pairs, write_pairs
from align.data.streaming import stream_pairs
from tests.helpers.builders import bert_reward, rows

TURNS = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi", "weight": None}]
OWN: dict[str, list[Any]] = {
    "source": ["web", None, "book"],
    "score_chosen": [5, 4.5, None],
    "flag": [True, False, None],
    "meta": [{"a": 1}, {"b": [None]}, {}],
    "turns": [TURNS, TURNS[:1], []],
    "mixed": ["x", 3, None],
    "as_text": ['[{"role": "user", "content": "hello"}]', "plain", ""],
    "empty": [None, None, None],
}


def given(count: int = 3) -> list[dict[str, Any]]:
    texts = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows(count)]
    return [row | {name: values[k % 3] for name, values in OWN.items()} for k, row in enumerate(texts)]


def own(table: Any) -> dict[str, list[Any]]:
    return {name: table[name][:] for name in OWN}


@pytest.mark.parametrize("batch", [1, 2, 4096])
def test_they_are_carried_unchanged(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded and streamed, whatever rows come first; written and read again, objects are JSON texts."""
    monkeypatch.setattr("align.data.streaming.BATCH", batch)
    monkeypatch.setattr("align.data.pair_chunks.SPOOLED", batch)
    for name, table in (("there", given()), ("back", given()[::-1])):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in table))
        source = PairsSection(path=str(file))
        loaded = load_pairs(source, carry=True)
        assert own(loaded) == {key: [row[key] for row in table] for key in OWN}
        streamed = stream_pairs(source, tmp_path / f"{name}.arrow", carry=True)
        assert streamed.to_list() == loaded.to_list() and len(fingerprint(loaded)) == 64
        write_pairs(loaded, tmp_path / name)
        again = read_pairs(tmp_path / name)
        assert again["source"][:] == [row["source"] for row in table]
        assert load_pairs(source).column_names == ["id", "prompt", "chosen", "rejected"]


def test_the_types_of_a_parquet_file_stay(tmp_path: Path) -> None:
    """A struct, whose keys all rows have, is no JSON text; dates and decimals are what they were."""
    day = datetime.date(2026, 11, 30)
    table = [row | {"day": day, "meta": {"a": None, "b": k}, "n": k} for k, row in enumerate(rows(3))]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "pairs.parquet")
    loaded = load_pairs(PairsSection(path=str(tmp_path / "pairs.parquet")), carry=True)
    assert loaded["day"][:] == [day] * 3 and loaded["meta"][:] == [row["meta"] for row in table]
    write_pairs(loaded, tmp_path / "out")
    written = pq.read_table(tmp_path / "out" / "pairs.parquet").schema
    assert written.field("day").type == pa.date32() and pa.types.is_struct(written.field("meta").type)
    assert len(fingerprint(loaded)) == 64


def test_scored_pairs_keep_them(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given(5)))
    score_pairs(
        PairsSection(path=str(file)),
        str(bert_reward(tmp_path / "m")),
        tmp_path / "out",
        batch_tokens=512,
        max_length=64,
    )
    scored = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert [row["source"] for row in scored] == [row["source"] for row in given(5)]
    assert [row["meta"] and json.loads(row["meta"]) for row in scored] == [row["meta"] for row in given(5)]
    assert all(isinstance(row["margin"], float) for row in scored)


def test_columns_that_a_stage_writes_are_named_unless_a_filter_wrote_them(tmp_path: Path) -> None:
    """A user's own ``quality`` is replaced by the filter's."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row | {"quality": 3, "stars": 5}) + "\n" for row in given()))
    assert {"quality", "stars"} <= set(check_pairs(PairsSection(path=str(file))).unused)
    assert "quality" not in load_pairs(PairsSection(path=str(file)), carry=True).column_names
    file.write_text("".join(json.dumps(row | {"quality": 3, "importance": 0.1}) + "\n" for row in given()))
    assert not {"quality", "importance"} & set(check_pairs(PairsSection(path=str(file))).unused)
