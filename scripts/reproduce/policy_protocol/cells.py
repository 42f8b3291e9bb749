"""One cell: a policy trained on one quality with one method and setting; gold reward and KL of its samples."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.commands.trust import FEATURES, FILE
from align.config import LossSection
from align.data.pairs import read_pairs
from align.evaluation.policies import REFERENCE, Policy
from align.generation.types import Sampling
from align.io.files import read_json, write_json
from align.io.hashing import fingerprint_source
from align.io.stage import Stage, run_stage, stage_key
from align.losses.registry import LOSSES
from align.models.tokenization import MAX_LENGTH
from align.training.train import MODEL, train_policy
from align.trust.measure import loss_parameters, measure_trust
from reward_models.judges import make_judge
from scripts.reproduce.policy_protocol.data import Quality, Study, read_prompts
from scripts.reproduce.policy_protocol.judging import Decoded, judge_policy, merge_adapter

CELL = "cell.json"
Parameters = dict[str, float | bool]
CANDIDATES: dict[str, tuple[Parameters, ...]] = {
    "dpo": ({"beta": 0.1}, {"beta": 0.03}, {"beta": 0.3}),
    "ipo": tuple({"beta": beta, "length_normalize": False} for beta in (0.1, 0.03, 0.3)),
    "beta_dpo": ({"beta": 0.1, "alpha": 0.6}, {"beta": 0.1, "alpha": 0.2}, {"beta": 0.03, "alpha": 0.6}),
    "madpo": ({"beta": 0.1}, {"beta": 0.1, "c_max": 4.0, "c_min": 0.25, "tau": 7.0}, {"beta": 0.03}),
    "soft_madpo": ({"beta": 0.1}, {"beta": 0.1, "c_max": 4.0, "c_min": 0.25, "tau": 7.0}, {"beta": 0.03}),
    "mmpo": ({"beta": 0.1}, {"beta": 0.1, "gamma": 0.5}, {"beta": 0.03}),
    "rpo_sq": ({"beta": 0.1}, {"beta": 0.1, "eta": 0.5}, {"beta": 0.03}),
    "relabelled": ({"beta": 0.1}, {"beta": 0.03}, {"beta": 0.3}),
    "trust": ({"beta": 0.1}, {"beta": 0.03}, {"beta": 0.3}),
}
"""Method -> its candidates on the validation split, the published setting first; equally many for every method."""
RELABELLED = "relabelled"
"""DPO on pairs whose responses are swapped where the reward model prefers the rejected one."""
TRUST = "trust"
"""The method whose slope, trust and strength are measured on the pairs, without any gold reward."""


@dataclass(frozen=True, slots=True)
class Split:
    """Prompts that policies are judged on, and the decoding temperatures."""

    name: str
    temperatures: tuple[float, ...]


def setting_name(parameters: Parameters) -> str:
    """Name of a setting's folder, like ``beta=0.1,tau=7``."""
    return ",".join(f"{name}={value:g}" for name, value in parameters.items())


def relabelled(pairs: Dataset) -> Dataset:
    """The pairs with the response that the reward model prefers as the chosen one."""
    names = {"chosen": "rejected", "rejected": "chosen", "reward_chosen": "reward_rejected"}
    names |= {"reward_rejected": "reward_chosen"}

    def turn(row: dict[str, Any]) -> dict[str, Any]:
        if row["margin"] >= 0:
            return row
        turned = {name: row[names.get(name, name)] for name in row}
        return turned | {"margin": -row["margin"], "gold_margin": -row["gold_margin"]}

    return Dataset.from_list([turn(row) for row in pairs.to_list()])


def reads_margins(method: str) -> bool:
    """Whether the margins change what the method trains."""
    return method == RELABELLED or LOSSES[method].needs_margin


def run_cell(
    study: Study, pairs: Stage, quality: Quality, method: str, parameters: Parameters, seed: int, split: Split
) -> dict[str, Any]:
    """Train and judge a policy, unless its cell exists; returns what ``cell.json`` holds.

    ``pairs``: the stage with margins if the method reads them, else the stage with labels.
    """
    measured = _measured(study, pairs, quality, seed) if method == TRUST else {}
    loss = LossSection(loss="dpo" if method == RELABELLED else method, parameters=parameters | measured)
    train = study.train.model_copy(update={"methods": {method: loss}})

    def work(folder: Path) -> None:
        table = read_pairs(pairs.folder / "pairs")
        table = relabelled(table) if method == RELABELLED else table
        trained, cache = folder / "train", study.root / f"seed-{seed}" / quality / "reference-logps"
        train_policy(table, train, method, trained, seed=seed, reference_cache=cache)
        merged = merge_adapter(trained / MODEL, study.train.model, folder / "merged")
        found = _judge(study, Policy(method, str(merged)), seed, split, folder)
        shutil.rmtree(folder / "merged", ignore_errors=True)
        facts = {"quality": quality, "method": method, "seed": seed, "split": split.name, "parameters": parameters}
        write_json(folder / CELL, facts | ({"measured": measured} if measured else {}) | {"decoded": found})

    root = study.margins_root if reads_margins(method) else study.root
    folder = root / f"seed-{seed}" / quality / method / setting_name(parameters)
    inputs = {
        "pairs": pairs.key,
        "model": fingerprint_source(study.train.model),
        "train": train.made_from(without=set()),
        "seed": seed,
        **_judging(study, split),
    }
    return _cell(study, f"{quality}, {method}, seed {seed}, {folder.name}", folder, inputs, work)


def _cell(
    study: Study, name: str, folder: Path, inputs: dict[str, Any], work: Callable[[Path], None]
) -> dict[str, Any]:
    """What ``cell.json`` of a stage holds, with its key; a cell in ``study.known`` is not made."""
    key = stage_key(name, inputs)
    if key in study.known:
        return study.known[key]
    return {"key": key, **read_json(run_stage(name, folder, inputs, work).folder / CELL)}


def _measured(study: Study, pairs: Stage, quality: Quality, seed: int) -> Parameters:
    """Slope, trust and strength as ``align trust`` measures them on the pairs."""
    origin = "cross-fitted" if study.margins == "cross-fitted" else "outside"

    def work(folder: Path) -> None:
        model, length = study.train.model, int(study.train.trainer.get("max_length") or MAX_LENGTH)
        table = read_pairs(pairs.folder / "pairs")
        write_json(
            folder / FILE, measure_trust(table, model, folder / FEATURES, origin=origin, max_length=length, seed=seed)
        )

    inputs = {"pairs": pairs.key, "model": fingerprint_source(study.train.model), "origin": origin, "seed": seed}
    stage = run_stage(
        f"trust, {quality}, seed {seed}", study.margins_root / f"seed-{seed}" / quality / "measured", inputs, work
    )
    return dict(loss_parameters(read_json(stage.folder / FILE)))


def run_reference(study: Study, seed: int, split: Split) -> dict[str, Any]:
    """The cell of the reference model."""

    def work(folder: Path) -> None:
        found = _judge(study, Policy(REFERENCE, study.train.model), seed, split, folder)
        write_json(folder / CELL, {"method": REFERENCE, "seed": seed, "split": split.name, "decoded": found})

    inputs = {"model": fingerprint_source(study.train.model), "seed": seed, **_judging(study, split)}
    folder = study.root / f"seed-{seed}" / f"{REFERENCE}-{split.name}"
    return _cell(study, f"{REFERENCE}, seed {seed}", folder, inputs, work)


def _judging(study: Study, split: Split) -> dict[str, Any]:
    return {
        "prompts": read_prompts(study, split.name),
        "temperatures": split.temperatures,
        "max_new_tokens": study.sizes.max_new_tokens,
        "judge": study.judge,
    }


def _judge(study: Study, policy: Policy, seed: int, split: Split, folder: Path) -> Decoded:
    sizes = study.sizes
    decodings = [
        Sampling(sizes.max_new_tokens, heat, seed=seed, batch_size=sizes.batch_size) for heat in split.temperatures
    ]
    reference = Policy(REFERENCE, study.train.model)
    prompts = read_prompts(study, split.name)
    return judge_policy(policy, reference, prompts, decodings, make_judge(study.judge), folder)


def choose(cells: Sequence[dict[str, Any]]) -> int:
    """Index of the candidate with the highest mean gold reward on the validation prompts at temperature 1."""
    return int(np.argmax([np.mean(cell["decoded"]["1"]["reward"]) for cell in cells]))
