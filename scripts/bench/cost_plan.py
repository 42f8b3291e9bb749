"""Hours, memory and traffic of every stage for tables of 10 million to 1 billion pairs. Prints Markdown.

Computed, not measured, from what ``scripts/bench/cost_model.py`` measured on one thread: for stages without a model its
seconds; for stages with one how much more work a token is than in a scoring pass, times 2 operations a weight, at the
share of a GPU's peak that --share assumes. Neighbours, and what one process does of a filter, are from
``scripts/bench/filter.py``. A cluster is assumed to lose nothing to waiting.

    python -m scripts.bench.cost_model > cost.json && python -m scripts.bench.cost_plan cost.json
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.filtering.knn.ivf_lists import SHARE_BYTES

PAIRS = (10_000_000, 100_000_000, 1_000_000_000)
PROMPT, RESPONSE = 200, 300
"""Tokens."""
WORDS_PER_TOKEN, BYTES_PER_TOKEN = 0.75, 4.5
DIMENSIONS = 384
ENCODER, REWARD, POLICY = 22e6, 70e9, 8e9
"""Weights."""
CORES_PER_GPU = 16
SCORED_SHARD, COLUMNS = 512, 12
PROBES = 8
"""Shares that a vector is sent to, at most: the lists that it looks into, of bench_filter.py at 1,000,000 x 384."""
NEIGHBOUR_SECONDS, MEASURED_DIMENSIONS = 2.2e-4, 64
"""Of a vector whose neighbours are looked for among 10 million: bench_filter.py at that size. In larger tables
it looks into as many lists of the same length; only the graph that finds them is deeper."""
SHARE_SECONDS = 2.9
"""More than without a cluster for each share of the vectors: bench_filter.py at 400,000 with and without --cluster."""
DRIVER_SECONDS = 2.8e-5
"""Of a pair that a filter reads, sorts, selects and writes: bench_filter.py at 10 million pairs of short texts, without
the stages that a cluster shares."""
BYTES_OF_A_NUMBER = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """What costs are computed from."""

    cost: dict[str, Any]
    """Of cost_model.py."""
    flops: float
    """Operations a second that a GPU really gives."""

    def gpu_seconds(self, stage: str, tokens: float, weights: float) -> float:
        """Of one pair on one GPU."""
        return tokens * weights * 2 * self._passes(stage) / self.flops

    def _passes(self, stage: str) -> float:
        """Work of a token and weight in passes of scoring."""
        return float(self._coefficients(stage)[1] / self._coefficients("scoring")[1])

    def cpu_seconds(self, stage: str, *terms: float) -> float:
        """Of one pair on one core."""
        return float(sum(c * x for c, x in zip(self._coefficients(stage), terms, strict=True)))

    def _coefficients(self, stage: str) -> list[float]:
        found: list[float] = self.cost["stages"][stage]["coefficients"]
        return found


def stages(plan: Plan) -> dict[str, Callable[[float, int], float]]:
    """Hours of each stage, for so many pairs and GPUs."""
    pair, both = PROMPT + 2 * RESPONSE, 2 * (PROMPT + RESPONSE)
    words = WORDS_PER_TOKEN * pair

    def on_gpus(stage: str, tokens: float, weights: float) -> Callable[[float, int], float]:
        return lambda pairs, gpus: pairs * plan.gpu_seconds(stage, tokens, weights) / gpus / 3600

    return {
        "scores of a 70B reward model": on_gpus("scoring", both, REWARD),
        "embeddings by MiniLM": on_gpus("embedding", PROMPT, ENCODER),
        "gradient products of an 8B policy": on_gpus("entanglement", both, POLICY),
        "an epoch of an 8B policy": on_gpus("training", pair, POLICY),
        "texts read by the filter": lambda pairs, gpus: (
            pairs * plan.cpu_seconds("texts", 1, words) / (CORES_PER_GPU * gpus) / 3600
        ),
        "neighbours": lambda pairs, gpus: (
            pairs * NEIGHBOUR_SECONDS * DIMENSIONS / MEASURED_DIMENSIONS / (CORES_PER_GPU * gpus) / 3600
        ),
        "one process: shards sent to score and taken back": lambda pairs, gpus: (
            pairs * plan.cost["through_one_process"] / 3600
        ),
        "one process: a filter's reading, sorting, writing": lambda pairs, gpus: pairs * DRIVER_SECONDS / 3600,
        "one process: vectors sent to the shares, at most": lambda pairs, gpus: (
            pairs * min(PROBES, _shares(pairs)) * plan.cost["visit_through_one_process"] / 3600
        ),
        "one after the other: shares of the vectors": lambda pairs, gpus: _shares(pairs) * SHARE_SECONDS / 3600,
    }


def _shares(pairs: float) -> int:
    return math.ceil(pairs * 4 * DIMENSIONS / SHARE_BYTES)


def table(plan: Plan, gpus: list[int]) -> str:
    """Hours, a row for each stage."""
    columns = [(pairs, count) for pairs in PAIRS for count in gpus]
    lines = [
        "| hours | " + " | ".join(f"{pairs / 1e6:,.0f}M, {count} GPUs" for pairs, count in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name, hours in stages(plan).items():
        lines.append(f"| {name} | " + " | ".join(_hours(hours(*column)) for column in columns) + " |")
    return "\n".join(lines)


def _hours(value: float) -> str:
    return (
        f"{value:,.0f}"
        if value >= 10
        else f"{value:.1f}"
        if value >= 1
        else f"{value:.2f}"
        if value >= 0.01
        else "<0.01"
    )


def sizes(plan: Plan) -> str:
    """Memory, traffic and files, a row for each number of pairs."""
    returned, sent = plan.cost["stages"]["scoring"]["bytes_returned"], BYTES_PER_TOKEN * (PROMPT + 2 * RESPONSE)
    lines = [
        "| pairs | columns in memory | vectors on disk | sent to score, at most | returned | sent to shares, at most "
        "| files of scores |",
        "|---" * 7 + "|",
    ]
    for pairs in PAIRS:
        visits = min(PROBES, _shares(pairs)) * 4 * DIMENSIONS
        amounts = (COLUMNS * BYTES_OF_A_NUMBER, 4 * DIMENSIONS, sent, returned, visits)
        cells = " | ".join(f"{pairs * amount / 2**30:,.0f} GiB" for amount in amounts)
        lines.append(f"| {pairs:,} | {cells} | {pairs // SCORED_SHARD:,} |")
    return "\n".join(lines)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cost", type=Path, help="JSON of cost_model.py")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 512])
    parser.add_argument("--peak", type=float, default=989e12, help="operations a second of one GPU")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak")
    arguments = parser.parse_args()
    plan = Plan(json.loads(arguments.cost.read_text(encoding="utf-8")), arguments.peak * arguments.share)
    print(table(plan, arguments.gpus), sizes(plan), sep="\n\n")


if __name__ == "__main__":
    main()
