"""The schema of the pair table: what is derived from it, and that loading, checking and filtering keep to it."""

import json
from pathlib import Path

import numpy as np
import pytest

from align.config import FilterSection, PairsSection
from align.config.columns import (
    COLUMNS,
    FINISH_COLUMNS,
    LOADED,
    NAMES,
    NOT_NEGATIVE,
    NUMBERS,
    OPTIONAL,
    PAIR_COLUMNS,
    SCORES,
    SPREAD,
    TEMPLATE_COLUMNS,
    TEXT,
    THUMB,
)
from align.data.pairs import load_pairs
from align.data.streaming import stream_pairs
from align.errors import DataError
from align.filtering.filter_pairs import filter_pairs
from align.models.collator import ROW
from align.models.logps import NOT_MODEL_INPUTS
from tests.helpers.builders import rows

KIND = {column.name: column.kind for column in COLUMNS}
FULL: dict[str, object] = {"prompt": "Say:", "chosen": " yes", "rejected": " no", "id": "a"}
FULL |= dict.fromkeys(NAMES, "x") | dict.fromkeys(set(NUMBERS) - {THUMB}, 0.5)
FULL |= dict.fromkeys(FINISH_COLUMNS.values(), "length")
FULL |= {"tools": '[{"name": "clock"}]', "chat_template_kwargs": '{"enable_thinking": false}'}


def test_every_column_stands_in_the_schema_once() -> None:
    assert len(KIND) == len(COLUMNS)
    assert TEXT == ("prompt", "chosen", "rejected")
    assert ("id", *TEXT, *OPTIONAL) == LOADED
    assert set(OPTIONAL) == set(NUMBERS) | set(NAMES) | set(TEMPLATE_COLUMNS) and not set(NUMBERS) & set(NAMES)
    for name in (*SCORES, SPREAD, *PAIR_COLUMNS, *NOT_NEGATIVE):
        assert KIND[name] == "number"
    assert all(column.meaning and column.written_by for column in COLUMNS)


def test_a_table_has_the_columns_in_the_order_of_the_schema(tmp_path: Path) -> None:
    """The same if it is streamed; a column that no stage reads is left out."""
    source = tmp_path / "pairs.jsonl"
    source.write_text(json.dumps(FULL | {"kept": True, "importance": 1.0, "trust": 0.5, "other": 3}) + "\n")
    config = PairsSection(path=str(source))
    for pairs in (load_pairs(config), stream_pairs(config, tmp_path / "pairs.arrow")):
        assert tuple(pairs.column_names) == tuple(name for name in LOADED if name != THUMB)
        assert pairs[0] == FULL


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != THUMB])
def test_numbers_are_checked_by_their_constraint(name: str, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text(json.dumps(FULL | {name: -0.5}) + "\n")
    if name in NOT_NEGATIVE:
        with pytest.raises(DataError, match=f"{name}: found -0.5, expected a number that is not negative"):
            load_pairs(PairsSection(path=str(source)))
    else:
        assert load_pairs(PairsSection(path=str(source)))[name] == [-0.5]


def test_a_filter_writes_columns_of_the_schema(tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(10)))
    np.save(tmp_path / "vectors.npy", np.eye(10, dtype=np.float32))
    settings = FilterSection(keep=0.5, embeddings=str(tmp_path / "vectors.npy"), drop_doubtful=True)
    pairs = load_pairs(PairsSection(path=str(source)))
    found = filter_pairs(pairs, settings, tmp_path / "cache", held_out=[], seed=0)
    assert set(found.columns) <= set(KIND)
    assert {name for name, values in found.columns.items() if values.dtype == bool} == {
        name for name in found.columns if KIND[name] == "flag"
    }


def test_columns_of_a_batch_are_no_inputs_of_a_model() -> None:
    assert {*PAIR_COLUMNS, ROW} < NOT_MODEL_INPUTS


@pytest.mark.parametrize(
    ("thumb", "words"), [(1, "thumb: found 1 in a row with two different"), (0.5, "label: found 0.5, expected true")]
)
def test_a_thumb_is_of_one_response(thumb: float, words: str, tmp_path: Path) -> None:
    """A pair with a column of that name is not taken for a single response."""
    (tmp_path / "pairs.jsonl").write_text(json.dumps(FULL | {"thumb": thumb}) + "\n")
    with pytest.raises(DataError, match=words):
        load_pairs(PairsSection(path=str(tmp_path / "pairs.jsonl")), thumbs=True)
