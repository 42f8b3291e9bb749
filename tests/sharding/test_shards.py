"""Shards are computed once, in the order of the table, by any process; a wrong cluster option is one message."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from align.cli.options import cluster_section
from align.config import ClusterSection
from align.errors import AlignError, ConfigError
from align.io.console import log
from align.sharding.jobs import Work, decode, encode
from align.sharding.ray_cluster import Worker, _Pool
from align.sharding.shards import map_shards
from tests.helpers.cluster_jobs import finished


@dataclass
class Doubling:
    """Doubles each number, and counts its calls."""

    starts: int = 0
    rows: int = 0

    def start(self) -> Work:
        self.starts += 1
        return self.work

    def work(self, rows: Dataset) -> Dataset:
        self.rows += len(rows)
        return Dataset.from_dict({"twice": [2 * value for value in rows["value"]]})


@given(st.integers(1, 40), st.integers(1, 12), st.sets(st.integers(0, 40)))
def test_missing_shards_are_made_and_the_others_read(rows: int, size: int, lost: set[int]) -> None:
    import tempfile

    table = Dataset.from_dict({"value": list(range(rows))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = Doubling()
        map_shards(table, job, folder, size=size, what="doubling")
        assert (job.starts, job.rows) == (1, rows) and finished(folder) == list(range(0, rows, size))
        removed = [start for start in finished(folder) if start in lost]
        for start in removed:
            (folder / f"{start:08d}.parquet").unlink()
        again = Doubling()
        found = map_shards(table, again, folder, size=size, what="doubling")
        assert again.starts == bool(removed)
        assert again.rows == sum(min(size, rows - start) for start in removed)
        assert found.whole()["twice"][:] == [2 * k for k in range(rows)]


def test_a_table_keeps_its_types() -> None:
    table = Dataset.from_dict({"id": ["a", "b"], "ids": [[1, 2], []], "chat": [[{"role": "user", "content": "x"}], []]})
    found = decode(encode(table.select([1, 0])))
    assert found.features == table.features and found.to_list() == table.to_list()[::-1]


def test_the_option() -> None:
    assert cluster_section(None) is None
    assert cluster_section("auto") == ClusterSection()
    found = cluster_section("local,workers=2,cpus=0.5,gpus=1")
    assert found == ClusterSection(address="local", workers=2, cpus=0.5, gpus=1)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("auto,workers=none", "workers: Input should be a valid integer"),
        ("auto,worker=2", "worker: Extra inputs are not permitted, found '2'"),
        ("auto,cpus=0", "cpus: Input should be greater than 0, found '0'"),
    ],
)
def test_a_wrong_option_is_named(option: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cluster_section(option)
    assert f"--cluster {option}: {said}" in str(caught.value)


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    table = Dataset.from_dict({"value": [1]})
    with pytest.raises(AlignError, match=r"cluster-missing.*Ray is not installed") as caught:
        map_shards(table, Doubling(), tmp_path, size=1, what="doubling", cluster=ClusterSection())
    assert "pip install 'margin-align[ray]'" in str(caught.value)


def test_nothing_of_a_cluster_is_imported_without_one(tmp_path: Path) -> None:
    """The command line, scoring, generation and measuring do not touch Ray."""
    modules = "align.cli.main, align.run.pipeline, align.run.stages, align.commands.generate, align.commands.entangle"
    modules += ", align.sharding.shards"
    code = f"import {modules}, sys; sys.exit(any(name.partition('.')[0] == 'ray' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == 0


def test_a_worker_that_loads_is_not_said_to_lack_room(caplog: pytest.LogCaptureFixture) -> None:
    pool = _Pool.__new__(_Pool)
    pool.cluster, pool.working, pool.starting = ClusterSection(address="local"), {}, {object(): object()}
    with pytest.MonkeyPatch.context() as patched, caplog.at_level("WARNING"):
        patched.setattr(_Pool, "_room", lambda self: 1)
        pool._warn_of_no_progress()
    assert "no worker is at work: it still loads, or waits for room" in caplog.text


class Loud(Doubling):
    """Warns when it starts and for each shard."""

    def start(self) -> Work:
        log.warning("takes %d tokens at most", 512)
        return super().start()

    def work(self, rows: Dataset) -> Dataset:
        log.info("not told")
        log.warning("%d rows are not read", len(rows))
        return super().work(rows)


def test_what_a_worker_warns_of_comes_with_its_results(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = encode(Dataset.from_dict({"value": [1, 2]}))
    worker = Worker(Loud(), str(tmp_path / "missing"), 1)
    try:
        assert worker.start() == (b"", ["takes 512 tokens at most"])
        for _ in range(2):
            result, told = worker(shard)
            assert decode(result)["twice"][:] == [2, 4] and told == ["2 rows are not read"]
    finally:
        log.removeHandler(worker.warnings)
    pool = _Pool.__new__(_Pool)
    pool.told = set()
    caplog.clear()
    for _ in range(3):
        pool._tell(["takes 512 tokens at most"])
    assert [record.message for record in caplog.records] == ["takes 512 tokens at most"]
