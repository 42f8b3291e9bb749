"""Parquet files of this program can be read a few rows at a time."""

import ast
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from align.data.pairs import write_pairs
from align.io.parquet import ROW_GROUP, write_parquet

ROOT = Path(__file__).parents[2]
NEEDED = {"write_table": "row_group_size", "to_parquet": "batch_size"}


def group_sizes(file: Path) -> list[int]:
    found = pq.ParquetFile(file).metadata
    return [found.row_group(group).num_rows for group in range(found.num_row_groups)]


def test_row_groups_are_small_and_rows_in_order(tmp_path: Path) -> None:
    count = 2 * ROW_GROUP + 1
    table = pa.table({"id": [str(k) for k in range(count)], "margin": np.arange(count, dtype=float)})
    write_parquet(table, tmp_path / "t.parquet")
    write_pairs(Dataset(table), tmp_path)
    for file in (tmp_path / "t.parquet", tmp_path / "pairs.parquet"):
        assert group_sizes(file) == [ROW_GROUP, ROW_GROUP, 1]
        assert pq.read_table(file).column("margin").to_pylist() == list(range(count))


def test_every_writer_sets_the_size_of_its_row_groups() -> None:
    wrong = []
    for file in [*ROOT.glob("align/**/*.py"), *ROOT.glob("reward_models/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            needed, stream = NEEDED.get(node.func.attr), ast.unparse(node.func).startswith("writer.")
            if needed and not stream and needed not in {keyword.arg for keyword in node.keywords}:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []
