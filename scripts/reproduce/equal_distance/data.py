"""Prompts, reward models, samples, labels and margins of the study. Every folder is a stage."""

import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.config import RewardSection, TrainSection
from align.data.pairs import read_pairs, write_pairs
from align.errors import DataError
from align.generation.engines import make_engine
from align.generation.types import Sampling
from align.io.files import read_json, write_json
from align.io.hashing import fingerprint_source
from align.io.stage import Stage, run_stage
from align.sharding.shards import in_parts
from reward_models.judges import make_judge
from reward_models.score import RewardScorer
from reward_models.train import train_reward_model
from scripts.assets.demo_data import PROMPT_WORDS, SHORTEST, human_pairs, read_snippets
from scripts.reproduce.equal_distance.design import BLOCKS, REWARD_MODELS, Place, Sizes, Twin
from scripts.reproduce.policy_protocol.cells import relabelled
from scripts.reproduce.policy_protocol.data import label

PROMPTS, SAMPLES = "prompts.json", "samples.parquet"
PART = 64


@dataclass(frozen=True, slots=True)
class Study:
    """What every cell shares."""

    root: Path
    snippets: Path
    sizes: Sizes
    train: TrainSection
    reward: RewardSection
    judge: str = "vader"
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Key -> cell of an earlier run, perhaps of another machine."""


def make_prompts(study: Study) -> Stage:
    """Openings to train on and ``BLOCKS`` blocks to judge on; human-rated pairs for each reward model; all disjoint."""
    sizes = study.sizes
    wanted = sizes.train_prompts + sizes.seen_prompts + BLOCKS * sizes.block

    def work(folder: Path) -> None:
        snippets = read_snippets(study.snippets)
        random.Random(0).shuffle(snippets)
        long = [snippet for snippet in snippets if len(snippet.text.split()) >= SHORTEST]
        if len(long) < wanted:
            raise DataError(f"{len(long)} snippets have {SHORTEST} words, {wanted} wanted", code="demo-data")
        openings = [" ".join(snippet.text.split()[:PROMPT_WORDS]) for snippet in long[:wanted]]
        judged = openings[sizes.train_prompts + sizes.seen_prompts :]
        blocks = [judged[k * sizes.block : (k + 1) * sizes.block] for k in range(BLOCKS)]
        write_json(folder / PROMPTS, {"train": openings[: sizes.train_prompts], "blocks": blocks})
        taken = {snippet.id for snippet in long[:wanted]}
        rest = [snippet for snippet in snippets if snippet.id not in taken]
        pairs = human_pairs(rest, REWARD_MODELS * sizes.reward_pairs, random.Random(0))
        for number in range(REWARD_MODELS):
            part = pairs[number * sizes.reward_pairs : (number + 1) * sizes.reward_pairs]
            write_pairs(Dataset.from_list(part), folder / f"human-{number}")

    inputs = {"snippets": fingerprint_source(str(study.snippets)), "sizes": asdict(sizes)}
    return run_stage("prompts", study.root / "prompts", inputs, work)


def block_of(study: Study, seed: int) -> list[str]:
    """The test prompts of a sample seed."""
    found: list[str] = read_json(study.root / "prompts" / PROMPTS)["blocks"][seed % BLOCKS]
    return found


def make_reward_model(study: Study, prompts: Stage, number: int) -> Stage:
    """The reward model with this number, on its own human-rated pairs."""

    def work(folder: Path) -> None:
        pairs = read_pairs(study.root / "prompts" / f"human-{number}")
        train_reward_model(pairs, study.reward, folder / "model", seed=number)

    settings = study.reward.made_from(without={"folds"})
    inputs = {"prompts": prompts.key, "settings": settings, "backbone": fingerprint_source(study.reward.model)}
    return run_stage(f"reward model {number}", study.root / f"reward-{number}", inputs, work)


def make_samples(study: Study, prompts: Stage, seed: int) -> Stage:
    """Two continuations of each training prompt by the reference model, with the judge's reward of each."""
    sizes = study.sizes

    def work(folder: Path) -> None:
        engine = make_engine("auto", study.train.model, batch_size=128)
        wanted = read_json(study.root / "prompts" / PROMPTS)["train"]
        sampling = Sampling(sizes.max_new_tokens, n=2, seed=seed)

        def part(rows: range) -> Dataset:
            found = engine.generate([wanted[k] for k in rows], sampling)
            first, second = ([group[side].text for group in found] for side in (0, 1))
            return Dataset.from_dict({"first": first, "second": second})

        table = in_parts(len(wanted), PART, folder / "parts", part, what=f"samples of seed {seed}")
        gold = [make_judge(study.judge).score(wanted, list(table[name])) for name in ("first", "second")]
        columns = {"prompt": wanted, "first": list(table["first"]), "second": list(table["second"])}
        Dataset.from_dict({**columns, "gap": gold[0] - gold[1]}).to_parquet(str(folder / SAMPLES))

    inputs = {
        "prompts": prompts.key,
        "model": fingerprint_source(study.train.model),
        "seed": seed,
        "judge": study.judge,
    }
    return run_stage(f"samples, seed {seed}", study.root / f"seed-{seed}" / "samples", inputs, work)


def make_pairs(study: Study, samples: Stage, reward: Stage, seed: int, twin: Twin) -> Stage:
    """The labeled pairs of a sample seed and label draw in ``pairs/``, with the margins of its reward model."""

    def work(folder: Path) -> None:
        table = Dataset.from_parquet(str(samples.folder / SAMPLES))
        prompts, first, second = (list(table[name]) for name in ("prompt", "first", "second"))
        gap = np.asarray(table["gap"])
        pairs = label(prompts, first, second, gap, scale=1.0, seed=seed, antithetic=twin == "b")
        scorer = RewardScorer(
            reward.folder / "model", batch_tokens=study.reward.batch_tokens, max_length=study.reward.max_length
        )
        scored = scorer.score_pairs(pairs)
        write_pairs(scored, folder / "pairs")
        gold, margin = np.asarray(scored["gold_margin"]), np.asarray(scored["margin"])
        facts = {
            "pairs": len(scored), "labels_against_gold": float((gold < 0).mean()),
            "margin_and_gold_correlation": float(np.corrcoef(margin, gold)[0, 1]),
        }  # fmt: skip
        write_json(folder / "facts.json", facts)

    inputs = {"samples": samples.key, "reward": reward.key, "twin": twin, "seed": seed}
    folder = study.root / f"seed-{seed}" / f"pairs-{twin}"
    return run_stage(f"pairs {twin}, seed {seed}", folder, inputs, work)


def trained_on(pairs: Stage, place: Place) -> Dataset:
    """The pair table that a method trains on."""
    table = read_pairs(pairs.folder / "pairs")
    return relabelled(table) if place.method == "relabelled" else table
