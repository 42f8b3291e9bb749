"""Which objective makes the best reward model of noisy human labels? Linear heads on frozen features, many seeds.

The human-rated movie-review snippets: 10,605 sentences, each rated by 15 to 20 people. A pair is two snippets; which is
preferred is decided by one rater, so labels carry real noise, and in a given share of the training pairs the label is
then flipped. Every objective trains a linear head on the same frozen MiniLM embeddings of the same pairs; its penalty
is chosen by the pair accuracy of 5-fold cross-validation on those (noisy) labels. Tested on pairs of other snippets:

    accuracy     which of the two has the higher mean rating over all raters
    auc          a snippet that won by mean rating against one that lost, over all pairs of pairs
    rater        accuracy on one rater's labels (nobody can reach 1)
    ece, brier   of sigmoid(margin) against one rater's labels, before and after temperature calibration out of fold
    correlation  of the margins with the differences of the mean ratings

A second part varies the number of pairs for the three heads (``--full-seeds``: fine-tuned models among them), a third
trains the best objectives with LoRA on the same pairs (``--lora-seeds``). Each cell is one JSON file that is not
computed again.

    python -m scripts.study.reward_models --seeds 8
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.special import expit
from scipy.stats import pearsonr

from align.config import RewardSection
from align.evaluation.ranking import auc
from align.filtering.embeddings import Encoder
from align.io.console import configure, progress
from align.io.files import read_json, write_json
from reward_models.calibration import best_temperature, calibrated_out_of_fold
from reward_models.margin_metrics import evaluate_margins
from reward_models.score import RewardScorer
from reward_models.train import train_reward_model
from scripts.assets.demo_data import Snippet, read_snippets
from scripts.study.reward_model_rows import BRADLEY_TERRY, ROWS, TUNED, Data, Fit, Pairs, apart, naive_bayes
from scripts.tables import table

BLOCK = 1500
FOLDS = 5
PENALTIES = (30000.0, 10000.0, 3000.0, 1000.0, 300.0, 100.0, 30.0)
HELD_OUT, TEACHER_PAIRS = 0.2, 3000
FLIPS = (0.0, 0.2, 0.4)
SIZES = (25, 50, 100, 200, 400, 800, 1600, 3200)
FINE_TUNED = (100, 400, 1600)
LORA_FLIPS = (0.0,)
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["query", "key", "value", "dense"]}
BASE = "bradley_terry"
METRICS = ("accuracy", "auc", "rater", "correlation", "ece", "ece_calibrated", "brier", "temperature")


def embed(snippets: list[Snippet], model: Path, folder: Path, end: float) -> np.ndarray | None:
    """Embeddings [N, D], computed and stored block by block; None if time runs out first."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(snippets), BLOCK)
    encoder: Encoder | None = None
    for start in progress(starts, what="embedding", total=len(starts), unit="blocks"):
        file = folder / f"{start:06d}.npy"
        if file.exists():
            continue
        if time.monotonic() > end:
            return None
        encoder = encoder or Encoder(str(model))
        values = np.asarray(encoder([snippet.text for snippet in snippets[start : start + BLOCK]]))
        np.save(file.with_suffix(".tmp.npy"), values, allow_pickle=False)
        file.with_suffix(".tmp.npy").replace(file)
    blocks = [np.load(folder / f"{start:06d}.npy", allow_pickle=False) for start in starts]
    return np.concatenate(blocks).astype(np.float64)


def draw(snippets: list[Snippet], rows: np.ndarray, count: int, rng: np.random.Generator) -> Pairs:
    """``count`` pairs of the snippets in ``rows``, none twice, each labeled by one rater; ties are left out."""
    made: list[tuple[int, int, float, float]] = []
    for first, second in rng.permutation(rows)[: len(rows) // 2 * 2].reshape(-1, 2).tolist():
        a, b = snippets[first], snippets[second]
        rater = int(rng.integers(min(len(a.ratings), len(b.ratings))))
        strength = a.ratings[rater] - b.ratings[rater]
        if strength != 0 and len(made) < count:
            high, low = (first, second) if strength > 0 else (second, first)
            made.append((high, low, abs(strength), snippets[high].mean - snippets[low].mean))
    columns = np.array(made)
    return Pairs(columns[:, 0].astype(int), columns[:, 1].astype(int), columns[:, 2], columns[:, 3])


def prepare(snippets: list[Snippet], features: np.ndarray, flips: float, pairs: int, seed: int) -> Data:
    """The pairs of one seed; pairs flipped at 20% are flipped at 40% too."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(snippets))
    cut = int(HELD_OUT * len(order))
    test = draw(snippets, order[:cut], cut, rng)
    every = draw(snippets, order[cut:], len(order), rng)
    train, teacher = every[np.arange(pairs)], every[np.arange(pairs, min(pairs + TEACHER_PAIRS, len(every.gold)))]
    wrong = [rng.random(len(part.gold)) < flips for part in (train, teacher)]
    return Data(features, train.flipped(wrong[0]), teacher.flipped(wrong[1]), test, rng)


def select_penalty(data: Data, fit: Fit) -> float:
    """The penalty with the best pair accuracy on held-out folds of the training pairs; the larger one in a tie."""
    fold = np.arange(len(data.train.gold)) * FOLDS // len(data.train.gold)
    right = np.zeros(len(PENALTIES))
    for number in range(FOLDS):
        rest, held = data.train[fold != number], data.train[fold == number]
        for k, penalty in enumerate(PENALTIES):
            right[k] += np.sum(apart(data, held) @ fit(data, rest, penalty) > 0)
    return PENALTIES[int(right.argmax())]


def measure(features: np.ndarray, head: np.ndarray, test: Pairs) -> dict[str, float]:
    """The metrics of a head on the test pairs."""
    return metrics(features[test.chosen] @ head, features[test.rejected] @ head, test.gold)


def metrics(chosen: np.ndarray, rejected: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """Metrics of the rewards of pairs that one rater labeled; ``gold`` is the difference of their mean ratings."""
    margin = chosen - rejected
    decided = gold != 0
    agrees = np.where(margin == 0, 0.5, margin * gold > 0)[decided]
    better, worse = np.where(gold > 0, chosen, rejected)[decided], np.where(gold > 0, rejected, chosen)[decided]
    fold = np.arange(len(margin)) % FOLDS
    mapped = calibrated_out_of_fold(margin, np.zeros(len(margin)), fold, "temperature", length=False)
    return {
        "accuracy": float(agrees.mean()),
        "auc": auc(better, worse),
        "rater": float(np.mean(np.where(margin == 0, 0.5, margin > 0))),
        "correlation": float(pearsonr(margin, gold).statistic) if np.ptp(margin) > 0 else 0.0,
        "ece": evaluate_margins(margin).ece,
        "ece_calibrated": evaluate_margins(mapped).ece,
        "brier": float(np.mean(np.square(1 - expit(margin)))),
        "temperature": best_temperature(margin),
    }


def run_objective(snippets: list[Snippet], features: np.ndarray, cell: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Cell of one objective, share of flips and seed."""
    data = prepare(snippets, features, cell["flips"], pairs, cell["seed"])
    fit = ROWS[cell["row"]]
    penalty = PENALTIES[0] if fit is naive_bayes else select_penalty(data, fit)
    return measure(features, fit(data, data.train, penalty), data.test) | {"penalty": penalty}


def run_size(snippets: list[Snippet], features: np.ndarray, cell: dict[str, Any]) -> dict[str, Any]:
    """Cell of one head on frozen features, number of pairs and seed."""
    data = prepare(snippets, features, 0.0, cell["pairs"], cell["seed"])
    fit = naive_bayes if cell["head"] == "naive-bayes" else BRADLEY_TERRY
    penalty = PENALTIES[0] if fit is naive_bayes else select_penalty(data, fit)
    return measure(features, fit(data, data.train, penalty), data.test)


def texts_of(snippets: list[Snippet], part: Pairs, columns: Mapping[str, Any]) -> Dataset:
    """The pairs as a pair table, with more ``columns``."""
    return Dataset.from_dict(
        {
            "id": [f"{a}-{b}" for a, b in zip(part.chosen, part.rejected, strict=True)],
            "prompt": ["Movie review:"] * len(part.gold),
            "chosen": [f" {snippets[row].text}" for row in part.chosen],
            "rejected": [f" {snippets[row].text}" for row in part.rejected],
            **columns,
        }
    )


def run_tuned(snippets: list[Snippet], data: Data, cell: dict[str, Any], model: Path, work: Path) -> dict[str, float]:
    """Cell of MiniLM fine-tuned, fully or with LoRA, as `align reward train` does it."""
    fields, columns = TUNED[cell.get("row", BASE)]
    lora = cell["kind"] == "lora"
    trainer = {
        "num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 1e-3 if lora else 1e-4,
        "warmup_steps": 10, "save_strategy": "steps", "save_steps": 50, "save_total_limit": 1,
    }  # fmt: skip
    config = RewardSection(model=str(model), max_length=64, peft=LORA if lora else None, trainer=trainer, **fields)
    folder = work / "tuned" / cell_file(work, cell).stem
    made = {} if columns is None else {name: value.tolist() for name, value in columns(data, data.train).items()}
    train_reward_model(texts_of(snippets, data.train, made), config, folder, seed=cell["seed"])
    scorer = RewardScorer(folder, batch_tokens=8192, max_length=64)
    scored = scorer.score_pairs(texts_of(snippets, data.test, {}))
    return metrics(np.asarray(scored["reward_chosen"]), np.asarray(scored["reward_rejected"]), data.test.gold)


def cells(seeds: int, full_seeds: int, lora_seeds: int) -> list[dict[str, Any]]:
    """Every cell, seed by seed, so that a stopped study still has all rows."""
    made: list[dict[str, Any]] = []
    for seed in range(seeds):
        made += [{"kind": "objective", "row": row, "flips": flips, "seed": seed} for flips in FLIPS for row in ROWS]
        heads = ("naive-bayes", "logistic")
        made += [{"kind": "size", "head": head, "pairs": n, "seed": seed} for n in SIZES for head in heads]
    for seed in range(lora_seeds):
        made += [{"kind": "lora", "row": row, "flips": flips, "seed": seed} for flips in LORA_FLIPS for row in TUNED]
    for seed in range(full_seeds):
        made += [{"kind": "full", "head": "full", "pairs": n, "seed": seed} for n in FINE_TUNED]
    return made


def cell_file(folder: Path, cell: Mapping[str, Any]) -> Path:
    """File of a cell."""
    name = "_".join(str(value) for value in cell.values())
    return folder / "cells" / ("".join(c if c.isalnum() or c in "._-" else "-" for c in name) + ".json")


def summarize(found: list[tuple[dict[str, Any], dict[str, float]]]) -> dict[str, Any]:
    """Mean over the seeds and half-width of its 95% interval, for every row; differences to Bradley-Terry."""
    groups: dict[str, dict[str, dict[int, dict[str, float]]]] = {"objective": {}, "lora": {}, "size": {}, "full": {}}
    for cell, values in found:
        key = f"{cell['row']}|{cell['flips']:g}" if "row" in cell else f"{cell['head']}|{cell['pairs']}"
        groups[cell["kind"]].setdefault(key, {})[cell["seed"]] = values
    made: dict[str, Any] = {}
    for kind, rows in groups.items():
        made[kind] = {
            key: {name: spread([values[name] for values in by_seed.values()]) for name in METRICS}
            for key, by_seed in rows.items()
        }
        for key, by_seed in rows.items() if kind in ("objective", "lora") else ():
            base = rows.get(f"{BASE}|{key.split('|')[1]}", {})
            gains = [values["accuracy"] - base[seed]["accuracy"] for seed, values in by_seed.items() if seed in base]
            made[kind][key]["gain"] = spread(gains)
    return made


def spread(values: list[float]) -> list[float]:
    """Mean, half-width of its 95% interval (Student's t over the seeds), and count."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return [float(np.mean(values)) if values else float("nan"), float(half), len(values)]


def by_objective(rows: dict[str, Any], shares: tuple[float, ...], title: str) -> str:
    """Table of objectives, sorted by their accuracy without flips."""
    clean = {key.split("|")[0]: row for key, row in rows.items() if key.endswith("|0")}
    titles = [f"accuracy, {flips:.0%} flipped" for flips in shares] + ["AUC, 0%", "ECE raw, 0%", "ECE calibrated, 0%"]
    body = []
    for name in sorted(clean, key=lambda name: -clean[name]["accuracy"][0]):
        shown = []
        for flips in shares:
            row = rows.get(f"{name}|{flips:g}")
            gain = "" if row is None or name == BASE else f" ({row['gain'][0]:+.3f} ± {row['gain'][1]:.3f})"
            shown.append("" if row is None else f"{row['accuracy'][0]:.3f}{gain}")
        shown += [f"{clean[name][key][0]:.3f}" for key in ("auc", "ece", "ece_calibrated")]
        body.append([name, *shown])
    return table([title, *titles], body)


def markdown(summary: dict[str, Any]) -> str:
    """The tables of docs/reward-models.md: objectives under linear heads and under LoRA, then heads by pairs."""
    tables = [by_objective(summary["objective"], FLIPS, "objective")]
    if summary["lora"]:
        tables.append(by_objective(summary["lora"], LORA_FLIPS, "objective, with LoRA"))
    sizes = summary["size"] | summary["full"]
    heads = list(dict.fromkeys(key.split("|")[0] for key in sizes))
    body = []
    for n in SIZES:
        found = [sizes.get(f"{head}|{n}", {}).get("accuracy") for head in heads]
        shown = ["" if v is None else f"{v[0]:.3f} ± {v[1]:.3f}" for v in found]
        body.append([str(n), *shown])
    return "\n\n".join([*tables, table(["pairs", *heads], body)])


def main() -> None:
    """Compute the missing cells, write ``table.json``, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(".assets"))
    parser.add_argument("--output", type=Path, default=Path("runs/study-reward-models"))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--full-seeds", type=int, default=0, help="seeds of the fine-tuned models")
    parser.add_argument("--lora-seeds", type=int, default=0, help="seeds of the best objectives with LoRA")
    parser.add_argument("--pairs", type=int, default=800, help="training pairs of the objectives")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further cell after this time")
    arguments = parser.parse_args()
    configure()
    (arguments.output / "cells").mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    snippets = read_snippets(arguments.assets / "snippets")
    random.Random(0).shuffle(snippets)
    features = embed(snippets, arguments.assets / "minilm", arguments.output / "features", end)
    if features is None:
        return
    wanted = cells(arguments.seeds, arguments.full_seeds, arguments.lora_seeds)
    missing = [cell for cell in wanted if not cell_file(arguments.output, cell).exists()]
    for cell in progress(missing, what="cells", total=len(missing), unit="cells"):
        if time.monotonic() > end:
            break
        if cell["kind"] == "objective":
            values = run_objective(snippets, features, cell, arguments.pairs)
        elif cell["kind"] == "size":
            values = run_size(snippets, features, cell)
        else:
            data = prepare(snippets, features, cell.get("flips", 0.0), cell.get("pairs", arguments.pairs), cell["seed"])
            values = run_tuned(snippets, data, cell, arguments.assets / "minilm", arguments.output)
        write_json(cell_file(arguments.output, cell), values)
    files = [(cell, cell_file(arguments.output, cell)) for cell in wanted]
    summary = summarize([(cell, read_json(file)) for cell, file in files if file.exists()])
    write_json(arguments.output / "table.json", summary)
    print(markdown(summary))
    json.dump({"cells": sum(file.exists() for _, file in files), "of": len(wanted)}, sys.stderr)


if __name__ == "__main__":
    main()
