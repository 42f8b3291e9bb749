"""The job that samples: completions of the prompts of a shard, in this process or on a worker of a cluster."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from align.config import ClusterSection
from align.generation.engines import make_engine
from align.generation.types import Completion, Engine, Sampling, keyed_prompts
from align.sharding.jobs import Work
from align.sharding.shards import map_shards

SHARDS = "sampled"
"""Folder of the finished shards, below the folder that a caller keeps parts in."""
KL_BATCH_TOKENS = 4096
"""Padded tokens per forward pass of the log-probs."""
FEATURES = {
    "completions": List(
        {
            "text": Value("string"),
            "token_ids": List(Value("int64")),
            "finish_reason": Value("string"),
            "logprobs": List(Value("float64")),
        }
    )
}
LOGP_FEATURES = {name: List(Value("float64")) for name in ("logp_policy", "logp_reference", "kl")}


@dataclass(frozen=True, slots=True)
class SamplingJob:
    """Sample ``sampling.n`` completions of each prompt of a shard (``keyed_prompts``), each drawn under its key.

    Result: ``completions``, a list of n for each prompt; ``completions_of`` reads it. With a ``reference`` also
    ``logp_policy``, ``logp_reference`` and ``kl``, n of each (nats) for each prompt; see
    ``align.models.sample_kl.SampleScores``.

    A prompt that the engine cannot take, such as one that fills the model's window, has no completions and none of
    these. The engine logs its key; the caller counts it.
    """

    model: str
    """Folder (an adapter's too), hub id, or the name that a server uses."""
    sampling: Sampling
    reference: str | None = None
    """Its tokenizer is then used for both models."""

    def load(self) -> Engine:
        """Load the engine.

        Raises:
            AlignError: the engine or the model cannot be used.
        """
        return make_engine(
            self.sampling.engine,
            self.model,
            batch_size=self.sampling.batch_size,
            base_url=self.sampling.base_url,
            options=self.sampling.options,
            tokenizer=self.reference,
        )

    def start(self) -> Work:
        """Load the engine and, if there is one, the reference."""
        engine = self.load()
        log_probs = None if self.reference is None else _LogProbs(engine, self)

        def work(rows: Dataset) -> Dataset:
            prompts = [json.loads(prompt) for prompt in rows["prompt"]]
            keys = list(rows["key"])
            groups = engine.generate(prompts, self.sampling, keys, leaves_out=True)
            table = {"completions": [[asdict(completion) for completion in group] for group in groups]}
            if log_probs is None:
                return Dataset.from_dict(table, features=Features(FEATURES))
            return Dataset.from_dict(table | log_probs(prompts, groups), features=Features(FEATURES | LOGP_FEATURES))

        return work


class _LogProbs:
    """Log-probs and KL of completions of the policy as it was sampled from, to the reference."""

    def __init__(self, engine: Engine, job: SamplingJob) -> None:
        from align.generation.transformers_engine import TransformersEngine
        from align.models.loading import load_policy, place

        assert job.reference is not None and isinstance(engine, TransformersEngine)
        self.engine, self.sampling = engine, job.sampling
        self.reference = engine.model
        if job.reference != job.model:
            loaded = load_policy(job.reference, **({"dtype": "float32"} | dict(job.sampling.options)))
            self.reference = place(loaded, engine.model.device).eval()

    def __call__(self, prompts: list[Any], groups: list[list[Completion]]) -> dict[str, list[list[float]]]:
        from align.models.sample_kl import score_samples

        counts = np.cumsum([len(group) for group in groups])[:-1]
        ids = [self.engine.encode(prompt) for prompt, group in zip(prompts, groups, strict=True) for _ in group]
        sampled = [completion.token_ids for group in groups for completion in group]
        found = score_samples(
            self.engine.model, self.reference, ids, sampled, batch_tokens=KL_BATCH_TOKENS,
            pad_token_id=self.engine.tokenizer.pad_token_id, temperature=self.sampling.temperature,
            truncation=self.sampling.truncation,
        )  # fmt: skip
        return {
            name: [part.tolist() for part in np.split(values, counts)]
            for name, values in zip(LOGP_FEATURES, found, strict=True)
        }


def sample_prompts(
    prompts: list[Any],
    job: SamplingJob,
    folder: Path,
    *,
    size: int,
    what: str,
    cluster: ClusterSection | None = None,
) -> Dataset:
    """The result of a sampling job for all prompts; finished shards stay in ``folder`` until the caller deletes it.

    Args:
        prompts: text or messages, at least one; keyed by their content.
        job: what is sampled.
        folder: for these prompts, this job and this size only.
        size: prompts per shard; a stopped call repeats at most one shard.
        what: shown to the user meanwhile.
        cluster: the cluster whose workers share the prompts; None: this process samples.

    Raises:
        AlignError: the model, the engine or the cluster cannot be used.
    """
    rows = keyed_prompts(prompts)
    return map_shards(rows, job, folder / SHARDS, size=size, what=what, cluster=cluster).whole()


def completions_of(sampled: Dataset) -> list[list[Completion]]:
    """The completions of each prompt of a sampling job's result."""
    return [[Completion(**completion) for completion in group] for group in sampled["completions"]]
