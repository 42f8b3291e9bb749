"""Judge a trained policy on held-out prompts: gold reward and log policy - log reference of each completion."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from align.commands.evaluation_tables import measure_kl, score, write_completions
from align.errors import DataError
from align.evaluation.policies import Policy
from align.generation.types import Sampling
from align.models.loading import load_policy, load_tokenizer
from reward_models.judges import Judge

Decoded = dict[str, dict[str, list[float]]]
"""Temperature -> reward, kl and number of tokens of one completion per prompt."""


def merge_adapter(trained: Path, base: str, target: Path) -> Path:
    """The trained model as a folder with its adapter merged, so that sampling is not slowed by the adapter."""
    policy = load_policy(str(trained), dtype="float32")
    if not hasattr(policy, "merge_and_unload"):
        return trained
    shutil.rmtree(target, ignore_errors=True)  # a killed run may have left half a model
    policy.merge_and_unload().save_pretrained(target)
    load_tokenizer(base).save_pretrained(target)
    return target


def judge_policy(
    policy: Policy, reference: Policy, prompts: list[str], decodings: Sequence[Sampling], judge: Judge, folder: Path
) -> Decoded:
    """Judge one completion of each prompt under each decoding; the reference at temperature 1 has KL 0 to itself."""
    made: Decoded = {}
    for decoding in decodings:
        written = write_completions(policy, prompts, decoding, folder)
        if None in written.table["text"]:
            raise DataError(f"{policy.name}: some prompts do not fit its window, see the log", code="prompt-refused")
        kl = np.zeros(len(prompts))
        if policy.model != reference.model or decoding.temperature != 1:
            kl = measure_kl(written, reference, folder).log_ratios
        made[f"{decoding.temperature:g}"] = {
            "reward": np.round(score(written, judge, folder), 4).tolist(),
            "kl": np.round(kl, 4).tolist(),
            "tokens": [len(ids) for ids in written.table["token_ids"]],
        }
    return made
