"""The last stages of a run: completions of every policy on held-out prompts, and their rewards and KL."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.config import RunConfig
from align.config.columns import TEMPLATE_COLUMNS
from align.data.messages import argument_cells, split_arguments, with_arguments
from align.data.pairs import read_pairs
from align.data.prompts import load_prompts
from align.data.statistics import missing_values
from align.data.text import plain
from align.evaluation.compare_policies import (
    KlSamples,
    PolicySamples,
    compare_policies,
    first_samples,
    mean_of_clusters,
    prompt_ids,
)
from align.evaluation.left_out import completed_by_all
from align.evaluation.rewards import reward_differences
from align.generation.sampling_job import LOGP_FEATURES, SamplingJob, completions_of
from align.generation.types import as_completion
from align.io.files import write_json
from align.models.template_arguments import report_other_arguments
from align.run.plan import REFERENCE
from align.run.stages.reward import METRICS, make_scorer
from align.run.stages.sampling import PARTS, run_sampling, sample_in_stage
from align.stats import correlation
from align.training.train import MODEL
from reward_models.judges import Judge, make_judge

COMPLETIONS = "completions.parquet"


def stage_generate(config: RunConfig, folder: Path, policy: str) -> None:
    """Write one completion of each held-out prompt by a policy, and its log-probs under policy and reference.

    A prompt that the policy cannot complete, such as one that fills its window, has null values.
    """
    assert config.evaluate is not None and config.train is not None
    prompts = load_prompts(config.evaluate.prompts, config.evaluate.chat_template_kwargs)
    reference = config.train.model
    model = reference if policy == REFERENCE else str(config.folder / f"train-{policy}" / MODEL)
    report_other_arguments(prompts, model, trust_remote_code=config.train.trusts_remote_code)
    job = SamplingJob(model, run_sampling(config, config.evaluate), reference)
    sampled = sample_in_stage(config, prompts, job, folder, what=f"completions of {policy}")
    groups = completions_of(sampled)
    completed_by_all(prompts, {policy: [bool(group) for group in groups]})
    table = {
        "prompt": [split_arguments(prompt)[0] for prompt in prompts],
        "text": [group[0].text if group else None for group in groups],
        "tokens": [len(group[0].token_ids) if group else None for group in groups],
    } | {name: [group[0] if group else None for group in sampled[name]] for name in LOGP_FEATURES}
    cells = [argument_cells(prompt) for prompt in prompts]
    table |= {name: [row.get(name) for row in cells] for name in TEMPLATE_COLUMNS if any(name in row for row in cells)}
    Dataset.from_dict(table).to_parquet(str(folder / COMPLETIONS))
    shutil.rmtree(folder / PARTS)


def stage_evaluate(config: RunConfig, folder: Path) -> None:
    """Write reward, KL to the reference and their ratio for every policy; correlate the margins with the judge's."""
    assert config.evaluate is not None and config.train is not None
    judge = make_judge(config.evaluate.judge)
    tables = {
        name: Dataset.from_parquet(str(config.folder / f"generate-{name}" / COMPLETIONS))
        for name in (REFERENCE, *config.train.methods)
    }
    asked = [with_arguments(row["prompt"], row) for row in tables[REFERENCE]]
    kept = completed_by_all(
        asked, {name: [text is not None for text in table["text"]] for name, table in tables.items()}
    )
    asked = [asked[k] for k in kept.rows]
    tables = {name: table.select(kept.rows) for name, table in tables.items()}
    rewards = {name: judge.score(asked, table["text"]) for name, table in tables.items()}
    as_it_is = run_sampling(config, config.evaluate).as_it_is
    samples = {
        name: PolicySamples(
            rewards[name], None if name == REFERENCE and as_it_is else KlSamples.of_table(table), as_it_is=as_it_is
        )
        for name, table in tables.items()
    }
    found = compare_policies(samples, baseline=REFERENCE, clusters=prompt_ids(asked))
    gains = _reward_model_gains(config, asked, tables)
    prompts = [plain(prompt) for prompt in asked]
    texts = {name: table["text"] for name, table in tables.items()}
    result = {
        "policies": {
            name: {
                "reward": numbers["reward"],
                "gain": numbers["gain"],
                "mean_tokens": float(np.mean(tables[name]["tokens"])),
                "kl": numbers["kl"],
                "kl_one_sample": numbers["kl_one_sample"],
                "gain_per_root_kl": numbers["gain_per_root_kl"],
            }
            | ({"reward_model_gain": gains[name]} if name in gains else {})
            for name, numbers in found.policies.items()
        },
        "comparisons": found.differences,
        "judge": judge.name,
        "n_prompts": len(prompts),
        **({"left_out": kept.left_out} if kept.left_out else {}),
        "gold_correlation": _gold_correlation(read_pairs(config.folder / "margins" / "pairs"), judge),
        "samples": first_samples(prompts, texts, rewards, config.evaluate.samples_shown),
    }
    write_json(folder / METRICS, result)


def _reward_model_gains(
    config: RunConfig, prompts: list[Any], tables: dict[str, Dataset]
) -> dict[str, dict[str, float]]:
    """Policy -> paired gain over the reference under the run's own reward model, which training has optimized."""
    if config.reward is None:
        return {}
    scorer = make_scorer(config.folder / "reward" / MODEL, config.reward)
    rewards = {
        name: mean_of_clusters(
            scorer.score_completions(
                prompts, [as_completion(*row) for row in zip(prompts, table["text"], strict=True)]
            ),
            prompt_ids(prompts),
        )
        for name, table in tables.items()
    }
    found = reward_differences(rewards, baseline=REFERENCE)["policies"]
    return {name: policy["gain"] for name, policy in found.items() if policy["gain"] is not None}


def _gold_correlation(pairs: Dataset, judge: Judge) -> dict[str, float] | None:
    """Pearson correlation of the margins with the judge's, with Fisher's 95% interval; pairs without margin are left
    out."""
    if "margin" not in pairs.column_names:
        return None
    pairs = pairs.select(np.setdiff1d(np.arange(len(pairs)), missing_values(pairs, "margin")))
    judged = judge.score(pairs["prompt"], pairs["chosen"]) - judge.score(pairs["prompt"], pairs["rejected"])
    return correlation(pairs["margin"], judged)
