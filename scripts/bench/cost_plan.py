"""Hours, memory and traffic of every stage for tables of 10 million to 1 billion pairs. Prints Markdown.

Hours are computed, not measured, from what ``scripts/bench/cost_model.py`` measured on one thread. A stage without a
model takes the seconds measured. A stage with a model takes 2 operations per weight and token, times how much more work
a token was than in a scoring pass, at the share of a GPU's peak that --share assumes. Neighbors, and what a filter does
in one process, come from ``scripts/bench/filter.py``. A cluster is assumed to lose nothing to waiting.

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
from scripts.tables import table

PAIRS = (10_000_000, 100_000_000, 1_000_000_000)
PROMPT, RESPONSE = 200, 300
"""Tokens of a prompt and of a response."""
WORDS_PER_TOKEN, BYTES_PER_TOKEN = 0.75, 4.5
DIMENSIONS = 384
ENCODER, REWARD, POLICY = 22e6, 70e9, 8e9
"""Weights of the models."""
CORES_PER_GPU = 16
SCORED_SHARD, COLUMNS = 512, 12
PROBES = 8
"""Shares that a vector is sent to, at most: the lists that are probed, from filter.py at 1,000,000 x 384."""
NEIGHBOUR_SECONDS, MEASURED_DIMENSIONS = 2.2e-4, 64
"""Seconds per vector for its neighbors among 10 million, from filter.py at that size. In larger tables as many lists of
the same length are probed; only the graph that finds them is deeper."""
SHARE_SECONDS = 2.9
"""What a cluster adds per share of the vectors, from filter.py at 400,000 pairs with and without --cluster."""
DRIVER_SECONDS = 2.8e-5
"""Seconds per pair that a filter reads, sorts, selects and writes, from filter.py at 10 million pairs of short texts,
without the stages that a cluster shares."""
BYTES_OF_A_NUMBER = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """What costs are computed from."""

    cost: dict[str, Any]
    """JSON of cost_model.py."""
    flops: float
    """Operations per second that a GPU really gives."""

    def gpu_seconds(self, stage: str, tokens: float, weights: float) -> float:
        """Seconds per pair on one GPU."""
        return tokens * weights * 2 * self._passes(stage) / self.flops

    def _passes(self, stage: str) -> float:
        """Work per token and weight, as a multiple of a scoring pass."""
        return float(self._coefficients(stage)[1] / self._coefficients("scoring")[1])

    def cpu_seconds(self, stage: str, *terms: float) -> float:
        """Seconds per pair on one core."""
        return float(sum(c * x for c, x in zip(self._coefficients(stage), terms, strict=True)))

    def _coefficients(self, stage: str) -> list[float]:
        found: list[float] = self.cost["stages"][stage]["coefficients"]
        return found


def stages(plan: Plan) -> dict[str, Callable[[float, int], float]]:
    """Stage -> function of the numbers of pairs and GPUs that gives its hours."""
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


def hours(plan: Plan, gpus: list[int]) -> str:
    """Table of hours, a row per stage."""
    columns = [(pairs, count) for pairs in PAIRS for count in gpus]
    body = [[name, *(_hours(of(*column)) for column in columns)] for name, of in stages(plan).items()]
    return table(["hours", *(f"{pairs / 1e6:,.0f}M, {count} GPUs" for pairs, count in columns)], body)


def _hours(value: float) -> str:
    if value < 0.01:
        return "<0.01"
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def sizes(plan: Plan) -> str:
    """Table of memory, traffic and files, a row per number of pairs."""
    returned, sent = plan.cost["stages"]["scoring"]["bytes_returned"], BYTES_PER_TOKEN * (PROMPT + 2 * RESPONSE)
    head = ["pairs", "columns in memory", "vectors on disk", "sent to score, at most", "returned"]
    head += ["sent to shares, at most", "files of scores"]
    body = []
    for pairs in PAIRS:
        visits = min(PROBES, _shares(pairs)) * 4 * DIMENSIONS
        amounts = (COLUMNS * BYTES_OF_A_NUMBER, 4 * DIMENSIONS, sent, returned, visits)
        cells = [f"{pairs * amount / 2**30:,.0f} GiB" for amount in amounts]
        body.append([f"{pairs:,}", *cells, f"{pairs // SCORED_SHARD:,}"])
    return table(head, body)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cost", type=Path, help="JSON of cost_model.py")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 512])
    parser.add_argument("--peak", type=float, default=989e12, help="peak operations per second of one GPU")
    parser.add_argument("--share", type=float, default=0.4, help="share of the peak that is reached")
    arguments = parser.parse_args()
    plan = Plan(json.loads(arguments.cost.read_text(encoding="utf-8")), arguments.peak * arguments.share)
    print(hours(plan, arguments.gpus), sizes(plan), sep="\n\n")


if __name__ == "__main__":
    main()
