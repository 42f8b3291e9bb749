"""What every stage costs per pair: seconds and bytes, fitted on three sizes and checked on a fourth. Prints JSON.

A stage's seconds are a sum of terms in the sizes of its work (tokens, tokens x parameters, words, dimensions x root of
the table's length), whose coefficients, none of them negative, are fitted to relative errors on three sizes; a fourth,
larger one is then predicted. The seconds are those of one thread, without what a start costs. Bytes are those of a
shard's rows as they are sent to a worker of a cluster, and of the result on its way back.

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

from align.commands.evaluation_tables import CompletionJob, Decoding
from align.entanglement.measure import MeasureJob
from align.filtering.knn.ivf_lists import in_lists
from align.filtering.knn.row_view import View
from align.filtering.knn.search import kth_distance
from align.filtering.knn.top_k import Best
from align.filtering.score_columns import Embedding
from align.filtering.text_survey import Asked
from align.generation.types import keyed_prompts
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
"""Of each text, where no model reads it."""
VECTORS = ((25_000, 64), (50_000, 96), (50_000, 192), (100_000, 128))
TEXT_WORDS, LONG_WORDS = 24, 200
BATCH_TOKENS = 2048
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Measured:
    """A stage at one size."""

    terms: tuple[float, ...]
    """Of the sum that its seconds are, per pair (or what is counted in its place)."""
    seconds: float
    """Per pair."""
    sent: float
    """Bytes per pair on the way to a worker."""
    returned: float


def best(work: Callable[[], Any]) -> float:
    """Seconds of the processor, the least of ``REPEATS`` after a first time."""
    taken = []
    for _ in range(REPEATS + 1):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken[1:])


def of_job(job: Job, rows: Dataset, terms: tuple[float, ...]) -> Measured:
    """A job's work on some rows."""
    work, count = job.start(), len(rows)
    sent, made = encode(rows), work(rows)
    return Measured(terms, best(lambda: work(rows)) / count, len(sent) / count, len(encode(made)) / count)


class Models:
    """Random models of every width, with a real tokenizer."""

    def __init__(self, folder: Path, tokenizer: str) -> None:
        self.folder, self.tokenizer = folder, AutoTokenizer.from_pretrained(tokenizer)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def make(self, kind: type[PreTrainedModel], width: int, layers: int) -> tuple[str, float]:
        """Folder, and the weights that a token is multiplied by."""
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
        """Per text."""
        return float(np.mean([len(ids) for ids in self.tokenizer(texts)["input_ids"]]))


def texts(models: Models) -> Iterator[Measured]:
    """What the rules of a filter need; terms: 1, words."""
    for words in WORDS:
        asked = Asked(np.empty(0, dtype=np.uint64), near=True, language=False)
        yield of_job(asked, pairs(4096, words), (1.0, 3.0 * words))


def embedding(models: Models) -> Iterator[Measured]:
    """An encoder over the prompts; terms: tokens, tokens x weights."""
    table = pairs(256, TEXT_WORDS).select_columns(["prompt"])
    tokens = models.tokens(table["prompt"][:])
    for width, layers in WIDTHS:
        model, weights = models.make(BertModel, width, layers)
        yield of_job(Embedding(model, None), table, (tokens, tokens * weights))


def scoring(models: Models) -> Iterator[Measured]:
    """A reward model over both responses; terms: tokens, tokens x weights."""
    table = pairs(128, TEXT_WORDS)
    tokens = 2 * models.tokens([a + b for a, b in zip(table["prompt"], table["chosen"], strict=True)])
    for width, layers in WIDTHS:
        model, weights = models.make(LlamaForSequenceClassification, width, layers)
        yield of_job(ScoreJob(model, BATCH_TOKENS, 1024), table, (tokens, tokens * weights))


def completions(models: Models) -> Iterator[Measured]:
    """Sampling with transformers, per prompt; terms: tokens, tokens x weights."""
    table, new = keyed_prompts(pairs(32, TEXT_WORDS)["prompt"][:]), 24
    for width, layers in WIDTHS:
        model, weights = models.make(LlamaForCausalLM, width, layers)
        job = CompletionJob(model, Decoding(new, temperature=1.0, seed=0, batch_size=32, engine="transformers"))
        yield of_job(job, table, (new, new * weights))


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
        yield of_job(job, rows, (tokens, tokens * weights))


def training(models: Models) -> Iterator[Measured]:
    """Forward and backward of a step with prompts shared; terms: tokens, tokens x weights."""
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


def neighbours(models: Models) -> Iterator[Measured]:
    """Inverted file; terms: 1, dimensions x root of the number of vectors."""
    for count, size in VECTORS:
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(count // 200, size))
        vectors = centres[rng.integers(0, len(centres), count)] + 0.6 * rng.normal(size=(count, size))
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
    "neighbours": neighbours,
}


def fitted(found: list[Measured]) -> dict[str, Any]:
    """Coefficients from all sizes but the last, and how far they are off there."""
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
    """Seconds a pair that sending shards to score and taking them back costs the process that gave the command.

    Of pairs as long as those that plans are made for.
    """
    table = pairs(count, LONG_WORDS)
    made = encode(Dataset.from_dict({"reward_chosen": [0.5] * count, "reward_rejected": [0.25] * count}))
    return best(lambda: (encode(table), decode(made))) / count


def visit_through_one_process(count: int = 40_000, size: int = 384, probes: int = 8) -> float:
    """Seconds that it costs the process that gave the command to send one vector to one share of the others, take back
    its neighbours there, and keep the best."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(count, size)).astype(np.float32)
    near = rng.integers(0, 160, size=(count, probes)).astype(np.int32)
    found = as_table({
        "similarity": rng.random((ROWS, 5)).astype(np.float32), "place": rng.integers(0, count, (ROWS, 5)),
    })  # fmt: skip
    answer = encode(found)
    with tempfile.TemporaryDirectory() as folder:
        visitors = in_lists(View(vectors), near, 160, Path(folder) / "by-list").visitors(0)
        best_of = Best(Path(folder) / "best", count, 5)

        def visit() -> None:
            encode(visitors.select(range(ROWS)))
            table = decode(answer)
            best_of.add(0, visitors.positions[:ROWS], {name: as_array(table, name) for name in table.column_names})

        return best(visit) / ROWS


def main() -> None:
    """Measure, fit, check."""
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
