"""The last stages of a run: completions of every policy on held-out prompts, and their rewards and KL."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.config import RunConfig
from align.config.columns import TEMPLATE_COLUMNS
from align.config.judging import JudgeSection
from align.data.messages import argument_cells, split_arguments, with_arguments
from align.data.pairs import read_pairs
from align.data.prompts import section_prompts
from align.data.statistics import missing_values
from align.data.text import plain
from align.evaluation.agreement import agreements
from align.evaluation.compare_policies import (
    KlSamples,
    PolicySamples,
    by_prompt,
    compare_policies,
    first_samples,
    identical_texts,
    mean_of_clusters,
    prompt_ids,
)
from align.evaluation.left_out import completed_by_all
from align.evaluation.rewards import reward_differences
from align.generation.logp_job import LogpJob
from align.generation.sampling_job import LOGP_FEATURES, SamplingJob, completions_of
from align.generation.types import as_completion
from align.generation.vllm_adapters import check_vllm_adapter
from align.io.files import write_json
from align.io.hashing import digest
from align.io.parquet import ROW_GROUP
from align.models.template_arguments import report_other_arguments
from align.run.plan import REFERENCE
from align.run.stages.judging import Verdicts, judge_completions
from align.run.stages.reward import METRICS, make_scorer
from align.run.stages.sampling import PARTS, log_probs_in_stage, run_sampling, sample_in_stage
from align.stats import correlation
from align.training.train import MODEL
from reward_models.named_judges import made_from, make_scoring

COMPLETIONS = "completions.parquet"


def stage_generate(config: RunConfig, folder: Path, policy: str) -> None:
    """Write one completion of each held-out prompt by a policy, and its log-probs under policy and reference.

    A prompt that the policy cannot complete, such as one that fills its window, has null values.
    """
    assert config.evaluate is not None and config.train is not None
    prompts = section_prompts(config.evaluate)
    reference = config.train.model
    model = reference if policy == REFERENCE else str(config.folder / f"train-{policy}" / MODEL)
    report_other_arguments(prompts, model, trust_remote_code=config.train.trusts_remote_code)
    sampling, what = run_sampling(config, config.evaluate), f"completions of {policy}"
    at_once = sampling.engine == "transformers"
    if sampling.engine == "vllm":
        check_vllm_adapter(model)
    sampled = sample_in_stage(
        config, prompts, SamplingJob(model, sampling, reference if at_once else None), folder, what=what
    )
    groups = completions_of(sampled)
    completed_by_all(prompts, {policy: [bool(group) for group in groups]})
    if at_once:
        scores = {name: [group[0] if group else None for group in sampled[name]] for name in LOGP_FEATURES}
    else:
        job = LogpJob(model, reference, sampling, config.train.loading)
        scores = log_probs_in_stage(config, prompts, groups, job, folder, what=f"log-probs of {policy}")
    table = {
        "prompt": [split_arguments(prompt)[0] for prompt in prompts],
        "text": [group[0].text if group else None for group in groups],
        "tokens": [len(group[0].token_ids) if group else None for group in groups],
    } | scores
    cells = [argument_cells(prompt) for prompt in prompts]
    table |= {name: [row.get(name) for row in cells] for name in TEMPLATE_COLUMNS if any(name in row for row in cells)}
    Dataset.from_dict(table).to_parquet(str(folder / COMPLETIONS), batch_size=ROW_GROUP)
    shutil.rmtree(folder / PARTS)


def stage_evaluate(config: RunConfig, folder: Path) -> None:
    """Write reward, KL to the reference and their ratio for every policy; correlate the margins with the judge's.

    The first judge is the main one: rewards, ratio and samples are by it. The others stand below, with the agreement of
    every two judges.
    """
    assert config.evaluate is not None and config.train is not None
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
    texts = {name: table["text"][:] for name, table in tables.items()}
    verdicts = [judge_completions(judge, asked, texts, folder / PARTS) for judge in config.evaluate.judge]
    main, clusters, prompts = verdicts[0], prompt_ids(asked), [plain(prompt) for prompt in asked]
    found = compare_policies(_samples(config, tables, main), baseline=REFERENCE, clusters=clusters)
    gains = _reward_model_gains(config, asked, tables)
    result = {
        "policies": {
            name: numbers
            | {"mean_tokens": float(np.mean(tables[name]["tokens"]))}
            | ({"reward_model_gain": gains[name]} if name in gains else {})
            for name, numbers in found.policies.items()
        },
        "comparisons": found.differences,
        "judge": main.name,
        "truth": main.judge.truth,
        "judges": [_judged(config, tables, one, clusters) for one in verdicts],
        "agreement": agreements({one.name: by_prompt(one.advantages(), clusters) for one in verdicts}),
        "identical_texts": identical_texts(texts),
        "n_prompts": len(prompts),
        "made_from": {"prompts": digest(asked)[:16], "judge": made_from(main.judge).get("model")},
        **({"left_out": kept.left_out} if kept.left_out else {}),
        "judge_correlation": _margin_correlation(read_pairs(config.folder / "margins" / "pairs"), main.judge),
        "samples": first_samples(prompts, texts, main.rewards, config.evaluate.samples_shown),
    }
    write_json(folder / METRICS, result)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def _samples(config: RunConfig, tables: dict[str, Dataset], verdicts: Verdicts) -> dict[str, PolicySamples]:
    """Rewards by a judge and KL of the completions of every policy."""
    assert config.evaluate is not None
    as_it_is = run_sampling(config, config.evaluate).as_it_is
    return {
        name: PolicySamples(
            verdicts.rewards[name],
            None if name == REFERENCE and as_it_is else KlSamples.of_table(table),
            as_it_is=as_it_is,
        )
        for name, table in tables.items()
    }


def _judged(
    config: RunConfig, tables: dict[str, Dataset], verdicts: Verdicts, clusters: np.ndarray | None
) -> dict[str, Any]:
    """What one judge says of the policies."""
    found = compare_policies(_samples(config, tables, verdicts), baseline=REFERENCE, clusters=clusters)
    texts = {name: table["text"][:] for name, table in tables.items()}
    shown = ("reward", "gain", "gain_per_root_kl")
    return {
        "name": verdicts.name,
        "truth": verdicts.judge.truth,
        "compares": verdicts.judge.compares,
        "cost": verdicts.cost,
        "policies": {name: {key: numbers[key] for key in shown} for name, numbers in found.policies.items()},
        "comparisons": found.differences,
        "win_rates": verdicts.win_rates(texts, clusters),
    }


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


def _margin_correlation(pairs: Dataset, judge: JudgeSection) -> dict[str, float] | None:
    """Pearson correlation of the margins with the judge's, with Fisher's 95% interval; pairs without margin are left
    out. None for a judge that gives no scores."""
    if "margin" not in pairs.column_names or judge.compares:
        return None
    pairs = pairs.select(np.setdiff1d(np.arange(len(pairs)), missing_values(pairs, "margin")))
    loaded = make_scoring(judge)
    judged = loaded.score(pairs["prompt"], pairs["chosen"]) - loaded.score(pairs["prompt"], pairs["rejected"])
    return correlation(pairs["margin"], judged)
