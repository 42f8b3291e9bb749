"""Pairs from rows to Arrow: the same table in any number of pieces, in memory at most twice."""

import json
import random
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from align.config import PairsSection
from align.data.in_memory import pairs_from_dataset
from align.data.pair_chunks import PairSpool
from align.data.pairs import load_pairs
from align.errors import DataError
from align.io.arrow_tables import as_dataset


def table_of(count: int, words: int) -> Iterator[dict[str, Any]]:
    drawn = random.Random(0)

    def text() -> str:
        return " ".join(f"{drawn.getrandbits(40):010x}" for _ in range(words))

    for k in range(count):
        scores = {"margin": k / 3} if k % 2 else {"group": f"g{k}"}
        yield {"id": f"p{k}", "prompt": text(), "chosen": text(), "rejected": text(), **scores}


@pytest.mark.parametrize("limit", [None, 4])
def test_a_table_in_pieces_is_the_table_in_one(
    limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns that a piece lacks, and a sample whose pieces are not full."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in table_of(11, 3)))
    source = PairsSection(path=str(file), limit=limit)
    whole = load_pairs(source)
    assert len(whole) == (limit or 11) and {"margin", "group"} <= set(whole.column_names)
    for size in (1, 2, 3, 11):
        monkeypatch.setattr("align.data.pair_chunks.SPOOLED", size)
        pieces = load_pairs(source)
        assert pieces.to_list() == whole.to_list() and pieces.features == whole.features


def test_a_spool_takes_less_memory_than_its_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python's objects, the same pairs take more than their texts; Arrow's buffers, no more than the texts."""
    monkeypatch.setattr("align.data.pair_chunks.SPOOLED", 64)
    spool = PairSpool("test", [])
    size = sum(sum(len(str(value)) for value in row.values()) for row in table_of(1000, 30))
    tracemalloc.start()
    for row in table_of(1000, 30):
        spool.add(row)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 0.7 * size and peak < 1.2 * size
    before = pa.total_allocated_bytes()
    made = spool.table()
    assert len(made) == 1000 and pa.total_allocated_bytes() - before < 1.2 * size
    assert list(spool) == [] and made["id"][999].as_py() == "p999"


@pytest.mark.parametrize("size", [2, 4096])
@pytest.mark.parametrize("odd", [threading.Lock(), lambda: None])
def test_an_object_that_is_no_value_is_named(size: int, odd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.data.pair_chunks.SPOOLED", size)
    turn = {"role": "assistant", "content": "good", "note": odd}
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": [turn], "rejected": [turn | {"content": "bad"}]}
    with pytest.raises(DataError, match=r"pair-type.*do not fit one column"):
        pairs_from_dataset([row | {"id": str(k)} for k in range(3)])


def test_a_dataset_of_a_table_shares_its_memory_and_is_named_by_its_content() -> None:
    values = np.arange(100_000)
    table = pa.table({"a": values, "b": pa.array(["x"] * len(values))})
    before = pa.total_allocated_bytes()
    made = as_dataset(table)
    assert pa.total_allocated_bytes() - before < 0.1 * table.nbytes
    assert made.to_list()[:2] == [{"a": 0, "b": "x"}, {"a": 1, "b": "x"}] and isinstance(made, Dataset)
    other = as_dataset(pa.table({"a": values + (values == 7), "b": table["b"]}))
    assert made._fingerprint == as_dataset(pa.table(table.to_pydict()))._fingerprint != other._fingerprint
