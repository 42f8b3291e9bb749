"""What the last stages do: completions of every policy on held-out prompts, and what they are worth."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.config import EvaluateSection, RunConfig
from align.data.pairs import read_pairs
from align.data.prompts import load_prompts
from align.data.statistics import missing_values
from align.data.text import plain
from align.evaluation.rewards import gain_per_root_kl, reward_differences
from align.generation.transformers_engine import TransformersEngine
from align.generation.types import Sampling, as_completion, keyed_prompts
from align.io.files import write_json
from align.models.completion_logps import completion_logps
from align.models.loading import load_merged_policy, load_policy, load_tokenizer
from align.run.stages.reward import METRICS, make_scorer
from align.sharding.jobs import Work
from align.sharding.shards import map_shards
from align.stats import bootstrap_mean, correlation
from align.training.train import MODEL
from reward_models.judges import make_judge

COMPLETIONS = "completions.parquet"
KL_BATCH_TOKENS = 4096
PARTS, PART = "parts", 128
"""Folder of finished parts, and prompts of one: a stopped stage makes at most one of them again."""


def stage_generate(config: RunConfig, root: Path, folder: Path, which: str) -> None:
    """One completion of each held-out prompt by policy ``which``, its log-probs under policy and reference."""
    assert config.evaluate is not None and config.train is not None
    prompts = load_prompts(config.evaluate.prompts)
    trained = None if which == "reference" else str(root / f"train-{which}" / MODEL)
    job = PolicyJob(config.train.model, trained, config.train.trusts_remote_code, config.evaluate, config.seed)
    rows, what = keyed_prompts(prompts), f"completions of {which}"
    made = map_shards(rows, job, folder / PARTS, size=PART, what=what, cluster=config.cluster)
    made.whole().to_parquet(str(folder / COMPLETIONS))
    shutil.rmtree(folder / PARTS)


@dataclass(frozen=True, slots=True)
class PolicyJob:
    """Completions of the prompts (JSON) of a shard and their log-probs."""

    reference: str
    trained: str | None
    """None: the reference itself completes."""
    trust_remote_code: bool
    settings: EvaluateSection
    seed: int

    def start(self) -> Work:
        """Load both models."""
        settings, trusted = self.settings, self.trust_remote_code
        tokenizer = load_tokenizer(self.reference, trust_remote_code=trusted)
        reference = load_policy(self.reference, dtype="float32", trust_remote_code=trusted).eval()
        policy = reference
        if self.trained is not None:
            policy = load_merged_policy(self.trained, dtype="float32", trust_remote_code=trusted).eval()
        engine = TransformersEngine(policy, tokenizer, batch_size=settings.batch_size)
        sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, n=1, seed=self.seed)

        def work(rows: Dataset) -> Dataset:
            own = [json.loads(prompt) for prompt in rows["prompt"]]
            completions = [group[0] for group in engine.generate(own, sampling, list(rows["key"]))]
            ids = [engine.encode(prompt) for prompt in own]
            sampled = [completion.token_ids for completion in completions]
            budget = {"batch_tokens": KL_BATCH_TOKENS, "pad_token_id": tokenizer.pad_token_id}
            own_logps = completion_logps(policy, ids, sampled, temperature=settings.temperature, **budget)
            same = policy is reference and settings.temperature == 1
            reference_logps = own_logps if same else completion_logps(reference, ids, sampled, **budget)
            return Dataset.from_dict(
                {
                    "prompt": own,
                    "text": [completion.text for completion in completions],
                    "tokens": [len(token_ids) for token_ids in sampled],
                    "logp_policy": own_logps,
                    "logp_reference": reference_logps,
                }
            )

        return work


def stage_evaluate(config: RunConfig, root: Path, folder: Path, which: str) -> None:
    """Gold reward, KL to the reference and their ratio for every policy; gold correlation of the margins."""
    assert config.evaluate is not None and config.train is not None
    judge = make_judge(config.evaluate.judge)
    tables = {
        name: Dataset.from_parquet(str(root / f"generate-{name}" / COMPLETIONS))
        for name in ("reference", *config.train.methods)
    }
    rewards = {name: judge.score(table["prompt"], table["text"]) for name, table in tables.items()}
    result = reward_differences(rewards, baseline="reference", seed=config.seed)
    for name, table in tables.items():
        policy = result["policies"][name]
        policy["mean_tokens"] = float(np.mean(table["tokens"]))
        policy |= {"kl": None, "gain_per_root_kl": None}
        if name == "reference" or config.evaluate.top_p < 1:  # what a nucleus leaves out has no log-probability
            continue
        kl = np.asarray(table["logp_policy"]) - np.asarray(table["logp_reference"])
        policy["kl"] = bootstrap_mean(kl, seed=config.seed).to_dict()
        if config.evaluate.temperature == 1:  # else gain and KL are counted from two origins
            ratio = gain_per_root_kl(rewards[name] - rewards["reference"], kl, seed=config.seed)
            policy["gain_per_root_kl"] = ratio and ratio.to_dict()
    for name, gain in _reward_model_gains(config, root, tables).items():
        result["policies"][name]["reward_model_gain"] = gain
    result["judge"] = judge.name
    result["n_prompts"] = len(tables["reference"])
    result["gold_correlation"] = _gold_correlation(read_pairs(root / "margins" / "pairs"), judge)
    result["samples"] = [
        {
            "prompt": plain(tables["reference"]["prompt"][k]),
            "completions": {
                name: {"text": table["text"][k], "reward": float(rewards[name][k])} for name, table in tables.items()
            },
        }
        for k in range(min(config.evaluate.samples_shown, len(tables["reference"])))
    ]
    write_json(folder / METRICS, result)


def _reward_model_gains(config: RunConfig, root: Path, tables: dict[str, Dataset]) -> dict[str, dict[str, float]]:
    """Policy -> paired gain over the reference under the run's own reward model, the signal that training followed."""
    if config.reward is None:
        return {}
    scorer = make_scorer(root / "reward" / MODEL, config.reward)
    rewards = {
        name: scorer.score_completions(
            table["prompt"], [as_completion(*row) for row in zip(table["prompt"], table["text"], strict=True)]
        )
        for name, table in tables.items()
    }
    found = reward_differences(rewards, baseline="reference", seed=config.seed)["policies"]
    return {name: policy["gain"] for name, policy in found.items() if policy["gain"] is not None}


def _gold_correlation(pairs: Dataset, judge: Any) -> dict[str, float] | None:
    """Pearson correlation of the margins that there are with the judge's, 95% interval by Fisher's z."""
    if "margin" not in pairs.column_names:
        return None
    pairs = pairs.select(np.setdiff1d(np.arange(len(pairs)), missing_values(pairs, "margin")))
    gold = judge.score(pairs["prompt"], pairs["chosen"]) - judge.score(pairs["prompt"], pairs["rejected"])
    return correlation(pairs["margin"], gold)
