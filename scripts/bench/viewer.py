"""`align view` over many pairs: seconds to open, to brush and to search, and the memory of its server. Prints JSON.

The pairs are synthetic: Zipf word frequencies, log-normal lengths, about 2 KB of text and 12 columns each, zstd. The
server is the command itself in a process of its own, asked over HTTP as the page asks it.

    python -m scripts.bench.viewer --pairs 1000000 --output studies/viewer.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from align.io.parquet import ROW_GROUP

BLOCK = 50_000
VOCABULARY = 60_000
WORDS = {"prompt": 60, "chosen": 130, "rejected": 130}
"""Median words of each text; a word has about 6 bytes with its space."""
CHARTS = ["margin", "quality", "diversity", "weight"]
RARE = "Zanzibar42"
"""A word that is written into a few prompts, in capitals that a search in any case must not mind."""
RARE_EVERY = 100_000
SAMPLED_EVERY = 0.05
REPEATS = 7


def make_pairs(count: int, file: Path) -> None:
    """A pair table of ``count`` rows."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(VOCABULARY)], dtype=object)
    weights = np.cumsum(1.0 / np.arange(2, VOCABULARY + 2))
    writer = None
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        columns: dict[str, Any] = {"id": [f"{start + k:09d}" for k in range(size)]}
        for part, median in WORDS.items():
            lengths = np.maximum(rng.lognormal(np.log(median), 0.5, size=size).astype(int), 3)
            drawn = words[np.searchsorted(weights, rng.random(int(lengths.sum())) * weights[-1])]
            ends = np.cumsum(lengths)
            columns[part] = [" ".join(drawn[end - n : end]) for end, n in zip(ends, lengths, strict=True)]
        for k in range(-start % RARE_EVERY, size, RARE_EVERY):
            columns["prompt"][k] += f" {RARE}"
        margin = rng.normal(0.4, 1.0, size)
        columns |= {
            "margin": margin, "margin_std": rng.exponential(0.3, size), "quality": rng.beta(5, 2, size),
            "diversity": rng.gamma(3, 1, size), "weight": 1 / (1 + np.exp(-margin)),
            "importance": rng.normal(size=size),
            "votes_chosen": rng.integers(0, 6, size).astype(float), "kept": rng.random(size) < 0.7,
            "group": rng.choice([f"source {k}" for k in range(12)], size),
        }  # fmt: skip
        block = pa.table(columns)
        writer = writer or pq.ParquetWriter(file, block.schema, compression="zstd")
        writer.write_table(block, row_group_size=ROW_GROUP)
    assert writer is not None
    writer.close()


class Peak:
    """The largest resident memory of a process, and of the processes that it started, while the block runs."""

    def __init__(self, process: int) -> None:
        self.process = psutil.Process(process)
        self.own = self.others = 0
        self._over = threading.Event()

    def __enter__(self) -> "Peak":
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(SAMPLED_EVERY):
            try:
                self.own = max(self.own, self.process.memory_info().rss)
                others = sum(child.memory_info().rss for child in self.process.children(recursive=True))
                self.others = max(self.others, others)
            except psutil.Error:
                return


@contextmanager
def served(file: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen[str], float]]:
    """A client of a new `align view` of a file, its process, and the seconds until its first page is answered."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "align.cli", "--quiet", "view", str(file), "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address, _, token = process.stdout.readline().strip().partition("/#")
        with httpx.Client(base_url=address, headers={"x-token": token}, timeout=600) as client:
            client.get("/api/open").raise_for_status()
            yield client, process, time.perf_counter() - start
    finally:
        process.terminate()
        process.wait()


class Clock:
    """Seconds of the clock, and seconds of processor that the server took meanwhile, of all its threads."""

    def __init__(self, process: int) -> None:
        self.process = psutil.Process(process)

    def now(self) -> np.ndarray:
        """(clock, processor)."""
        used = self.process.cpu_times()
        return np.array([time.perf_counter(), used.user + used.system])

    def timed(self, work: Callable[[], Any], repeats: int = REPEATS) -> dict[str, float]:
        """Of a call: median, least and largest seconds of the clock, and the mean seconds of processor."""
        begin, taken = self.now(), []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
        processor = (self.now() - begin)[1] / repeats
        return {"median": float(np.median(taken)), "least": min(taken), "largest": max(taken),
                "processor": float(processor)}  # fmt: skip


def brush(client: httpx.Client, number: int) -> None:
    """What a move of the brush asks: counts, four histograms and the first 100 rows."""
    query = {"filters": [{"column": "margin", "low": -0.3 + 0.001 * number, "high": 2.4}]}
    client.post("/api/view", json={"query": query, "columns": CHARTS, "first": 100}).raise_for_status()


def search(clock: Clock, client: httpx.Client, text: str, *, any_case: bool) -> tuple[float, float, float, int]:
    """(seconds until the first hit or the end, until the end, of processor, hits) of a search not made before."""
    begin, first, hits = clock.now(), None, 0
    body = {"query": {"text": text, "any_case": any_case}, "tab": "bench"}
    with client.stream("POST", "/api/search", json=body) as answer:
        for line in answer.iter_lines():
            found = json.loads(line)
            hits = found.get("hits", hits)
            if first is None and (hits or "end" in found):
                first = time.perf_counter() - begin[0]
    assert first is not None
    whole, processor = clock.now() - begin
    return first, float(whole), float(processor), hits


def searches(clock: Clock, client: httpx.Client, rows: int) -> dict[str, Any]:
    """Searches of words that a few, no or nearly all pairs have."""
    found: dict[str, Any] = {}
    expected = -(-rows // RARE_EVERY)
    for name, texts, any_case in (
        ("exact, a rare word", [RARE, f" {RARE}", RARE[:-1], RARE[1:]], False),
        ("exact, no hit", [f"no such thing {k}" for k in range(4)], False),
        ("any case, a rare word", [RARE.lower(), RARE.upper(), RARE.lower()[:-1], RARE.swapcase()], True),
        ("any case, no hit", [f"No Such Thing {k}" for k in range(4)], True),
    ):
        taken = [search(clock, client, text, any_case=any_case) for text in texts]
        assert all(hits == (expected if "rare" in name else 0) for *_, hits in taken), taken
        found[name] = {
            part: float(np.median([one[k] for one in taken])) for k, part in enumerate(("first", "all", "processor"))
        } | {"least": min(one[1] for one in taken)}
    return found


def measure(file: Path, rows: int) -> dict[str, Any]:
    """All measurements of one table."""
    found: dict[str, Any] = {"pairs": rows, "file_mb": file.stat().st_size / 1e6, "open": []}
    for _ in range(4):
        with served(file) as (_, process, seconds):
            found["open"].append({"seconds": seconds, "processor": float(Clock(process.pid).now()[1])})
    with served(file) as (client, process, _), Peak(process.pid) as peak:
        clock, start = Clock(process.pid), time.perf_counter()
        numbers = iter(range(10_000))
        found["brush_while_the_text_cache_is_built"] = clock.timed(lambda: brush(client, next(numbers)))
        while (cache := client.get("/api/state").json()["cache"])["state"] == "building":
            time.sleep(0.2)
        assert cache["state"] == "ready", cache
        found["text_cache_seconds"] = time.perf_counter() - start
        found["brush"] = clock.timed(lambda: brush(client, next(numbers)))
        found["search"] = searches(clock, client, rows)
        found["scatter"] = clock.timed(
            lambda: client.post("/api/scatter", json={"query": {}, "x": "margin", "y": "quality"}).raise_for_status()
        )
        sorted_view = client.post("/api/view", json={"query": {"sort": "quality"}}).json()["view"]
        found["100_rows_in_the_middle"] = clock.timed(
            lambda: client.get(f"/api/rows?view={sorted_view}&start={rows // 2}&count=100").raise_for_status()
        )
        found["one_pair"] = clock.timed(lambda: client.get(f"/api/pair?row={rows // 3}").raise_for_status())
        found["neighbors"] = clock.timed(lambda: client.get(f"/api/neighbors?row={rows // 3}").raise_for_status(), 3)
        found["copies"] = clock.timed(lambda: client.get(f"/api/copies?row={rows // 3}").raise_for_status(), 3)
    found["server_peak_mb"] = peak.own / 1e6
    found["text_cache_process_peak_mb"] = peak.others / 1e6
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the table is written, and kept; default: a temporary one")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        file = (given.folder or Path(temporary)) / f"pairs-{given.pairs}.parquet"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            make_pairs(given.pairs, file)
        before = os.getloadavg()[0]
        found = measure(file, given.pairs)
    found["machine"] = {
        "cores": os.cpu_count(), "processor": platform.processor() or platform.machine(),
        "load_before_and_after": [before, os.getloadavg()[0]],
    }  # fmt: skip
    text = json.dumps(found, indent=2)
    if given.output is not None:
        given.output.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
