"""Diversity scores and selection at size: time, memory, recall, rank correlation with the exact score. Prints JSON.

Vectors are a mixture of clusters of very different sizes on the unit sphere, as prompts of a real collection are, with
some exact duplicates. The exact score is computed by brute force on a sample of the rows.

    python scripts/bench_filter.py --sizes 10000 100000
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from align.filtering.neighbours import EXACT_LIMIT, _exact, kth_distance
from align.filtering.scores import diversity
from align.filtering.select import importance, top

SAMPLE = 2000


def make_vectors(count: int, size: int, seed: int) -> np.ndarray:
    """Unit vectors [count, size] around cluster centres; cluster sizes and widths are log-normal."""
    rng = np.random.default_rng(seed)
    clusters = max(20, count // 200)
    share = rng.lognormal(sigma=1.0, size=clusters)
    member = rng.choice(clusters, size=count, p=share / share.sum())
    width = rng.lognormal(mean=np.log(0.6), sigma=0.3, size=clusters)
    centres = rng.normal(size=(clusters, size)).astype(np.float32)
    vectors = np.empty((count, size), dtype=np.float32)
    for start in range(0, count, 50_000):
        part = slice(start, start + 50_000)
        noise = rng.normal(size=(len(member[part]), size)).astype(np.float32)
        vectors[part] = centres[member[part]] + width[member[part], None].astype(np.float32) * noise
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    copies = rng.integers(0, count, size=count // 100)
    vectors[rng.integers(0, count, size=len(copies))] = vectors[copies]
    return vectors


def main() -> None:
    """Run the sizes and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", type=int, default=[10_000, 100_000])
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--k", type=int, default=5)
    arguments = parser.parse_args()
    results = {}
    for count in arguments.sizes:
        vectors = make_vectors(count, arguments.dimensions, seed=0)
        rng = np.random.default_rng(1)
        columns = {"margin": rng.normal(size=count), "quality": rng.beta(8, 2, size=count)}
        start = time.perf_counter()
        found = kth_distance(vectors, arguments.k, seed=0)
        neighbours_done = time.perf_counter()
        scored = columns | {"diversity": diversity(found)}
        values = importance(scored, {"margin": 1.0, "quality": 0.5, "diversity": 0.5})
        kept = top(values, [f"{k:09d}" for k in range(count)], count // 10)
        done = time.perf_counter()
        rows = rng.choice(count, min(SAMPLE, count), replace=False)
        exact, _ = _exact(vectors, rows, arguments.k)
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        results[count] = {
            "method": found.method,
            "exact_up_to": EXACT_LIMIT,
            "seconds_neighbours": neighbours_done - start,
            "seconds_selection": done - neighbours_done,
            "kept": len(kept),
            "recall": found.recall,
            "rank_correlation_with_exact": float(spearmanr(found.distance[rows], exact).statistic),
            "peak_mib_of_process": int(peak.split()[1]) / 1024,
        }
        print(f"{count}: {json.dumps(results[count])}", file=sys.stderr)
    print(json.dumps({"machine": platform.machine(), "dimensions": arguments.dimensions, "sizes": results}, indent=2))


if __name__ == "__main__":
    main()
