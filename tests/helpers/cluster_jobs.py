"""Jobs for the workers of a cluster in tests/slow/test_cluster.py."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from align.errors import DataError
from align.sharding.jobs import Work


def finished(folder: Path) -> list[int]:
    """First rows of the finished shards."""
    return sorted(int(file.stem) for file in folder.glob("*.parquet"))


@dataclass(frozen=True)
class Squares:
    """Squares each number after a delay; records each shard that it works on as a line of a file."""

    seconds: float
    seen: str
    slow: int = -1
    """Shard that takes ten times as long; a file name records its machine."""

    def start(self) -> Work:
        def work(rows: Dataset) -> Dataset:
            slow = rows["value"][0] == self.slow
            if slow:
                import ray

                Path(f"{self.seen}-{ray.get_runtime_context().get_node_id()}").touch()
            time.sleep(self.seconds * (10 if slow else 1))
            with Path(self.seen).open("a") as stream:
                stream.write(f"{rows['value'][0]}\n")
            return Dataset.from_dict({"value": rows["value"], "square": [value**2 for value in rows["value"]]})

        return work


@dataclass(frozen=True)
class Deadly:
    """Kills the worker that meets ``number``, the first ``meetings`` times."""

    number: int
    meetings: int
    seen: str

    def start(self) -> Work:
        def work(rows: Dataset) -> Dataset:
            if self.number in rows["value"]:
                met = Path(self.seen)
                before = len(met.read_text()) if met.exists() else 0
                met.write_text("x" * (before + 1))
                if before < self.meetings:
                    os._exit(1)
            return rows

        return work


@dataclass(frozen=True)
class Refusing:
    """A job that cannot start."""

    def start(self) -> Work:
        raise DataError("no such model", code="model-missing", hint="give another")


@dataclass(frozen=True)
class Heavy:
    """A job too large to be sent."""

    content: bytes

    def start(self) -> Work:
        return lambda rows: rows
