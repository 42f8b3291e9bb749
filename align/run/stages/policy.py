"""What each stage of a run does. A stage reads the folders of earlier stages and writes one folder."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from align.commands.filter import filter_source
from align.commands.trust import FEATURES, FILE
from align.config import PairsSection, RunConfig, SampleSection
from align.data.pairs import FILE as PAIRS_FILE
from align.data.pairs import load_pairs, read_pairs, write_pairs
from align.data.prompts import load_prompts
from align.data.splits import clusters_of, folds_by_prompt, split_by_prompt
from align.data.statistics import summarize
from align.distributed import process_rank
from align.errors import DataError
from align.filtering.tables import KEPT
from align.generation.pair_selection import draw_pair
from align.generation.transformers_engine import TransformersEngine
from align.generation.types import Sampling, as_completion, keyed_prompts
from align.io.console import log
from align.io.files import read_json, write_json
from align.models.loading import load_policy, load_tokenizer
from align.models.tokenization import MAX_LENGTH
from align.run.checks import check_models
from align.run.plan import TRUST, TRUST_NUMBERS, measures_trust
from align.run.stages.evaluation import PART, PARTS
from align.run.stages.reward import METRICS, make_scorer, scored_by
from align.sharding.jobs import Work
from align.sharding.shards import map_shards
from align.training.columns import require_margin
from align.training.train import MODEL, bind, train_policy
from align.trust.measure import check_margins, loss_parameters, margin_source, measure_trust
from align.trust.sentences import sentences
from reward_models.calibration import MarginMap
from reward_models.ensemble import members
from reward_models.margin_metrics import evaluate_margins
from reward_models.registry import objective_columns, resolve_objective


def stage_pairs(config: RunConfig, root: Path, folder: Path, which: str) -> None:
    """Load, validate and split a pair source into ``train/`` and ``heldout/``, with a summary of each."""
    reward = config.reward
    source = reward.pairs if which == "reward" and reward else config.pairs
    assert source is not None
    pairs = load_pairs(source, side_file=folder / "dropped.jsonl")
    check_models(config, conversational=not isinstance(pairs["prompt"][0], str))
    if reward is None and config.train is not None:
        for method, loss in config.train.methods.items():
            require_margin(pairs, bind(method, loss))
    if reward is None or (which != "reward" and reward.pairs is not None):
        write_pairs(pairs, folder / "train")
        write_json(folder / METRICS, {"train": summarize(pairs)})
        return
    if reward.eval_pairs is not None:
        train, heldout = pairs, load_pairs(reward.eval_pairs, side_file=folder / "dropped_heldout.jsonl")
    else:
        train, heldout = split_by_prompt(pairs, reward.eval_fraction, config.seed)
    if len(train) == 0 or len(heldout) == 0:
        raise DataError(
            f"{source.path}: {len(pairs)} pairs leave {len(train)} to train on and {len(heldout)} held out",
            code="data-too-few",
            hint="give more prompts, another reward.eval_fraction, or reward.eval_pairs",
        )
    if reward.folds and len(set(folds_by_prompt(train, reward.folds, config.seed))) < reward.folds:
        raise DataError(
            f"{source.path}: {len(train)} pairs to train on fill fewer parts than reward.folds: {reward.folds}",
            code="data-too-few",
            hint="give pairs of more prompts, or fewer folds",
        )
    objective_columns(train, resolve_objective(reward.objective))
    write_pairs(train, folder / "train")
    write_pairs(heldout, folder / "heldout")
    write_json(folder / METRICS, {"train": summarize(train), "heldout": summarize(heldout)})


def stage_sample(config: RunConfig, root: Path, folder: Path, which: str) -> None:
    """Sampled continuations of each prompt; of the best and the worst by a labelling reward, Bradley-Terry prefers one.

    With cross-fitted folds the label comes from fold 0's model and the margins (stage ``margins``) from the others. Of
    two folds the labeller and the model that judges its labels share no training pair; of more they share some.
    """
    assert config.sample is not None and config.train is not None and config.reward is not None
    settings = config.sample
    prompts = load_prompts(settings.prompts)
    groups = _continuations(config, prompts, folder)
    different = {k: list(dict.fromkeys(texts)) for k, texts in enumerate(groups) if len(set(texts)) > 1}
    log.info("sample: %d of %d prompts gave two different completions", len(different), len(prompts))
    if not different:
        raise DataError(
            f"sample.prompts: {settings.prompts}: none of {len(prompts)} prompts gave two different completions",
            code="pairs-none",
            hint="raise sample.temperature or sample.max_new_tokens",
        )
    labeller = root / "crossfit" / "fold-0" if config.reward.folds else root / "reward" / MODEL
    flat = [(prompts[k], as_completion(prompts[k], text)) for k, texts in different.items() for text in texts]
    scorer = make_scorer(labeller, config.reward)
    rewards = scorer.score_completions([prompt for prompt, _ in flat], [completion for _, completion in flat])
    rng = np.random.default_rng(config.seed)
    rows, against, start = [], 0, 0
    for k, texts in different.items():
        own = rewards[start : start + len(texts)]
        start += len(texts)
        chosen, rejected = draw_pair(own.tolist(), settings.label_scale, rng)
        sides = {"chosen": texts[chosen], "rejected": texts[rejected]}
        completions = {side: as_completion(prompts[k], text) for side, text in sides.items()}
        rows.append({"id": str(k), "prompt": prompts[k], **completions})
        against += int(own[chosen] < own[rejected])
    pairs = Dataset.from_list(rows)
    write_pairs(pairs, folder / "train")
    write_json(
        folder / METRICS,
        {"train": summarize(pairs), "prompts": len(prompts), "labels_against_labeller": against / len(rows)},
    )
    shutil.rmtree(folder / PARTS)


def _continuations(config: RunConfig, prompts: list[Any], folder: Path) -> list[list[str]]:
    """The non-empty sampled texts of each prompt; finished parts are kept in ``folder``."""
    assert config.sample is not None and config.train is not None
    rows, parts = keyed_prompts(prompts), folder / PARTS
    job = SampleJob(config.train.model, config.train.trusts_remote_code, config.sample, config.seed)
    made = map_shards(rows, job, parts, size=PART, what="sampling", cluster=config.cluster)
    found: list[list[str]] = made.whole()["texts"][:]
    return found


@dataclass(frozen=True, slots=True)
class SampleJob:
    """The non-empty sampled texts of each prompt (JSON) of a shard."""

    model: str
    trust_remote_code: bool
    settings: SampleSection
    seed: int

    def start(self) -> Work:
        """Load the model."""
        settings = self.settings
        engine = TransformersEngine(
            load_policy(self.model, dtype="float32", trust_remote_code=self.trust_remote_code),
            load_tokenizer(self.model, trust_remote_code=self.trust_remote_code),
            batch_size=settings.batch_size,
        )
        sampling = Sampling(
            settings.max_new_tokens, settings.temperature, settings.top_p, n=settings.num_generations, seed=self.seed
        )

        def work(rows: Dataset) -> Dataset:
            made = engine.generate([json.loads(prompt) for prompt in rows["prompt"]], sampling, list(rows["key"]))
            texts = [[c.text for c in group if c.text.strip()] for group in made]
            return Dataset.from_dict({"texts": texts}, features=Features({"texts": List(Value("string"))}))

        return work


def stage_margins(config: RunConfig, root: Path, folder: Path, which: str) -> None:
    """Add the reward margin to the policy's pairs, from models that have not seen them wherever there are any."""
    note, reward = "", config.reward
    if reward is None:
        if process_rank() > 0:
            return
        write_pairs(read_pairs(root / "pairs" / "train"), folder / "pairs")
        write_json(folder / METRICS, {"note": "No reward model was trained: margins, if any, came with the pairs."})
        return
    model = root / "reward" / MODEL
    calibration = MarginMap.load(model) if reward.calibrate or reward.length_residual else None
    origin = "outside"
    if reward.pairs is None:
        origin = "cross-fitted" if reward.folds else "in-sample"
    if reward.pairs is None and reward.folds:
        scored = read_pairs(root / "crossfit" / "pairs")
    elif reward.pairs is None:
        scored = scored_by(members(model), read_pairs(root / "pairs" / "train"), config, folder, calibration)
        note = "These margins are in-sample: the reward model was trained on the same pairs. Set reward.folds: 5."
    elif config.sample is not None and reward.folds:
        folds = [m for fold in range(1, reward.folds) for m in members(root / "crossfit" / f"fold-{fold}")]
        scored = scored_by(folds, read_pairs(root / "sample" / "train"), config, folder, calibration)
        if reward.folds > 2:
            note = (
                f"Labels are by the model of one fold, margins by those of the others: of {reward.folds} folds any two "
                "models share training pairs, so they agree more than strangers. With reward.folds: 2 they share none."
            )
    else:
        source = root / ("sample" if config.sample is not None else "pairs") / "train"
        scored = scored_by(members(model), read_pairs(source), config, folder, calibration)
        if config.sample is not None:
            note = "Labels were drawn from the same reward model that gives the margins: they agree by construction."
    if process_rank() > 0:
        return
    write_pairs(scored, folder / "pairs")
    found = evaluate_margins(np.asarray(scored["margin"]), clusters=clusters_of(scored)).to_dict()
    write_json(folder / METRICS, {"note": note, "margins": origin, **found})


def stage_trust(config: RunConfig, root: Path, folder: Path, which: str) -> None:
    """How far to believe label and margin, measured on the policy's pairs; the parameters for the loss ``trust``."""
    assert config.train is not None
    table = root / "margins" / "pairs"
    pairs, origin = read_pairs(table), margin_source(table)
    check_margins(pairs, origin, str(table), allow_in_sample=config.train.allow_in_sample)
    max_length = int(config.train.trainer.get("max_length") or MAX_LENGTH)
    cache, seed = folder / FEATURES, config.seed
    found = measure_trust(pairs, config.train.model, cache, origin=origin, max_length=max_length, seed=seed)
    found |= {"source": str(table), "model": config.train.model, "margins": origin, "seed": config.seed}
    found["sentences"] = sentences(found, origin)
    write_json(folder / FILE, found)
    write_json(folder / TRUST_NUMBERS, loss_parameters(found))
    log.info("%s", found["sentences"]["verdict"])


def stage_filter(config: RunConfig, root: Path, folder: Path, which: str) -> None:
    """Keep the pairs that are worth training on; the others with the reason of each."""
    assert config.filter is not None
    source = PairsSection(path=str(root / "margins" / "pairs" / PAIRS_FILE))
    filter_source(source, config.filter, folder, seed=config.seed, cache=root / "filter-parts", cluster=config.cluster)


def stage_train(config: RunConfig, root: Path, folder: Path, which: str) -> None:
    """Train the policy under the method called ``which``; a measured trust where the run measures it."""
    assert config.train is not None
    if config.filter is None:
        pairs = read_pairs(root / "margins" / "pairs")
    else:
        pairs = load_pairs(PairsSection(path=str(root / "filter" / KEPT)))
    train = config.train
    if measures_trust(config) and train.methods[which].loss == TRUST:
        loss = train.methods[which]
        measured = loss.model_copy(update={"parameters": read_json(root / TRUST / TRUST_NUMBERS) | loss.parameters})
        train = train.model_copy(update={"methods": {**train.methods, which: measured}})
    train_policy(
        pairs,
        train,
        which,
        folder,
        seed=config.seed,
        reference_cache=root / "reference-logps",
    )
