"""A complete filter by number of pairs: seconds per stage, memory, recall, agreement with the exact score. Prints JSON.

Texts have Zipf word frequencies and log-normal lengths; exact duplicates, near duplicates and e-mail addresses are
among them. Vectors are a mixture of clusters of very different sizes on the unit sphere, as prompts of a collection
are, with some exact duplicates. Each size is filtered in a separate process, so that its peak memory can be told.

    python -m scripts.bench.filter --sizes 10000 100000
    python -m scripts.bench.filter --sizes 20000 --against scikit-learn datasketch hnsw
    python -m scripts.bench.filter --sizes 10000000 --dimensions 64 --words 8 16 --processes 1
    python -m scripts.bench.filter --sizes 400000 --cluster auto,workers=2
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import spearmanr

from align.cli.options import cluster_section
from align.commands.filter import filter_source
from align.config import ClusterSection, FilterSection, PairsSection
from align.data.minhash import band_keys
from align.data.streaming import stream_pairs
from align.data.text import texts
from align.filtering.knn.exact import exact_distance
from align.filtering.knn.row_view import View
from align.filtering.knn.search import kth_distance
from align.filtering.scores import diversity, effective_number
from align.filtering.selection import greedy, robust_scale, top_k
from align.filtering.tables import SUMMARY
from align.filtering.text_survey import shingles
from align.io.console import configure

SAMPLE = 2000
K = 5
BLOCK = 50_000
WAYS = ("scikit-learn", "datasketch", "ivf", "hnsw", "exact", "greedy")
VOCABULARY = 60_000
SAMPLED_EVERY = 0.1
EXACT_SHARE, NEAR_SHARE, PERSONAL_SHARE = 0.01, 0.01, 0.002


def make_vectors(count: int, dimensions: int, file: Path) -> None:
    """Unit vectors [count, dimensions] around cluster centers; cluster sizes and widths are log-normal."""
    rng = np.random.default_rng(0)
    clusters = max(20, count // 200)
    share = rng.lognormal(sigma=1.0, size=clusters)
    member = rng.choice(clusters, size=count, p=share / share.sum())
    width = rng.lognormal(mean=np.log(0.6), sigma=0.3, size=clusters).astype(np.float32)
    centers = rng.normal(size=(clusters, dimensions)).astype(np.float32)
    vectors = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(count, dimensions))
    for start in range(0, count, BLOCK):
        part = member[start : start + BLOCK]
        block = centers[part] + width[part, None] * rng.normal(size=(len(part), dimensions)).astype(np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        copies = rng.integers(0, len(part), size=(2, max(len(part) // 100, 1)))
        block[copies[0]] = block[copies[1]]
        vectors[start : start + BLOCK] = block
    vectors.flush()


def make_texts(count: int, words_of: tuple[int, int], file: Path) -> None:
    """A pair file with margins; ids are row numbers, ``words_of`` the median words of a prompt and of a response."""
    rng = np.random.default_rng(1)
    words = np.array([f"w{k:x}" for k in range(VOCABULARY)], dtype=object)
    weights = np.cumsum(1.0 / np.arange(2, VOCABULARY + 2))
    writer = None
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        columns: dict[str, list[Any]] = {"id": [f"{start + k:09d}" for k in range(size)]}
        for part, mean in (("prompt", words_of[0]), ("chosen", words_of[1]), ("rejected", words_of[1])):
            lengths = np.maximum(rng.lognormal(np.log(mean), 0.5, size=size).astype(int), 1)
            drawn = words[np.searchsorted(weights, rng.random(int(lengths.sum())) * weights[-1])]
            ends = np.cumsum(lengths)
            columns[part] = [" ".join(drawn[end - n : end]) + "." for end, n in zip(ends, lengths, strict=True)]
        for k in rng.integers(1, size, size=int(EXACT_SHARE * size)):
            for part in ("prompt", "chosen", "rejected"):
                columns[part][k] = columns[part][k - 1]
        for k in rng.integers(1, size, size=int(NEAR_SHARE * size)):
            columns["prompt"][k] = columns["prompt"][k - 1] + " again"
            columns["chosen"][k], columns["rejected"][k] = columns["chosen"][k - 1], columns["rejected"][k - 1]
        for k in rng.integers(0, size, size=int(PERSONAL_SHARE * size)):
            columns["prompt"][k] += " write to someone@example.org"
        columns["margin"] = rng.normal(0.4, 1.0, size=size).tolist()
        block = pa.table(columns)
        writer = writer or pq.ParquetWriter(file, block.schema)
        writer.write_table(block)
    assert writer is not None
    writer.close()


def measure(count: int, folder: Path, processes: int, cluster: ClusterSection | None) -> dict[str, Any]:
    """Filter the files in ``folder`` in this process; compare with the exact score on a sample."""
    settings = FilterSection(keep=0.1, embeddings=str(folder / "vectors.npy"), neighbours=K, processes=processes)
    output = folder / "filtered"
    source, cache = PairsSection(path=str(folder / "pairs.parquet")), output / "parts"
    start = time.perf_counter()
    with Memory() as memory:
        filter_source(source, settings, output, seed=0, cache=cache, cluster=cluster)
    seconds = time.perf_counter() - start
    peak = _peak_mib()
    summary = json.loads((output / SUMMARY).read_text(encoding="utf-8"))
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    kept = [pq.read_table(output / f"{name}.parquet", columns=["id", "diversity"]) for name in ("kept", "dropped")]
    scores = pa.concat_tables(kept).to_pandas().dropna().set_index("id")["diversity"].sort_index()
    left = scores.index.astype(int).to_numpy()
    places = np.random.default_rng(1).choice(len(left), min(SAMPLE, len(left)), replace=False)
    exact = exact_distance(View(vectors, left), places, K)
    return {
        "pairs": count,
        "seconds": seconds,
        "seconds_by_stage": summary["seconds"],
        "peak_mib": peak,
        "peak_mib_without_mapped_files": memory.peak / 2**20,
        "peak_mib_of_a_text_process": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        "kept": summary["kept"],
        "dropped_by_rule": summary["dropped_by_rule"],
        "neighbours": summary["neighbours"],
        "rank_correlation_with_exact": float(spearmanr(scores.to_numpy()[places], exact).statistic),
    }


def against(name: str, count: int, folder: Path) -> dict[str, Any]:
    """Seconds of another way to do one stage on the same files."""
    vectors = np.load(folder / "vectors.npy")
    if name in ("ivf", "hnsw", "exact"):
        start = time.perf_counter()
        found = kth_distance(vectors, K, seed=0, method=name)  # type: ignore[arg-type]
        return {"pairs": count, "way": found.method, "recall": found.recall, "seconds": time.perf_counter() - start}
    if name == "greedy":
        return _greedy(vectors)
    if name == "scikit-learn":
        from sklearn.neighbors import NearestNeighbors

        start = time.perf_counter()
        NearestNeighbors(n_neighbors=K + 1, algorithm="brute").fit(vectors).kneighbors(vectors)
        return {"pairs": count, "way": "scikit-learn, brute force", "seconds": time.perf_counter() - start}
    from datasketch import MinHash, MinHashLSH

    pairs = stream_pairs(PairsSection(path=str(folder / "pairs.parquet")), folder / "pairs.arrow")
    found_shingles = shingles(texts(pairs))
    start = time.perf_counter()
    band_keys(found_shingles)
    own = time.perf_counter() - start
    start = time.perf_counter()
    index = MinHashLSH(threshold=0.9, num_perm=128)
    for k in range(count):
        sketch = MinHash(num_perm=128)
        sketch.update_batch([value.tobytes() for value in found_shingles.row(k)])
        index.query(sketch)
        index.insert(str(k), sketch)
    taken = time.perf_counter() - start
    return {"pairs": count, "way": "datasketch, MinHash and LSH", "seconds": taken, "seconds_of_band_keys": own}


def _greedy(vectors: np.ndarray) -> dict[str, Any]:
    """Seconds of the greedy selection of a tenth, and how the one-shot selection compares with it."""
    count = len(vectors)
    base, ids = np.random.default_rng(2).normal(size=count), [f"{k:09d}" for k in range(count)]
    spread = diversity(kth_distance(vectors, K, seed=0).distance)
    once = top_k(base + 0.5 * robust_scale(spread), ids, count // 10)
    start = time.perf_counter()
    kept = greedy(base, vectors, ids, count // 10, weight=0.5 / float(np.std(spread)))
    return {
        "pairs": count,
        "way": "greedy",
        "seconds": time.perf_counter() - start,
        "shared_with_one_shot": len(np.intersect1d(once, kept)) / len(kept),
        "mean_base": {"greedy": float(base[kept].mean()), "one-shot": float(base[once].mean())},
        "effective_number": {
            "greedy": effective_number(vectors, kept),
            "one-shot": effective_number(vectors, once),
        },
    }


class Memory(threading.Thread):
    """Peak memory in bytes, without mapped files, of any one process: this one or one that it started."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.ended = 0, threading.Event()

    def __enter__(self) -> "Memory":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()

    def run(self) -> None:
        """Sample every ``SAMPLED_EVERY`` seconds."""
        this = psutil.Process()
        while not self.ended.wait(SAMPLED_EVERY):
            for process in (this, *this.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found = process.memory_info()
                    self.peak = max(self.peak, found.rss - found.shared)


def _peak_mib() -> float:
    line = next(item for item in Path("/proc/self/status").read_text().splitlines() if item.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Make the files of each size, filter each in a separate process, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", type=int, default=[10_000, 100_000])
    parser.add_argument("--against", nargs="*", default=[], choices=WAYS)
    parser.add_argument("--dimensions", type=int, default=384, help="dimensions of the vectors")
    parser.add_argument("--words", nargs=2, type=int, default=(25, 60), help="words of a prompt and of a response")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cluster", metavar="ADDRESS,workers=N", help="as in align filter run")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-filter"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    configure()
    if arguments.one is not None:
        cluster = cluster_section(arguments.cluster)
        print(json.dumps(measure(arguments.one, arguments.folder, arguments.processes, cluster)))
        return
    results = []
    for count in arguments.sizes:
        folder = arguments.folder / "-".join(map(str, (count, arguments.dimensions, *arguments.words)))
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "made").exists():
            make_texts(count, arguments.words, folder / "pairs.parquet")
            make_vectors(count, arguments.dimensions, folder / "vectors.npy")
            (folder / "made").touch()
        if arguments.against:
            results += [against(name, count, folder) for name in arguments.against]
            continue
        shutil.rmtree(folder / "filtered", ignore_errors=True)
        command = [sys.executable, "-m", "scripts.bench.filter", "--one", str(count), "--folder", str(folder)]
        command += ["--processes", str(arguments.processes)]
        command += ["--cluster", arguments.cluster] if arguments.cluster else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout))
    print(json.dumps({"machine": platform.machine(), "cores": os.cpu_count(), "results": results}, indent=2))


if __name__ == "__main__":
    main()
