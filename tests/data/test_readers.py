"""Kinds of files that hold a pair table."""

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from align.config import PairsSection
from align.data.pairs import load_pairs
from align.data.streaming import stream_pairs
from align.errors import DataError
from tests.helpers.builders import rows

TABLE = rows(4)
LINES = "".join(json.dumps(row) + "\n" for row in TABLE)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def texts(path: Path, **settings: Any) -> list[str]:
    return list(load_pairs(PairsSection(path=str(path), **settings))["chosen"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.json", json.dumps(TABLE, indent=1)),
        ("named.json", json.dumps({"data": TABLE})),
        ("lines.json", LINES),
        ("lines.jsonl.gz", gzip.compress(LINES.encode())),
        ("array.json.gz", gzip.compress(json.dumps(TABLE).encode())),
        ("lines.jsonl.bz2", bz2.compress(LINES.encode())),
        ("lines.jsonl.zst", pa.compress(LINES.encode(), codec="zstd", asbytes=True)),
        ("tabs.tsv", pd.DataFrame(TABLE).to_csv(index=False, sep="\t")),
        ("commas.csv.gz", gzip.compress(pd.DataFrame(TABLE).to_csv(index=False).encode())),
    ],
)
def test_each_kind_of_file_holds_the_same_table(name: str, content: str | bytes, tmp_path: Path) -> None:
    wanted = load_pairs(PairsSection(path=str(write(tmp_path, "wanted.jsonl", LINES))))
    source = PairsSection(path=str(write(tmp_path, name, content)))
    assert load_pairs(source).to_list() == wanted.to_list()
    assert stream_pairs(source, tmp_path / "streamed.arrow").to_list() == wanted.to_list()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl.gz", gzip.compress(LINES.encode())[:-20], "cannot be read"),
        ("text.jsonl.zst", LINES, "cannot be read"),
        ("open.json", json.dumps(TABLE)[:-1], "not a table in JSON"),
        ("number.json", "7", "not a table in JSON (found a JSON int)"),
        ("mixed.json", "[1]", "row 1:(row): found a JSON int, expected an object"),
        ("empty.json", "", "holds no rows"),
        ("pairs.parquet.gz", b"", "found a file ending in '.gz'"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        load_pairs(PairsSection(path=str(path)))
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_folder_of_splits_gives_the_split_that_is_asked_for(tmp_path: Path) -> None:
    pd.DataFrame(TABLE[:3]).to_parquet(tmp_path / "train.parquet")
    write(tmp_path, "test.jsonl", LINES.splitlines()[3])
    write(tmp_path, "dataset_info.json", "{}")
    assert texts(tmp_path) == [row["chosen"] for row in TABLE[:3]]
    assert texts(tmp_path, split="test") == [TABLE[3]["chosen"]]
    with pytest.raises(DataError, match=r"no split 'dev' \(known: test, train\)"):
        texts(tmp_path, split="dev")


def test_parts_of_one_table_are_one_table(tmp_path: Path) -> None:
    for k in range(2):
        pd.DataFrame(TABLE[2 * k : 2 * k + 2]).to_parquet(tmp_path / f"part-{k}.parquet")
    assert texts(tmp_path) == [row["chosen"] for row in TABLE]


def test_folders_that_hold_parts_say_which_pattern_to_give(tmp_path: Path) -> None:
    """Parts in one folder, and folders named by split; the hint reads as the table."""
    for split, part in (("train", TABLE), ("test", TABLE[:1])):
        (tmp_path / "data" / split).mkdir(parents=True)
        write(tmp_path / "data" / split, "a.jsonl", "".join(json.dumps(row) + "\n" for row in part))
        write(tmp_path / "data" / split, "empty.jsonl", "")
    with pytest.raises(DataError, match=r"found folders with tables \(test, train\), expected one table") as nested:
        texts(tmp_path / "data")
    with pytest.raises(DataError, match=r"found a folder of a\.jsonl, empty\.jsonl") as flat:
        texts(tmp_path / "data" / "train")
    for error in (nested, flat):
        pattern = str(error.value.hint).split("'")[1]
        assert texts(Path(pattern)) == [row["chosen"] for row in TABLE]
