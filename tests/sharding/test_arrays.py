"""Columns that a job makes of a table: a stopped run resumes with the missing shards."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from align.sharding.arrays import as_table, map_arrays
from align.sharding.jobs import Work


class Squares:
    """Job that squares numbers and is interrupted once, at one shard."""

    def __init__(self, stop: int) -> None:
        self.stop, self.calls = stop, []  # type: ignore[var-annotated]

    def start(self) -> Work:
        return self.work

    def work(self, rows: Dataset) -> Dataset:
        start = rows["value"][0]
        if start == self.stop:
            self.stop = -1
            raise KeyboardInterrupt
        self.calls.append(start)
        values = np.array(rows["value"])
        return as_table({"square": values**2, "both": np.stack([values, -values], axis=1).astype(np.float32)})


def test_finished_shards_are_not_made_again(tmp_path: Path) -> None:
    """An interrupted run resumes with the missing shard, and the result is the same."""
    rows, job = Dataset.from_dict({"value": list(range(35))}), Squares(20)
    with pytest.raises(KeyboardInterrupt):
        map_arrays(rows, job, tmp_path, what="test", rows=10)
    assert job.calls == [0, 10]
    found = map_arrays(rows, job, tmp_path, what="test", rows=10)
    assert job.calls == [0, 10, 20, 30]
    assert np.array_equal(found["square"], np.arange(35) ** 2) and found["square"].dtype == np.int64
    assert np.array_equal(found["both"], np.stack([np.arange(35), -np.arange(35)], axis=1))
    assert found["both"].dtype == np.float32 and isinstance(found["both"], np.memmap)
    assert map_arrays(rows, job, tmp_path, what="test", rows=10).keys() == found.keys() and len(job.calls) == 4
    assert [place.name for place in tmp_path.iterdir()] == ["columns"]
