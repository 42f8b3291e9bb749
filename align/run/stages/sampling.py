"""Sampling in the stages of a run: a section of the run file -> completions of its prompts."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from align.config import EvaluateSection, RunConfig, SampleSection
from align.generation.sampling_job import SamplingJob, sample_prompts
from align.generation.types import Sampling

PARTS = "parts"
"""Folder of the finished shards of an unfinished stage."""
PART = 128
"""Prompts per shard; a stopped stage repeats at most one shard."""


def run_sampling(config: RunConfig, section: SampleSection | EvaluateSection, n: int = 1) -> Sampling:
    """The sampling settings of a section, under the run's seed."""
    assert config.train is not None
    return Sampling(
        section.max_new_tokens,
        section.temperature,
        section.top_p,
        n=n,
        seed=config.seed,
        engine="transformers",
        batch_size=section.batch_size,
        options=config.train.loading,
    )


def sample_in_stage(config: RunConfig, prompts: list[Any], job: SamplingJob, folder: Path, *, what: str) -> Dataset:
    """The result of a sampling job; ``PARTS`` in the stage's ``folder`` keeps the finished shards."""
    return sample_prompts(prompts, job, folder / PARTS, size=PART, what=what, cluster=config.cluster)
