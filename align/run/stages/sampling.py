"""Sampling in the stages of a run: a section of the run file -> completions of its prompts."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from align.config import RunConfig
from align.config.decoding import DecodingSection
from align.generation.logp_job import LogpJob
from align.generation.sampling_job import LOGP_FEATURES, SamplingJob, sample_prompts
from align.generation.types import Completion, EngineName, Sampling
from align.run.engines import engine_of
from align.sharding.shards import map_shards

PARTS = "parts"
"""Folder of the finished shards of an unfinished stage."""
PART = 128
"""Prompts per shard; a stopped stage repeats at most one shard."""


def run_sampling(config: RunConfig, section: DecodingSection, n: int = 1) -> Sampling:
    """The sampling settings of a section, under the run's seed.

    Raises:
        ConfigError: see ``engine_of``.
    """
    engine = engine_of(config, section)
    return Sampling(
        section.max_new_tokens,
        section.temperature,
        section.top_p,
        n=n,
        seed=config.seed,
        engine=engine,
        batch_size=section.batch_size,
        base_url=section.base_url,
        options=_options(config, section, engine),
        top_k=section.top_k,
        min_p=section.min_p,
        stop=tuple(section.stop),
    )


def sampled_model(config: RunConfig, section: DecodingSection) -> str:
    """The policy that pairs are sampled from: its folder or hub id, or its name on a server."""
    assert config.train is not None
    return section.served_as or config.train.model


def _options(config: RunConfig, section: DecodingSection, engine: EngineName) -> dict[str, Any]:
    """Arguments of what loads the policy: those of the training and the section's dtype, or the engine's options."""
    assert config.train is not None
    dtype = {} if section.dtype is None else {"dtype": section.dtype}
    if engine == "transformers":
        return config.train.loading | dtype
    trusted = {"trust_remote_code": True} if engine == "vllm" and config.train.trusts_remote_code else {}
    return trusted | dtype | section.options


def sample_in_stage(config: RunConfig, prompts: list[Any], job: SamplingJob, folder: Path, *, what: str) -> Dataset:
    """The result of a sampling job; ``PARTS`` in the stage's ``folder`` keeps the finished shards."""
    return sample_prompts(prompts, job, folder / PARTS, size=PART, what=what, cluster=config.cluster)


def log_probs_in_stage(
    config: RunConfig, prompts: list[Any], groups: list[list[Completion]], job: LogpJob, folder: Path, *, what: str
) -> dict[str, list[float | None]]:
    """The scores, by column, of the first completion of each prompt, which an engine without them has sampled.

    None for a prompt without a completion.
    """
    done = [k for k, group in enumerate(groups) if group]
    columns = {
        "prompt": [json.dumps(prompts[k]) for k in done],
        "token_ids": [groups[k][0].token_ids for k in done],
    }
    parts = folder / PARTS / "log-probs"
    found = map_shards(Dataset.from_dict(columns), job, parts, size=PART, what=what, cluster=config.cluster).whole()
    scores: dict[str, list[float | None]] = {name: [None] * len(prompts) for name in LOGP_FEATURES}
    for name, column in scores.items():
        for k, value in zip(done, found[name], strict=True):
            column[k] = value
    return scores
