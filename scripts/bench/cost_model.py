"""Seconds and bytes per pair of every stage, fitted on three sizes and checked on a fourth. Prints JSON.

A stage's seconds are modeled as a sum of terms in the sizes of its work (tokens, tokens x weights, words, dimensions x
square root of the table's length). Their coefficients, none of them negative, minimize the relative error on three
sizes; a fourth, larger size is then predicted. Seconds are those of one thread, without start-up. Bytes are those of a
shard's rows as sent to a worker of a cluster, and of the result as it comes back.

    OMP_NUM_THREADS=1 python -m scripts.bench.cost_model --tokenizer .assets/smollm2
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.optimize import nnls
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from align.entanglement.measure import MeasureJob
from align.filtering.knn.ivf_lists import write_inverted_lists
from align.filtering.knn.row_view import View
from align.filtering.knn.search import kth_distance
from align.filtering.knn.top_k import TopK
from align.filtering.score_columns import Embedding
from align.filtering.text_survey import SurveyJob
from align.generation.sampling_job import SamplingJob
from align.generation.types import Sampling, keyed_prompts
from align.io.console import configure, log
from align.losses.registry import resolve
from align.models.tokenization import tokenize_pairs
from align.sharding.arrays import ROWS, as_array, as_table
from align.sharding.jobs import Job, decode, encode
from reward_models.score import ScoreJob
from scripts.bench.ray_cluster import pairs
from scripts.bench.training import batch_of, build, random_pairs, step

WIDTHS = ((128, 2), (192, 4), (256, 6), (384, 8))
"""Hidden size and layers of the models; the last is predicted."""
WORDS = (10, 20, 40, 80)
"""Words per text, for stages without a model."""
VECTORS = ((25_000, 64), (50_000, 96), (50_000, 192), (100_000, 128))
TEXT_WORDS, LONG_WORDS = 24, 200
BATCH_TOKENS = 2048
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Measured:
    """A stage at one size."""

    terms: tuple[float, ...]
    """Terms of the sum that models its seconds, per pair (or per prompt, or per vector)."""
    seconds: float
    """Per pair."""
    sent: float
    """Bytes per pair sent to a worker."""
    returned: float
    """Bytes per pair that come back."""


def best(work: Callable[[], Any]) -> float:
    """CPU seconds of ``work``: the minimum of ``REPEATS`` calls after one warm-up."""
    taken = []
    for _ in range(REPEATS + 1):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken[1:])


def measure_job(job: Job, rows: Dataset, terms: tuple[float, ...]) -> Measured:
    """What a job costs per row of ``rows``."""
    work, count = job.start(), len(rows)
    sent, made = encode(rows), work(rows)
    return Measured(terms, best(lambda: work(rows)) / count, len(sent) / count, len(encode(made)) / count)


class Models:
    """Random models of every width, with a real tokenizer."""

    def __init__(self, folder: Path, tokenizer: str) -> None:
        self.folder, self.tokenizer = folder, AutoTokenizer.from_pretrained(tokenizer)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def make(self, kind: type[PreTrainedModel], width: int, layers: int) -> tuple[str, float]:
        """Model folder, and the number of weights that each token is multiplied by."""
        torch.manual_seed(0)
        model = kind(self._config(kind, width, layers))
        place = self.folder / f"{kind.__name__}-{width}"
        if not place.exists():
            model.save_pretrained(place)
            self.tokenizer.save_pretrained(place)
        return str(place), sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))

    def _config(self, kind: type[PreTrainedModel], width: int, layers: int) -> PretrainedConfig:
        common = {
            "vocab_size": len(self.tokenizer), "hidden_size": width, "num_hidden_layers": layers,
            "num_attention_heads": width // 32, "intermediate_size": 3 * width,
            "pad_token_id": self.tokenizer.pad_token_id,
        }  # fmt: skip
        if kind is BertModel:
            return BertConfig(**common)
        return LlamaConfig(**common, tie_word_embeddings=True, num_labels=1)

    def tokens(self, texts: list[str]) -> float:
        """Mean number of tokens per text."""
        return float(np.mean([len(ids) for ids in self.tokenizer(texts)["input_ids"]]))


def texts(models: Models) -> Iterator[Measured]:
    """What a filter's rules read of each text; terms: 1, words."""
    for words in WORDS:
        asked = SurveyJob(np.empty(0, dtype=np.uint64), near=True, language=False)
        yield measure_job(asked, pairs(4096, words), (1.0, 3.0 * words))


def embedding(models: Models) -> Iterator[Measured]:
    """An encoder over the prompts; terms: tokens, tokens x weights."""
    table = pairs(256, TEXT_WORDS).select_columns(["prompt"])
    tokens = models.tokens(table["prompt"][:])
    for width, layers in WIDTHS:
        model, weights = models.make(BertModel, width, layers)
        yield measure_job(Embedding(model, None), table, (tokens, tokens * weights))


def scoring(models: Models) -> Iterator[Measured]:
    """A reward model over both responses; terms: tokens, tokens x weights."""
    table = pairs(128, TEXT_WORDS)
    tokens = 2 * models.tokens([a + b for a, b in zip(table["prompt"], table["chosen"], strict=True)])
    for width, layers in WIDTHS:
        model, weights = models.make(LlamaForSequenceClassification, width, layers)
        yield measure_job(ScoreJob(model, BATCH_TOKENS, 1024), table, (tokens, tokens * weights))


def completions(models: Models) -> Iterator[Measured]:
    """Sampling with transformers, per prompt; terms: tokens, tokens x weights."""
    table, new = keyed_prompts(pairs(32, TEXT_WORDS)["prompt"][:]), 24
    for width, layers in WIDTHS:
        model, weights = models.make(LlamaForCausalLM, width, layers)
        job = SamplingJob(model, Sampling(new, engine="transformers"))
        yield measure_job(job, table, (new, new * weights))


def entanglement(models: Models) -> Iterator[Measured]:
    """Gradient products; terms: tokens, tokens x weights."""
    table = pairs(16, TEXT_WORDS).add_column("id", [str(k) for k in range(16)])
    for width, layers in WIDTHS:
        model, weights = models.make(LlamaForCausalLM, width, layers)
        rows = tokenize_pairs(table, models.tokenizer)
        tokens = float(
            np.mean([2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows])
        )
        job = MeasureJob(model, None, resolve("dpo", {}), None, BATCH_TOKENS, 1024)
        yield measure_job(job, rows, (tokens, tokens * weights))


def training(models: Models) -> Iterator[Measured]:
    """Forward and backward pass of a step with shared prompts; terms: tokens, tokens x weights."""
    prompt, completion, count = 48, 48, 8
    rows = random_pairs(prompt, completion, count, len(models.tokenizer))
    tokens = float(prompt + 2 * completion)
    for width, layers in WIDTHS:
        model, weights = models.make(LlamaForCausalLM, width, layers)
        with tempfile.TemporaryDirectory() as folder:
            trainer = build("shared_prefix", model, Path(folder), rows, False, "madpo")
            batch = batch_of(trainer, rows)
            seconds = min(step(trainer, batch)[0] for _ in range(REPEATS + 1))
        yield Measured((tokens, tokens * weights), seconds / count, 0.0, 0.0)


def neighbors(models: Models) -> Iterator[Measured]:
    """Nearest neighbors by an inverted file; terms: 1, dimensions x root of the number of vectors."""
    for count, size in VECTORS:
        rng = np.random.default_rng(0)
        centers = rng.normal(size=(count // 200, size))
        vectors = centers[rng.integers(0, len(centers), count)] + 0.6 * rng.normal(size=(count, size))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        start = time.process_time()
        kth_distance(vectors, 5, seed=0, method="ivf")
        yield Measured((1.0, size * count**0.5), (time.process_time() - start) / count, 0.0, 0.0)


STAGES: dict[str, Callable[[Models], Iterator[Measured]]] = {
    "texts": texts,
    "embedding": embedding,
    "scoring": scoring,
    "completions": completions,
    "entanglement": entanglement,
    "training": training,
    "neighbours": neighbors,
}


def fitted(found: list[Measured]) -> dict[str, Any]:
    """Coefficients fitted on all sizes but the last, and their error at the last."""
    known, last = found[:-1], found[-1]
    relative = np.array([one.terms for one in known]) / np.array([[one.seconds] for one in known])
    scale = relative.max(axis=0)
    coefficients = nnls(relative / scale, np.ones(len(known)))[0] / scale
    predicted = float(coefficients @ np.array(last.terms))
    return {
        "coefficients": coefficients.tolist(),
        "measured": [{"terms": one.terms, "seconds": one.seconds} for one in found],
        "predicted": predicted,
        "error": predicted / last.seconds - 1,
        "bytes_sent": last.sent,
        "bytes_returned": last.returned,
    }


def through_one_process(count: int = 512) -> float:
    """Seconds per pair that the driver process spends on sending shards to score and on receiving the results.

    The pairs are as long as those of scripts/bench/cost_plan.py.
    """
    table = pairs(count, LONG_WORDS)
    made = encode(Dataset.from_dict({"reward_chosen": [0.5] * count, "reward_rejected": [0.25] * count}))
    return best(lambda: (encode(table), decode(made))) / count


def visit_through_one_process(count: int = 40_000, size: int = 384, probes: int = 8) -> float:
    """Seconds that the driver process spends per vector on sending it to one share of the others, on receiving its
    neighbors there and on keeping the best."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(count, size)).astype(np.float32)
    near = rng.integers(0, 160, size=(count, probes)).astype(np.int32)
    found = as_table({
        "similarity": rng.random((ROWS, 5)).astype(np.float32), "place": rng.integers(0, count, (ROWS, 5)),
    })  # fmt: skip
    answer = encode(found)
    with tempfile.TemporaryDirectory() as folder:
        visitors = write_inverted_lists(View(vectors), near, 160, Path(folder) / "by-list").queries(0)
        best_of = TopK(Path(folder) / "best", count, 5)

        def visit() -> None:
            encode(visitors.select(range(ROWS)))
            table = decode(answer)
            best_of.merge(0, visitors.positions[:ROWS], {name: as_array(table, name) for name in table.column_names})

        return best(visit) / ROWS


def main() -> None:
    """Measure every stage, fit its coefficients and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default=".assets/smollm2")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    arguments = parser.parse_args()
    configure()
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder), arguments.tokenizer)
        for name in arguments.stages:
            results[name] = fitted(list(STAGES[name](models)))
            log.info("%s: off by %.0f%% at the fourth size", name, 100 * results[name]["error"])
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    one = {"through_one_process": through_one_process(), "visit_through_one_process": visit_through_one_process()}
    print(json.dumps(machine | one | {"stages": results}, indent=2))


if __name__ == "__main__":
    main()
