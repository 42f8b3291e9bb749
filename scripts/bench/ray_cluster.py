"""Compare scoring on a local Ray cluster with scoring in this process: seconds per pair and of start-up. Prints JSON.

The model is a small random BERT, so that sending a shard weighs as much as it ever will. Both ways are timed at two
sizes: the slope is the time per pair, the intercept the start-up.

    python -m scripts.bench.ray_cluster --sizes 2048 8192 --workers 2
"""

import argparse
import io
import json
import os
import platform
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from align.config import ClusterSection
from align.sharding.jobs import encode
from align.sharding.shards import map_shards
from reward_models.ensemble import SHARD
from reward_models.score import ScoreJob


def small_model(folder: Path, tokenizer: str) -> Path:
    """A random BERT of two layers with a reward head, and a real tokenizer."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(loaded), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        num_labels=1,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    loaded.save_pretrained(folder)
    return folder


def pairs(count: int, words: int) -> Dataset:
    """Pairs of random words."""
    rng = random.Random(0)
    vocabulary = "the film plot was not very good awful great dull long short scene actor story end"
    texts = [" ".join(rng.choices(vocabulary.split(), k=words)) for _ in range(3 * count)]
    return Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), (texts[k::3] for k in range(3)), strict=True)))


def timed(table: Dataset, job: ScoreJob, cluster: ClusterSection | None) -> tuple[float, Dataset]:
    """Seconds of scoring ``table``, and its rewards."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        made = map_shards(table, job, Path(folder), size=SHARD, what="scoring", cluster=cluster)
        return time.perf_counter() - start, made.whole()


def main() -> None:
    """Score both sizes in both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs=2, type=int, default=[2048, 8192], help="pairs")
    parser.add_argument("--words", type=int, default=24, help="words of a text")
    parser.add_argument("--tokenizer", default=".assets/minilm", help="folder of the tokenizer")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    tables = [pairs(count, arguments.words) for count in arguments.sizes]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        job = ScoreJob(str(small_model(Path(folder) / "model", arguments.tokenizer)), 4096, 256)
        cluster = ClusterSection(address="local", workers=arguments.workers)
        results = []
        for name, where in (("here", None), ("cluster", cluster)):
            seconds, tables_made = zip(*(timed(table, job, where) for table in tables), strict=True)
            results.append(tables_made[-1])
            a_pair = (seconds[1] - seconds[0]) / (arguments.sizes[1] - arguments.sizes[0])
            found[name] = {
                "seconds": seconds,
                "milliseconds_a_pair": 1000 * a_pair,
                "seconds_of_start": seconds[0] - a_pair * arguments.sizes[0],
            }
    shard = tables[-1].select(range(SHARD))
    there, back = len(encode(shard)), len(encode(results[-1].select(range(SHARD))))
    raw = io.BytesIO()
    shard.to_json(raw)
    found["equal"] = results[0].to_list() == results[1].to_list()
    found["bytes_a_pair"] = {"text": raw.tell() / SHARD, "sent": there / SHARD, "returned": back / SHARD}
    found["time_of_a_pair_to_here"] = found["cluster"]["milliseconds_a_pair"] / found["here"]["milliseconds_a_pair"]
    machine = {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0))}
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    print(json.dumps({**machine, "threads_here": threads, "workers": arguments.workers, **found}, indent=2))


if __name__ == "__main__":
    main()
