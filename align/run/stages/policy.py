"""Stages of the policy: load pairs or sample them, add margins, measure trust, filter, train."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.commands.filter import filter_source
from align.commands.trust import FEATURES, FILE
from align.config import PairsSection, RewardSection, RunConfig
from align.config.columns import FINISH_COLUMNS
from align.data.checked_pairs import checked_share, divided, together, without_held_out
from align.data.messages import argument_cells, split_arguments
from align.data.pair_selection import draw_pair
from align.data.pairs import FILE as PAIRS_FILE
from align.data.pairs import load_pairs, read_pairs, table_of, write_pairs
from align.data.prompts import prompt_cells, section_prompts
from align.data.splits import clusters_of
from align.data.statistics import summarize
from align.data.training_pairs import report_in_sample, source_of, with_source
from align.distributed import local_device, process_rank
from align.errors import DataError
from align.evaluation.left_out import completed_by_all
from align.filtering.tables import KEPT
from align.generation.sampling_job import SamplingJob, completions_of
from align.generation.types import Completion, as_completion
from align.io.allocator import keep_freed_memory
from align.io.console import log
from align.io.files import read_json, write_json
from align.models.loading import load_tokenizer
from align.models.tokenization import MAX_LENGTH
from align.run.checks import check_models
from align.run.plan import HELD_OUT, REFERENCE_CACHE, TRUST, TRUST_NUMBERS, holds_out, measures_trust
from align.run.row_checks import check_loss_columns, check_pair_rows, split_with_checked, with_checked
from align.run.stages.reward import METRICS, make_scorer, scored_by
from align.run.stages.sampling import PARTS, run_sampling, sample_in_stage, sampled_model
from align.run.watch import EVAL, make_watch, split_share, without_trained
from align.training.base.tracked_runs import tracked_run
from align.training.columns import require_margin, trained_pairs
from align.training.loss_choice import bind
from align.training.train import MODEL, train_policy
from align.trust.measure import check_margins, loss_parameters, margin_source, measure_trust
from align.trust.sentences import sentences
from reward_models.calibration import MarginMap
from reward_models.ensemble import members
from reward_models.margin_metrics import evaluate_margins
from reward_models.registry import objective_columns, resolve_objective

UNCHECKED = "filter-unchecked"
"""Folder of the pairs that a filter judges where some are checked ones, which it does not."""


def stage_pairs(config: RunConfig, folder: Path) -> None:
    """Load and check the policy's pairs; hold some out if the reward model is trained on them as well."""
    assert config.pairs is not None
    pairs = _load(config, config.pairs, folder)
    check_pair_rows(config, pairs)
    if config.reward is not None and config.reward.pairs is None:
        _write_split(config, config.pairs, pairs, folder)
        return
    pairs = with_checked(config, config.pairs, pairs)
    check_loss_columns(config, pairs)
    write_pairs(pairs, folder / "train")
    write_json(folder / METRICS, {"train": summarize(pairs)})


def stage_reward_pairs(config: RunConfig, folder: Path) -> None:
    """Load, check and split the pairs that the reward model alone is trained on."""
    assert config.reward is not None and config.reward.pairs is not None
    pairs = _load(config, config.reward.pairs, folder)
    check_pair_rows(config, pairs, rewards=True)
    _write_split(config, config.reward.pairs, pairs, folder)


def _load(config: RunConfig, source: PairsSection, folder: Path) -> Dataset:
    pairs = load_pairs(source, side_file=folder / "dropped.jsonl", carry=True, thumbs=True)
    check_models(config, conversational=not isinstance(pairs["prompt"][0], str))
    return pairs


def _write_split(config: RunConfig, source: PairsSection, pairs: Dataset, folder: Path) -> None:
    """Split the reward model's pairs into ``train/`` and ``heldout/``, and write both with a summary of each.

    Raises:
        DataError: too few pairs are left to train on, to hold out, or for the folds.
    """
    reward = config.reward
    assert reward is not None
    heldout = None
    if reward.eval_pairs is not None:
        side_file = folder / "dropped_heldout.jsonl"
        heldout = load_pairs(reward.eval_pairs, side_file=side_file, carry=True)
        check_pair_rows(config, heldout, rewards=True)
    train, heldout = split_with_checked(config, source, pairs, heldout)
    objective_columns(train, resolve_objective(reward.objective))
    write_pairs(train, folder / "train")
    write_pairs(heldout, folder / "heldout")
    write_json(folder / METRICS, {"train": summarize(train), "heldout": summarize(heldout)})


def stage_sample(config: RunConfig, folder: Path) -> None:
    """Sample continuations of each prompt and pair the best with the worst; Bradley-Terry draws the chosen one.

    A prompt that the policy cannot complete, such as one that fills its window, is left out and counted.
    With cross-fitted folds the label comes from fold 0's model and the margins (stage ``margins``) from the others.
    With two folds, the model of the labels and that of the margins share no training pair; with more they share some.
    """
    assert config.sample is not None and config.train is not None
    prompts = section_prompts(config.sample)
    model = sampled_model(config, config.sample)
    job = SamplingJob(model, run_sampling(config, config.sample, config.sample.num_generations))
    sampled = sample_in_stage(config, prompts, job, folder, what="sampling")
    groups = completions_of(sampled)
    kept = completed_by_all(prompts, {config.train.model: [bool(group) for group in groups]})
    different = {k: found for k in kept.rows if len(found := _different(groups[k])) > 1}
    log.info("sample: %d of %d prompts gave two different completions", len(different), len(prompts))
    if not different:
        raise DataError(
            f"sample.prompts: {config.sample.prompts}: none of {len(prompts)} prompts gave two different completions",
            code="pairs-none",
            hint="raise sample.temperature or sample.max_new_tokens",
        )
    pairs, against = _draw_pairs(config, prompts, different)
    write_pairs(pairs, folder / "train")
    write_json(
        folder / METRICS,
        {"train": summarize(pairs), "prompts": len(prompts), "labels_against_labeller": against / len(pairs)}
        | ({"left_out": kept.left_out} if kept.left_out else {}),
    )
    shutil.rmtree(folder / PARTS)


def _different(group: list[Completion]) -> list[Completion]:
    """The completions of a prompt that are not empty, the first of each text."""
    found: dict[str, Completion] = {}
    for one in group:
        if one.text.strip():
            found.setdefault(one.text, one)
    return list(found.values())


def _draw_pairs(config: RunConfig, prompts: list[Any], different: dict[int, list[Completion]]) -> tuple[Dataset, int]:
    """Label a pair for each prompt; return the pairs and how many labels contradict the labeling reward.

    Args:
        config: the run.
        prompts: all prompts.
        different: index of a prompt -> its different completions, at least two.
    """
    assert config.reward is not None and config.sample is not None
    labeler = config.folder / ("crossfit/fold-0" if config.reward.folds else f"reward/{MODEL}")
    flat = [(prompts[k], as_completion(prompts[k], one.text)) for k, group in different.items() for one in group]
    scorer = make_scorer(labeler, config.reward)
    rewards = scorer.score_completions([prompt for prompt, _ in flat], [completion for _, completion in flat])
    rng = np.random.default_rng(config.seed)
    cells = prompt_cells(config.sample.prompts)
    rows, against, start = [], 0, 0
    for k, group in different.items():
        values = rewards[start : start + len(group)]
        start += len(group)
        chosen, rejected = draw_pair(values.tolist(), config.sample.label_scale, rng)
        sides = {"chosen": group[chosen], "rejected": group[rejected]}
        completions = {side: as_completion(prompts[k], one.text) for side, one in sides.items()}
        ends = {FINISH_COLUMNS[side]: one.finish_reason for side, one in sides.items()}
        messages, arguments = split_arguments(prompts[k])[0], argument_cells(prompts[k])
        rows.append(cells[k] | {"id": str(k), "prompt": messages, **completions, **ends, **arguments})
        against += int(values[chosen] < values[rejected])
    columns = dict.fromkeys(name for row in rows for name in row)
    return table_of(rows, list(columns), config.sample.prompts), against


def stage_margins(config: RunConfig, folder: Path) -> None:
    """Add the reward margin to the policy's pairs, by reward models that were not trained on them if there are any."""
    if config.reward is None:
        if process_rank() > 0:
            return
        write_pairs(read_pairs(config.folder / "pairs" / "train"), folder / "pairs")
        write_json(folder / METRICS, {"note": "No reward model was trained: margins, if any, came with the pairs."})
        return
    origin = "outside"
    if config.reward.pairs is None:
        origin = "cross-fitted" if config.reward.folds else "in-sample"
    scored, note = _add_margins(config, config.reward, folder)
    if process_rank() > 0:
        return
    own = config.sample is None and origin == "cross-fitted"
    if origin == "outside" or own:
        origin = source_of(scored)
        count = report_in_sample(scored, "margins")
        if count:
            note = f"{count} of {len(scored)} pairs, or their responses, are among the reward model's: in-sample."
    else:
        scored = with_source(scored, [origin] * len(scored))
    write_pairs(scored, folder / "pairs")
    crossed = origin == "cross-fitted"
    found = evaluate_margins(np.asarray(scored["margin"]), clusters=clusters_of(scored), cross_fitted=crossed)
    write_json(folder / METRICS, {"note": note, "margins": origin, **found.to_dict()})


def _add_margins(config: RunConfig, reward: RewardSection, folder: Path) -> tuple[Dataset, str]:
    """The policy's pairs with margins, and a note on what the margins have in common with the labels."""
    root = config.folder
    if reward.pairs is None and reward.folds:
        return read_pairs(root / "crossfit" / "pairs"), ""
    model = root / "reward" / MODEL
    models, note = _margin_models(config, reward), ""
    if config.sample is None:
        source = root / "pairs" / "train"
        if reward.pairs is None:
            note = "These margins are in-sample: the reward model was trained on the same pairs. Set reward.folds: 5."
    else:
        source = root / "sample" / "train"
        if reward.folds > 2:
            note = (
                f"Labels are by the model of one fold, margins by those of the others: of {reward.folds} folds any two "
                "models share training pairs, so they agree more than strangers. With reward.folds: 2 they share none."
            )
        elif not reward.folds:
            note = "Labels were drawn from the same reward model that gives the margins: they agree by construction."
    return scored_by(models, read_pairs(source), config, folder, _calibration(model, reward)), note


def _margin_models(config: RunConfig, reward: RewardSection) -> list[Path | str]:
    """The models whose mean gives margins to pairs that no cross-fitted model gives them to."""
    if config.sample is not None and reward.folds:
        folds = [config.folder / "crossfit" / f"fold-{fold}" for fold in range(1, reward.folds)]
        return [model for fold in folds for model in members(fold)]
    return members(config.folder / "reward" / MODEL)


def _calibration(model: Path, reward: RewardSection) -> MarginMap | None:
    return MarginMap.load(model) if reward.calibrate or reward.length_residual else None


def stage_held_out(config: RunConfig, folder: Path) -> None:
    """Divide the pairs into those to train on and those to evaluate on meanwhile; these get margins as the others."""
    assert config.train is not None and config.train.eval_pairs is not None
    section, root, reward = config.train.eval_pairs, config.folder, config.reward
    pairs = read_pairs(root / "margins" / "pairs")
    if section.share is not None:
        others, checked = divided(pairs)
        share = checked_share(pairs)
        pairs, held_out = split_share(others, section, config.seed)
        if share is not None:
            checked = without_held_out(checked, held_out, HELD_OUT)
            pairs = together(pairs, checked, share, HELD_OUT)
    else:
        held_out = load_pairs(section, side_file=folder / "dropped.jsonl")
        check_pair_rows(config, held_out)
        held_out = without_trained(held_out, pairs, section)
        if reward is not None:
            models = _margin_models(config, reward)
            held_out = scored_by(models, held_out, config, folder, _calibration(root / "reward" / MODEL, reward))
    if process_rank() > 0:
        return
    for method, loss in config.train.methods.items():
        require_margin(held_out, bind(method, loss))
    write_pairs(pairs, folder / "train")
    write_pairs(held_out, folder / EVAL)
    write_json(folder / METRICS, {"train": summarize(pairs), "heldout": summarize(held_out)})


def _policy_pairs(config: RunConfig) -> Path:
    """Folder of the pairs that policies may be trained on."""
    return config.folder / (f"{HELD_OUT}/train" if holds_out(config) else "margins/pairs")


def stage_trust(config: RunConfig, folder: Path) -> None:
    """Measure how far to trust label and margin of the policy's pairs; write the parameters of the loss ``trust``."""
    assert config.train is not None
    table = _policy_pairs(config)
    pairs = read_pairs(table)
    origin = margin_source(table, pairs)
    check_margins(pairs, origin, str(table), allow_in_sample=config.train.allow_in_sample)
    fields, cache, seed = config.train.trainer, folder / FEATURES, config.seed
    length, truncation = fields.get("max_length", MAX_LENGTH), fields.get("truncation_mode", "keep_start")
    tokenizer = load_tokenizer(config.train.model, trust_remote_code=config.train.trusts_remote_code)
    pairs = trained_pairs(pairs, tokenizer, length, truncation, config.train.turns)
    found = measure_trust(
        pairs, config.train.model, cache, origin=origin, max_length=length, seed=seed, truncation=truncation,
        turns=config.train.turns, loading=config.train.loading,
    )  # fmt: skip
    found |= {"source": str(table), "model": config.train.model, "margins": origin, "seed": config.seed}
    found["sentences"] = sentences(found, origin)
    write_json(folder / FILE, found)
    write_json(folder / TRUST_NUMBERS, loss_parameters(found))
    log.info("%s", found["sentences"]["verdict"])


def stage_filter(config: RunConfig, folder: Path) -> None:
    """Keep the pairs that are worth training on; write the others with the reason for each. Checked pairs stay out."""
    assert config.filter is not None
    root, table = config.folder, _policy_pairs(config)
    others, checked = divided(read_pairs(table))
    if len(checked):
        table = root / UNCHECKED
        write_pairs(others, table)
    source = PairsSection(path=str(table / PAIRS_FILE))
    filter_source(source, config.filter, folder, seed=config.seed, cache=root / "filter-parts", cluster=config.cluster)


def stage_train(config: RunConfig, folder: Path, policy: str) -> None:
    """Train the policy by the method of this name; a method with the loss ``trust`` gets the run's measured trust."""
    assert config.train is not None
    if local_device() == "cpu":
        keep_freed_memory()
    root, train = config.folder, config.train
    if config.filter is None:
        pairs = read_pairs(_policy_pairs(config))
    else:
        pairs = load_pairs(PairsSection(path=str(root / "filter" / KEPT)))
        whole = read_pairs(_policy_pairs(config))
        share = checked_share(whole)
        if share is not None:
            pairs = together(pairs, divided(whole)[1], share, "filter")
    loss = train.methods[policy]
    if measures_trust(config) and TRUST in loss.names:
        parameters = read_json(root / TRUST / TRUST_NUMBERS) | loss.parameters
        measured = loss.model_copy(update={"parameters": parameters})
        train = train.model_copy(update={"methods": {**train.methods, policy: measured}})
    run = tracked_run(root, config.name, policy)
    train_policy(
        pairs, train, policy, folder, seed=config.seed, reference_cache=root / REFERENCE_CACHE, run=run,
        watch=make_watch(config, pairs),
    )  # fmt: skip
