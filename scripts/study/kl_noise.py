"""How much less noise the exact KL of a run's policies has than the estimate by one sample, and whether more would go.

    python -m scripts.study.kl_noise runs/demo

The rest, one-sample minus exact, has mean 0, so it could serve as a control variate: exact - c * rest has the variance
of exact times 1 - r^2, where r is the correlation of both. Prints JSON, one entry per policy.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset


def noise(table: Dataset) -> dict[str, Any]:
    """Means, ratio of variances and correlation from ``logp_policy``, ``logp_reference`` and ``kl`` of completions."""
    exact = np.asarray(table["kl"][:], dtype=np.float64)
    sampled = np.asarray(table["logp_policy"][:], dtype=np.float64) - np.asarray(table["logp_reference"][:])
    r = float(np.corrcoef(exact, sampled - exact)[0, 1])
    ratio = float(sampled.var() / exact.var())
    return {
        "completions": len(exact),
        "exact": float(exact.mean()),
        "by_one_sample": float(sampled.mean()),
        "times_the_variance": ratio,
        "correlation_with_the_rest": r,
        "times_with_control_variate": ratio / (1 - r * r),
    }


def main() -> None:
    """Parse the arguments and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    tables = {
        file.parent.name.removeprefix("generate-"): Dataset.from_parquet(str(file))
        for file in sorted(parser.parse_args().run.glob("generate-*/completions.parquet"))
    }
    print(json.dumps({name: noise(table) for name, table in tables.items() if any(table["kl"][:])}, indent=2))


if __name__ == "__main__":
    main()
