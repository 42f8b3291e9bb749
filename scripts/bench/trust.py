"""Seconds of `align trust` on cached features: the whole analysis, by number of pairs. Prints JSON.

Features are Gaussian with a falling spectrum, as principal directions of hidden states have. Labels follow
Bradley-Terry from a gold reward that the features explain in part; margins are gold plus noise.

    python -m scripts.bench.trust --sizes 1000 10000
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
from scipy.special import expit

from align.trust.analysis import analyze
from align.trust.features import DIRECTIONS, uncentered_pca
from align.trust.linear_proxy import Family
from align.trust.measure import FOLDS, REPEATS


def make(count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Differences of hidden states [N, H], chosen minus rejected, and margins [N]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, size)) * np.arange(1, size + 1) ** -0.5
    gold = x @ rng.normal(size=size)
    gold = 1.5 * gold / gold.std() + rng.normal(size=count)
    sign = np.where(rng.random(count) < expit(gold), 1.0, -1.0)
    return x * sign[:, None], gold * sign + 2 * rng.normal(size=count)


def main() -> None:
    """Run the sizes and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", type=int, default=[1000, 10_000])
    parser.add_argument("--hidden", type=int, default=576, help="hidden size of the reference")
    arguments = parser.parse_args()
    results = {}
    for count in arguments.sizes:
        differences, margin = make(count, arguments.hidden, seed=0)
        start, cpu = time.perf_counter(), time.process_time()
        features = uncentered_pca(differences)
        reduced = time.perf_counter()
        rng = np.random.default_rng(0)
        folds = [rng.permutation(count) % FOLDS for _ in range(REPEATS)]
        found = analyze(features, margin, folds, Family(), same_labels=False, seed=0)
        done = time.perf_counter()
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        results[count] = {
            "seconds": done - start,
            "cpu_seconds": time.process_time() - cpu,
            "seconds_reduction": reduced - start,
            "chosen": found["chosen"],
            "peak_mib_of_process": int(peak.split()[1]) / 1024,
        }
    machine = {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0))}
    print(
        json.dumps(
            {**machine, "directions": DIRECTIONS, "folds": FOLDS, "repeats": REPEATS, "sizes": results}, indent=2
        )
    )


if __name__ == "__main__":
    main()
