"""Is a filtered quarter of noisy pairs worth all of them, or more than a random quarter, to a policy?

A pair is two human-rated movie-review snippets; gold says that the one with the higher mean rating (15 to 20 people) is
better, and a known share of the labels is flipped. Margins are cross-fitted on the flipped labels (a logistic head on
frozen MiniLM features, five folds), the filter is `align filter` with its default weights; diversity is that of both
responses together, since all pairs share one prompt. Then DPO and MADPO train SmolLM2-135M on all pairs, on a random
subset, on the filtered one and on the one with the largest margins, one pass each. VADER, which none of them has seen,
judges them on openings of other snippets. A head trained on each subset is judged on clean pairs.

Every cell (share flipped, seed, subset, loss) is a folder with cell.json; a cell that exists, or is in --known, is not
computed again.

    python -m scripts.study.filtered_policies --flipped 0.2 0.3 0.4 --seeds 0 1 2
"""

import argparse
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from align.commands.generate import write_table
from align.config import FilterSection, LossSection, RewardSection, TrainSection
from align.data.pairs import read_pairs, write_pairs
from align.errors import AlignError
from align.evaluation.policies import REFERENCE, Policy
from align.filtering.embeddings import embed
from align.filtering.filter_pairs import filter_pairs
from align.generation.types import Sampling
from align.io.console import configure, log, progress
from align.io.files import read_json, write_json
from align.io.hashing import digest
from align.io.stage import run_stage
from align.training.train import MODEL, train_policy
from reward_models.crossfit import cross_fit
from reward_models.judges import make_judge
from reward_models.score import RewardScorer
from reward_models.train import train_reward_model
from scripts.assets.demo_data import PAIR_PROMPT, Snippet, as_pair, openings, read_snippets
from scripts.reproduce.policy_protocol.data import read_known
from scripts.reproduce.policy_protocol.judging import judge_policy, merge_adapter
from scripts.reproduce.policy_protocol.report import crossed, shown
from scripts.tables import table

WHAT = ("gain", "minus random", "minus all pairs", "KL", "CPU seconds")
ARMS = ("all pairs", "random", "filtered", "largest margins")
LOSSES = {"dpo": LossSection(loss="dpo", parameters={"beta": 0.1}), "madpo": LossSection(loss="madpo")}
CELL = "cell.json"
JUDGE = "vader"
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the study, fixed before any result."""

    pairs: int
    keep: float
    clean_pairs: int
    prompts: int
    batch: int
    rate: float
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Study:
    """What every cell shares."""

    assets: Path
    output: Path
    sizes: Sizes
    known: dict[str, dict[str, Any]]

    @property
    def model(self) -> str:
        """Folder of the model that is policy and reference."""
        return str(self.assets / "smollm2")

    @property
    def reward(self) -> RewardSection:
        """Settings of the reward model: a head on frozen features."""
        return RewardSection(model=str(self.assets / "minilm"), head="logistic", folds=5, max_length=128)


def gold_pairs(snippets: list[Snippet], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """``count`` pairs in which no snippet occurs twice, labeled by the mean ratings."""
    pool = rng.sample(snippets, len(snippets))
    ordered = (sorted(two, key=lambda one: -one.mean) for two in zip(pool[0::2], pool[1::2], strict=False))
    return [as_pair(*two) for two in ordered if two[0].mean != two[1].mean][:count]


def flip(rows: list[dict[str, Any]], share: float, rng: random.Random) -> list[dict[str, Any]]:
    """The same pairs with a share of the labels flipped."""
    wrong = set(rng.sample(range(len(rows)), round(share * len(rows))))
    return [
        row | {"chosen": row["rejected"], "rejected": row["chosen"], "gold_margin": -row["gold_margin"]}
        if k in wrong
        else row
        for k, row in enumerate(rows)
    ]


def split(study: Study) -> tuple[list[Snippet], list[dict[str, str]]]:
    """All snippets in a fixed random order, and openings of some; the same for every seed."""
    snippets = read_snippets(study.assets / "snippets")
    random.Random(0).shuffle(snippets)
    return snippets, openings(snippets, study.sizes.prompts)


def draw(study: Study, flipped: float, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Noisy pairs to train on, and clean pairs; no snippet is in both or among the openings that judge policies."""
    rng, sizes = random.Random(f"{seed}"), study.sizes
    snippets, prompts = split(study)
    taken = {row["id"] for row in prompts}
    rest = rng.sample(left := [snippet for snippet in snippets if snippet.id not in taken], len(left))
    cut = len(rest) * 2 // 3
    train = flip(gold_pairs(rest[:cut], sizes.pairs, rng), flipped, random.Random(f"{seed} {flipped}"))
    clean = gold_pairs(rest[cut:], sizes.clean_pairs, rng)
    return train, clean


def scored_and_kept(
    study: Study, rows: list[dict[str, Any]], folder: Path, seed: int
) -> tuple[Dataset, np.ndarray, dict[str, float]]:
    """The pairs with cross-fitted margins, whether the filter keeps each [N], and CPU seconds of both steps."""
    start = time.process_time()
    scored = cross_fit(Dataset.from_list(rows), study.reward, folder / "reward", seed=seed)
    seconds = {"margins": time.process_time() - start}
    start = time.process_time()
    texts = [row["chosen"].strip() + " " + row["rejected"].strip() for row in rows]
    np.save(folder / "vectors.npy", embed(texts, study.reward.model))
    settings = FilterSection(keep=study.sizes.keep, embeddings=str(folder / "vectors.npy"))
    kept = filter_pairs(scored, settings, folder / "parts", held_out=[], seed=seed).kept
    return scored, kept, seconds | {"filter": time.process_time() - start}


def make_subsets(study: Study, flipped: float, seed: int) -> Path:
    """Make a folder per arm with its pairs in ``pairs/``, and subsets.json with sizes, CPU seconds and accuracies."""

    def work(folder: Path) -> None:
        rows, clean = draw(study, flipped, seed)
        scored, kept, seconds = scored_and_kept(study, rows, folder, seed)
        size = int(kept.sum())
        places = {
            "all pairs": np.arange(len(rows)),
            "random": np.sort(np.random.default_rng(seed).choice(len(rows), size, replace=False)),
            "filtered": np.flatnonzero(kept),
            "largest margins": np.sort(np.argsort(-np.asarray(scored["margin"]), kind="stable")[:size]),
        }
        facts: dict[str, Any] = {"seconds": seconds, "arms": {}}
        for name in ARMS:
            part = scored.select(places[name])
            write_pairs(part, folder / name / "pairs")
            train_reward_model(part, study.reward, folder / name / "head", seed=seed)
            scorer = RewardScorer(folder / name / "head", batch_tokens=4096, max_length=128)
            margin = scorer.score_pairs(Dataset.from_list(clean))["margin"]
            facts["arms"][name] = {
                "pairs": len(part),
                "gold_labels": float(np.mean(np.asarray(part["gold_margin"]) > 0)),
                "head_on_clean": float(np.mean(np.asarray(margin) > 0)),
            }
        write_json(folder / "subsets.json", facts)
        for left in ("parts", "reward"):
            shutil.rmtree(folder / left)

    inputs = {"flipped": flipped, "seed": seed, "sizes": asdict(study.sizes)}
    name = f"subsets, {flipped:.0%} flipped, seed {seed}"
    return run_stage(name, study.output / f"{flipped:g}-{seed}" / "subsets", inputs, work).folder


def trainer_fields(study: Study, **more: Any) -> dict[str, Any]:
    """Fields of trl.DPOConfig: those of the demo, one pass."""
    return {
        "num_train_epochs": 1, "per_device_train_batch_size": study.sizes.batch, "warmup_steps": 2,
        "learning_rate": study.sizes.rate, "lr_scheduler_type": "cosine", "max_length": 128,
        "bf16": True, "use_cpu": not torch.cuda.is_available(), "gradient_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
    } | more  # fmt: skip


def run_cell(study: Study, flipped: float, seed: int, arm: str, loss: str) -> dict[str, Any]:
    """Train and judge one policy, unless its cell exists."""
    named = {"flipped": flipped, "seed": seed, "arm": arm, "loss": loss}
    key = digest(named | {"sizes": asdict(study.sizes), "judge": JUDGE})
    if key in study.known:
        return study.known[key]
    subsets = make_subsets(study, flipped, seed)
    folder = study.output / f"{flipped:g}-{seed}" / f"{arm}-{loss}"

    def work(folder: Path) -> None:
        start, begun = time.process_time(), (folder / "train").exists()
        pairs = read_pairs(subsets / arm / "pairs")
        cache = study.output / f"{flipped:g}-{seed}" / "reference-logps"
        config = TrainSection(
            model=study.model, methods={loss: LOSSES[loss]}, peft=LORA, trainer=trainer_fields(study)
        )  # fmt: skip
        train_policy(pairs, config, loss, folder / "train", seed=seed, reference_cache=cache)
        seconds = None if begun else time.process_time() - start  # this process saw only a part of a resumed training
        merged = merge_adapter(folder / "train" / MODEL, study.model, folder / "merged")
        found = judged(study, Policy(loss, str(merged)), seed, folder)
        shutil.rmtree(folder / "merged", ignore_errors=True)
        made = read_json(subsets / "subsets.json")
        own = made["arms"][arm] | {
            "margin_seconds": made["seconds"]["margins"],
            "filter_seconds": made["seconds"]["filter"],
        }
        write_json(folder / CELL, named | own | {"seconds": seconds} | found)

    stage = run_stage(f"{arm}, {loss}, {flipped:.0%} flipped, seed {seed}", folder, {"key": key}, work)
    return {"key": key} | read_json(stage.folder / CELL)


def run_reference(study: Study, seed: int) -> dict[str, Any]:
    """The cell of the reference."""
    named = {"flipped": None, "seed": seed, "arm": REFERENCE, "loss": REFERENCE}
    key = digest(named | {"sizes": asdict(study.sizes), "judge": JUDGE})
    if key in study.known:
        return study.known[key]

    def work(folder: Path) -> None:
        write_json(folder / CELL, named | judged(study, Policy(REFERENCE, study.model), seed, folder))

    stage = run_stage(f"reference, seed {seed}", study.output / f"reference-{seed}", {"key": key}, work)
    return {"key": key} | read_json(stage.folder / CELL)


def judged(study: Study, policy: Policy, seed: int, folder: Path) -> dict[str, Any]:
    """Reward and KL of one completion per prompt; prompts begin like those of the pairs."""
    prompts = [f"{PAIR_PROMPT} {row['prompt']}" for row in split(study)[1]]
    decoding = Sampling(study.sizes.max_new_tokens, seed=seed, batch_size=64)
    return judge_policy(policy, Policy(REFERENCE, study.model), prompts, [decoding], make_judge(JUDGE), folder)["1"]


def less(own: list[dict[str, Any]], base: list[dict[str, Any]]) -> np.ndarray:
    """Differences of the rewards on the same prompts [seeds, prompts]."""
    return np.array([np.subtract(one["reward"], other["reward"]) for one, other in zip(own, base, strict=True)])


def summarize(cells: list[dict[str, Any]], references: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per share flipped and arm, over the seeds for which all arms have both losses."""
    start = {cell["seed"]: np.array(cell["reward"]) for cell in references}
    found = {(cell["flipped"], cell["arm"], cell["loss"], cell["seed"]): cell for cell in cells}
    rows = []
    for flipped in sorted({cell["flipped"] for cell in cells}):
        seeds = [s for s in start if all((flipped, arm, loss, s) in found for arm in ARMS for loss in LOSSES)]
        for arm in ARMS if seeds else ():
            own = [found[flipped, arm, "dpo", seed] for seed in seeds]
            row: dict[str, Any] = {"flipped": flipped, "arm": arm, "seeds": len(seeds)}
            for name in ("pairs", "gold_labels", "head_on_clean", "margin_seconds", "filter_seconds"):
                row[name] = float(np.mean([cell[name] for cell in own]))
            for loss in LOSSES:
                here, random_ = ([found[flipped, one, loss, seed] for seed in seeds] for one in (arm, "random"))
                gain = np.array([np.array(cell["reward"]) - start[cell["seed"]] for cell in here])
                every = [found[flipped, "all pairs", loss, seed] for seed in seeds]
                less_random, less_all = less(here, random_), less(here, every)
                row[loss] = {
                    "gain": crossed(gain).to_dict(),
                    "less_random": crossed(less_random).to_dict(),
                    "less_random_by_seed": less_random.mean(axis=1).round(4).tolist(),
                    "less_all": crossed(less_all).to_dict(),
                    "less_all_by_seed": less_all.mean(axis=1).round(4).tolist(),
                    "kl": float(np.mean([np.mean(cell["kl"]) for cell in here])),
                    "seconds": float(np.mean([cell["seconds"] for cell in here if cell["seconds"] is not None])),
                }
            rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/filtering.md."""
    head = ["flipped", "subset", "pairs", "gold labels", "head on clean pairs"]
    head += [f"{name}: {what}" for name in ("DPO", "MADPO") for what in WHAT]
    body = []
    for row in rows:
        cells = [f"{row['flipped']:.0%}", row["arm"], f"{row['pairs']:.0f}", f"{row['gold_labels']:.1%}"]
        cells.append(f"{row['head_on_clean']:.1%}")
        for loss in LOSSES:
            own = row[loss]
            less_random = "" if row["arm"] == "random" else shown(own["less_random"], "+")
            less_all = "" if row["arm"] == "all pairs" else shown(own["less_all"], "+")
            cells += [shown(own["gain"], "+"), less_random, less_all, f"{own['kl']:.1f}", f"{own['seconds']:.0f}"]
        body.append(cells)
    return table(head, body)


def options(document: str | None, output: str) -> argparse.ArgumentParser:
    """Command-line options that both studies on these pairs share."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(".assets"))
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--known", nargs="*", type=Path, default=[], metavar="CELLS.jsonl", help="of earlier runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=768)
    parser.add_argument("--prompts", type=int, default=128)
    return parser


def main() -> None:
    """Compute the missing cells, write cells.jsonl and table.json, print the table."""
    parser = options(__doc__, "runs/study-filtered-policies")
    parser.add_argument("--flipped", nargs="+", type=float, default=[0.2, 0.3, 0.4])
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--clean-pairs", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further cell after this time")
    arguments = parser.parse_args()
    configure()
    names = ("pairs", "keep", "clean_pairs", "prompts", "batch", "rate", "max_new_tokens")
    sizes = Sizes(**{name: getattr(arguments, name) for name in names})
    study = Study(arguments.assets, arguments.output, sizes, read_known(arguments.known))
    study.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    try:
        references = [run_reference(study, seed) for seed in arguments.seeds]
        cells = []
        wanted = [
            (flipped, seed, arm, loss)
            for seed in arguments.seeds for flipped in arguments.flipped for loss in LOSSES for arm in ARMS
        ]  # fmt: skip
        for one in progress(wanted, what="policies", total=len(wanted), unit="cells"):
            if time.monotonic() > end:
                break
            cells.append(run_cell(study, *one))
            write_table([*references, *cells], study.output / "cells.jsonl")
    except AlignError as error:
        sys.stderr.write(f"error {error}\n")
        sys.exit(2)
    rows = summarize(cells, references)
    write_json(study.output / "table.json", {"sizes": asdict(study.sizes), "rows": rows})
    print(markdown(rows))
    log.info("%d cells; %s", len(cells), study.output / "table.json")


if __name__ == "__main__":
    main()
