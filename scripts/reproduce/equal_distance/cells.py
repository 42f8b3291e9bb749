"""One cell: a policy trained at a constant rate, judged at each mark by gold reward and exact KL."""

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from align.commands.evaluation_tables import measure_kl, on_same_prompts, score, write_completions
from align.commands.trust import FEATURES, FILE
from align.config import LossSection
from align.data.pairs import read_pairs
from align.evaluation.policies import REFERENCE, Policy
from align.generation.types import Sampling
from align.io.files import read_json, write_json
from align.io.hashing import digest, fingerprint_source
from align.io.stage import Stage, run_stage
from align.training.train import CHECKPOINTS, train_policy
from align.trust.measure import loss_parameters, measure_trust
from reward_models.judges import make_judge
from scripts.reproduce.equal_distance.data import (
    Study,
    block_of,
    make_pairs,
    make_prompts,
    make_reward_model,
    make_samples,
    trained_on,
)
from scripts.reproduce.equal_distance.design import ARMS, BLOCKS, REWARD_MODELS, Place
from scripts.reproduce.policy_protocol.judging import merge_adapter

CELL = "cell.json"
DECODINGS = 8
"""Decoding seeds that belong to one sample seed; a mark takes one, the same for all methods."""
BETA = 0.1


def run_cell(study: Study, place: Place) -> dict[str, Any]:
    """Train and judge a policy, unless its cell exists; what ``cell.json`` holds, with its key.

    ``marks`` has an entry per mark: its ``step``, and ``reward``, ``kl`` (exact, nats) and ``text`` of one completion
    of each prompt of the seed's block.
    """
    named = {"method": place.method, "seed": place.seed, "twin": place.twin, "beta": BETA}
    made_from = {
        "sizes": asdict(study.sizes), "train": study.train.made_from(without={"methods"}), "judge": study.judge,
        "reward": study.reward.made_from(without={"folds"}), "models": [
            fingerprint_source(study.train.model), fingerprint_source(study.reward.model)
        ],
    }  # fmt: skip
    key = digest(named | made_from)
    if key in study.known:
        return study.known[key]

    def work(folder: Path) -> None:
        pairs = pairs_of(study, place)
        loss = _loss(study, pairs, place)
        train = study.train.model_copy(update={"methods": {place.method: loss}, "trainer": _fields(study)})
        started = time.process_time()
        cache = study.root / f"seed-{place.seed}" / "reference-logps"
        seed = 2 * place.seed + (place.twin == "b")
        train_policy(trained_on(pairs, place), train, place.method, folder / "train", seed=seed, reference_cache=cache)
        trained = time.process_time()
        marks = [_mark(study, place, folder, number) for number in range(len(study.sizes.marks))]
        facts = {
            "pairs": read_json(pairs.folder / "facts.json"), "parameters": dict(loss.parameters),
            "reward_model": place.seed % REWARD_MODELS, "block": place.seed % BLOCKS,
            "seconds": {"training": trained - started, "judging": time.process_time() - trained},
        }  # fmt: skip
        write_json(folder / CELL, named | facts | {"marks": marks})
        for left in ("train", "merged", "judged"):
            shutil.rmtree(folder / left, ignore_errors=True)

    folder = study.root / "cells" / place.name
    stage = run_stage(place.name, folder, {"key": key}, work)
    return {"key": key} | read_json(stage.folder / CELL)


def pairs_of(study: Study, place: Place) -> Stage:
    """The labeled pairs with margins of a cell."""
    prompts = make_prompts(study)
    samples = make_samples(study, prompts, place.seed)
    reward = make_reward_model(study, prompts, place.seed % REWARD_MODELS)
    return make_pairs(study, samples, reward, place.seed, place.twin)


def run_reference(study: Study, block: int) -> dict[str, Any]:
    """The reference's rewards on a block of prompts: the mean of several samples of each prompt, [prompts]."""
    count = study.sizes.reference_samples
    named = {"method": REFERENCE, "block": block, "samples": count}
    model = fingerprint_source(study.train.model)
    key = digest(named | {"sizes": asdict(study.sizes), "judge": study.judge, "model": model})
    if key in study.known:
        return study.known[key]

    def work(folder: Path) -> None:
        policy = Policy(REFERENCE, study.train.model)
        rewards = [_judged(study, policy, block, seed, folder / "judged")[0] for seed in range(count)]
        write_json(folder / CELL, named | {"reward": np.mean(rewards, axis=0).round(4).tolist()})
        shutil.rmtree(folder / "judged")

    prompts = make_prompts(study)
    stage = run_stage(
        f"reference, block {block}", study.root / f"reference-{block}", {"key": key, "at": prompts.key}, work
    )
    return {"key": key} | read_json(stage.folder / CELL)


def _mark(study: Study, place: Place, folder: Path, number: int) -> dict[str, Any]:
    """Judge the policy of a mark."""
    step = study.sizes.marks[number]
    merged = merge_adapter(folder / "train" / CHECKPOINTS / f"checkpoint-{step}", study.train.model, folder / "merged")
    seed = DECODINGS * place.seed + number
    rewards, kl, texts = _judged(study, Policy(place.method, str(merged)), place.seed, seed, folder / "judged")
    return {"step": step, "reward": rewards.round(4).tolist(), "kl": kl.round(4).tolist(), "text": texts}


def _judged(
    study: Study, policy: Policy, block: int, seed: int, folder: Path
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Reward and exact KL of one completion of each prompt of a block, [prompts] each, and the completions."""
    sampling = Sampling(study.sizes.max_new_tokens, seed=seed, batch_size=128)
    prompts = block_of(study, block)
    (written,), left_out = on_same_prompts([write_completions(policy, prompts, sampling, folder)])
    if left_out:
        raise ValueError(f"found prompts that {policy.name} does not take, expected none: {left_out}")
    kl = np.zeros(len(prompts))
    if policy.name != REFERENCE:
        kl = measure_kl(written, Policy(REFERENCE, study.train.model), folder).exact
    return score(written, make_judge(study.judge), folder), kl, list(written.table["text"])


def _loss(study: Study, pairs: Stage, place: Place) -> LossSection:
    """The loss of a method at ``BETA``; that of trust with what it measures on the pairs."""
    parameters: dict[str, Any] = {"beta": BETA}
    if place.method == "trust":
        folder = study.root / f"seed-{place.seed}" / f"measured-{place.twin}"

        def work(folder: Path) -> None:
            table = read_pairs(pairs.folder / "pairs")
            found = measure_trust(
                table, study.train.model, folder / FEATURES, origin="outside", max_length=128, seed=place.seed
            )
            write_json(folder / FILE, found)

        inputs = {"pairs": pairs.key, "model": fingerprint_source(study.train.model)}
        stage = run_stage(f"trust, {place.name}", folder, inputs, work)
        parameters |= loss_parameters(read_json(stage.folder / FILE))
    return LossSection(loss=ARMS[place.method].loss, parameters=parameters)


def _fields(study: Study) -> dict[str, Any]:
    """Fields of trl.DPOConfig: a constant rate, so that an earlier mark is a shorter training."""
    sizes = study.sizes
    every = int(np.gcd.reduce(sizes.marks))
    return {
        **study.train.trainer, "per_device_train_batch_size": sizes.batch, "learning_rate": sizes.learning_rate,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "max_steps": sizes.marks[-1],
        "save_strategy": "steps", "save_steps": every, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
