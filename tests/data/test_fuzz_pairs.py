"""Any pair file gives a table or an error that the user can fix, never a crash."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from align.config import PairsSection
from align.data.pairs import check_pairs, load_pairs
from align.data.prompts import load_prompts
from align.errors import AlignError

SHORT, LONG = 150, 4000
FOLDER_IS_SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
texts = st.one_of(st.text(max_size=20), st.sampled_from(["", " ", "\0", "\ud800", "user", "assistant", "nan", "1e999"]))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.sampled_from([10**400, -(2**70)]))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={"role": st.one_of(st.sampled_from(["user", "assistant", "system"]), values),
                  "content": st.one_of(texts, values), "name": values},
    ),
    max_size=3,
)  # fmt: skip
cells = st.one_of(texts, messages, values)
pair_rows = st.fixed_dictionaries(
    {},
    optional={
        "prompt": cells, "chosen": cells, "rejected": cells, "margin": values, "weight": values, "id": values,
        "group": values, "margin_std": scalars,
    },
)  # fmt: skip


def check_source(path: Path) -> None:
    """Both readers of a pair file return, or raise an error with a code."""
    for read in (check_pairs, load_pairs):
        try:
            read(PairsSection(path=str(path)))
        except AlignError as error:
            assert str(path) in error.message and error.code


def check_rows(folder: Path, table: list[Any]) -> None:
    """A JSONL file of these values, as pairs and as prompts."""
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    check_source(path)
    try:
        assert load_prompts(str(path))
    except AlignError as error:
        assert str(path) in error.message


def check_bytes(folder: Path, suffix: str, content: bytes) -> None:
    """A file of these bytes."""
    path = folder / f"x{suffix}"
    path.write_bytes(content)
    check_source(path)


def parquet_bytes() -> bytes:
    """A valid Parquet file."""
    stream = pa.BufferOutputStream()
    pq.write_table(
        pa.table({name: [f"{name} {k}" for k in range(8)] for name in ("prompt", "chosen", "rejected")}), stream
    )
    return stream.getvalue().to_pybytes()


def damaged(content: bytes, seed: int) -> bytes:
    """The bytes with some of them changed, or cut."""
    chance = random.Random(seed)
    found = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        found[chance.randrange(len(found))] = chance.randrange(256)
    return bytes(found[: chance.randint(1, len(found))] if chance.random() < 0.3 else found)


@settings(max_examples=SHORT, suppress_health_check=FOLDER_IS_SHARED)
@given(st.lists(st.one_of(pair_rows, values), max_size=4))
def test_any_json_rows(tmp_path: Path, table: list[Any]) -> None:
    check_rows(tmp_path, table)


@settings(max_examples=SHORT, suppress_health_check=FOLDER_IS_SHARED)
@given(
    st.sampled_from([".jsonl", ".csv", ".parquet"]),
    st.one_of(st.binary(max_size=200), texts.map(lambda t: t.encode("utf-8", "replace"))),
)
@example(".csv", b'chosen,rejected\n"a b","a c"\n')
def test_any_bytes(tmp_path: Path, suffix: str, content: bytes) -> None:
    check_bytes(tmp_path, suffix, content)


@settings(max_examples=SHORT, suppress_health_check=FOLDER_IS_SHARED)
@given(st.integers(0, 2**32))
@example(1524)  # its column name is not UTF-8
def test_a_damaged_parquet_file(tmp_path: Path, seed: int) -> None:
    check_bytes(tmp_path, ".parquet", damaged(parquet_bytes(), seed))


def test_the_file_that_is_damaged_was_right(tmp_path: Path) -> None:
    check_bytes(tmp_path, ".parquet", parquet_bytes())
    assert len(load_pairs(PairsSection(path=str(tmp_path / "x.parquet")))) == 8


@pytest.mark.slow
@settings(max_examples=LONG, suppress_health_check=FOLDER_IS_SHARED)
@given(st.lists(st.one_of(pair_rows, values), max_size=4), st.integers(0, 2**32))
def test_all_of_it_for_longer(tmp_path: Path, table: list[Any], seed: int) -> None:
    check_rows(tmp_path, table)
    check_bytes(tmp_path, ".parquet", damaged(parquet_bytes(), seed))
