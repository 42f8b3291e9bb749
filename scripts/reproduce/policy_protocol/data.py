"""Prompts, samples, labeled pairs of three qualities and their margins: everything that a policy is trained on.

high: both responses are samples of the reference model. low: the sample with the higher gold reward and the review's
own continuation. medium: the first half of the prompts as in low, the others as in high. The label is drawn from the
gold reward by Bradley-Terry. Every folder is a stage.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from scipy.special import expit

from align.config import RewardSection, TrainSection
from align.data.pairs import read_pairs, with_columns, write_pairs
from align.errors import DataError
from align.generation.engines import make_engine
from align.generation.types import Sampling
from align.io.files import read_json, write_json
from align.io.hashing import fingerprint_source
from align.io.stage import Stage, run_stage
from align.models.loading import load_tokenizer
from align.sharding.jobs import read_table
from align.sharding.shards import in_parts
from reward_models.crossfit import FOLD, cross_fit
from reward_models.judges import make_judge
from reward_models.margin_metrics import evaluate_margins
from reward_models.score import RewardScorer
from reward_models.train import train_reward_model
from scripts.assets.demo_data import PROMPT_WORDS, SHORTEST, Snippet, human_pairs, read_snippets

Quality = Literal["high", "medium", "low"]
Margins = Literal["outside", "in-sample", "cross-fitted", "noise"]
QUALITIES: tuple[Quality, ...] = ("high", "medium", "low")
PART = 64
PROMPTS, SAMPLES = "prompts.json", "samples.parquet"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of pairs and prompts, lengths, and the scale of the labels."""

    reward_pairs: int
    train_prompts: int
    validation_prompts: int
    test_prompts: int
    max_new_tokens: int
    batch_size: int
    label_scale: float
    """P(first preferred) = sigmoid(label_scale * difference of gold rewards)."""


@dataclass(frozen=True, slots=True)
class Study:
    """What every cell shares."""

    root: Path
    """Folder of all that reads no margins: prompts, samples, labels, outside reward model, policies without margins."""
    snippets: Path
    sizes: Sizes
    train: TrainSection
    reward: RewardSection
    margins: Margins
    """outside: a reward model trained on human-rated snippets, none of them a prompt here. in-sample: as in the paper,
    one trained on the same pairs. cross-fitted: each pair's from a model trained on the others. noise: the outside
    model's scores, permuted among the pairs: equally large, without information."""
    judge: str = "vader"
    known: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Key -> cell of an earlier study, perhaps from another machine; see ``read_known``."""

    @property
    def margins_root(self) -> Path:
        """Folder of all that reads these margins."""
        return self.root / self.margins


def read_known(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The cells in the ``cells.jsonl`` of earlier studies, those of the reference included, by key."""
    cells = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return {cell["key"]: cell for cell in cells}


def make_prompts(study: Study) -> Stage:
    """Openings to train, validate and test on, and human-rated pairs; no snippet is in two of these parts."""
    sizes = study.sizes
    counts = {"train": sizes.train_prompts, "validation": sizes.validation_prompts, "test": sizes.test_prompts}

    def work(folder: Path) -> None:
        snippets = read_snippets(study.snippets)
        random.Random(0).shuffle(snippets)
        long = [snippet for snippet in snippets if len(snippet.text.split()) >= SHORTEST]
        used = long[: sum(counts.values())]
        if len(used) < sum(counts.values()):
            raise DataError(
                f"{len(long)} snippets have {SHORTEST} words, {sum(counts.values())} wanted", code="demo-data"
            )
        parts, start = {}, 0
        for name, count in counts.items():
            parts[name] = [_opening(snippet) for snippet in used[start : start + count]]
            start += count
        write_json(folder / PROMPTS, parts)
        taken = {snippet.id for snippet in used}
        rest = [snippet for snippet in snippets if snippet.id not in taken]
        write_pairs(Dataset.from_list(human_pairs(rest, sizes.reward_pairs, random.Random(0))), folder / "human")

    inputs = {"snippets": fingerprint_source(str(study.snippets)), "counts": counts, "pairs": sizes.reward_pairs}
    return run_stage("prompts", study.root / "prompts", inputs, work)


def _opening(snippet: Snippet) -> dict[str, str]:
    words = snippet.text.split()
    return {"prompt": " ".join(words[:PROMPT_WORDS]), "rest": " " + " ".join(words[PROMPT_WORDS:])}


def read_prompts(study: Study, part: str) -> list[str]:
    """The prompts of ``train``, ``validation`` or ``test``."""
    return [row["prompt"] for row in read_json(study.root / "prompts" / PROMPTS)[part]]


def make_samples(study: Study, prompts: Stage, seed: int) -> Stage:
    """Two continuations of each training prompt by the reference model."""
    sizes = study.sizes

    def work(folder: Path) -> None:
        engine = make_engine("auto", study.train.model, batch_size=sizes.batch_size)
        wanted = read_prompts(study, "train")
        sampling = Sampling(sizes.max_new_tokens, n=2, seed=seed)

        def part(rows: range) -> Dataset:
            found = engine.generate([wanted[k] for k in rows], sampling)
            texts = [[completion.text for completion in group] for group in found]
            return Dataset.from_dict({"first": [one[0] for one in texts], "second": [one[1] for one in texts]})

        in_parts(len(wanted), PART, folder / "parts", part, what="samples").to_parquet(str(folder / SAMPLES))

    inputs = {"prompts": prompts.key, "model": fingerprint_source(study.train.model), "seed": seed, **asdict(sizes)}
    return run_stage(f"samples, seed {seed}", study.root / f"seed-{seed}" / "samples", inputs, work)


def label(
    prompts: list[str],
    first: list[str],
    second: list[str],
    gap: np.ndarray,
    *,
    scale: float,
    seed: int,
    antithetic: bool = False,
) -> Dataset:
    """Pairs whose chosen response is drawn by Bradley-Terry from ``gap`` [N], gold of the first minus the second.

    ``antithetic`` takes 1 - u in place of each uniform number u: the two draws of a seed err on opposite pairs.
    """
    uniform = np.random.default_rng(seed).random(len(gap))
    turned = (1 - uniform if antithetic else uniform) >= expit(scale * gap)
    rows = [
        {"id": str(k), "prompt": prompt, "chosen": b if turn else a, "rejected": a if turn else b,
         "gold_margin": float(-margin if turn else margin)}
        for k, (prompt, a, b, turn, margin) in enumerate(zip(prompts, first, second, turned, gap, strict=True))
        if a.strip() and b.strip() and a != b
    ]  # fmt: skip
    return Dataset.from_list(rows)


def responses(study: Study, quality: Quality, seed: int) -> tuple[list[str], list[str]]:
    """First and second response of each training prompt at the given quality."""
    table = read_table(study.root / f"seed-{seed}" / "samples" / SAMPLES)
    first, second = list(table["first"]), list(table["second"])
    rows = read_json(study.root / "prompts" / PROMPTS)["train"]
    own = _cut(study, [row["rest"] for row in rows])
    prompts = [row["prompt"] for row in rows]
    judge = make_judge(study.judge)
    second_better = judge.score(prompts, second) > judge.score(prompts, first)
    replaced = {"high": 0, "medium": len(rows) // 2, "low": len(rows)}[quality]
    for k in range(replaced):
        first[k], second[k] = (second[k] if second_better[k] else first[k]), own[k]
    return first, second


def _cut(study: Study, texts: list[str]) -> list[str]:
    """The texts cut to as many tokens as the model may sample."""
    tokenizer = load_tokenizer(study.train.model)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    most = study.sizes.max_new_tokens
    cut = [tokenizer.decode(one[:most]) if len(one) > most else text for one, text in zip(ids, texts, strict=True)]
    return [text if text.startswith(" ") else f" {text}" for text in cut]


def make_labels(study: Study, samples: Stage, quality: Quality, seed: int) -> Stage:
    """The labeled pairs of a quality in ``pairs/``, without margins."""

    def work(folder: Path) -> None:
        prompts = read_prompts(study, "train")
        first, second = responses(study, quality, seed)
        judge = make_judge(study.judge)
        gap = judge.score(prompts, first) - judge.score(prompts, second)
        write_pairs(label(prompts, first, second, gap, scale=study.sizes.label_scale, seed=seed), folder / "pairs")

    inputs = {"samples": samples.key, "quality": quality, "judge": study.judge, "seed": seed}
    folder = study.root / f"seed-{seed}" / quality / "labels"
    return run_stage(f"labels, {quality}, seed {seed}", folder, inputs, work)


def make_margins(study: Study, labels: Stage, quality: Quality, seed: int) -> Stage:
    """The same pairs with margins in ``pairs/``; the quality of labels and margins in ``metrics.json``."""

    def work(folder: Path) -> None:
        scored = _margins(study, read_pairs(labels.folder / "pairs"), folder, seed)
        write_pairs(scored, folder / "pairs")
        gold_margin, margin = np.asarray(scored["gold_margin"]), np.asarray(scored["margin"])
        facts: dict[str, Any] = {
            "pairs": len(scored),
            "labels_against_gold": float((gold_margin < 0).mean()),
            "margin_and_gold_correlation": float(np.corrcoef(margin, gold_margin)[0, 1]),
            "margins": evaluate_margins(margin).to_dict(),
        }
        write_json(folder / "metrics.json", facts)

    inputs = {
        "labels": labels.key,
        "margins": study.margins,
        "reward": study.reward.made_from(without=set()),
        "backbone": fingerprint_source(study.reward.model),
        "seed": seed,
    }
    folder = study.margins_root / f"seed-{seed}" / quality / "margins"
    return run_stage(f"margins {study.margins}, {quality}, seed {seed}", folder, inputs, work)


def _margins(study: Study, pairs: Dataset, folder: Path, seed: int) -> Dataset:
    """``pairs`` with the columns of the reward model's scores."""
    if study.margins == "cross-fitted":
        return cross_fit(pairs, study.reward, folder / "reward", seed=seed).remove_columns(FOLD)
    model = folder / "reward"
    if study.margins == "in-sample":
        train_reward_model(pairs, study.reward, model, seed=seed)
    else:
        model = study.root / "reward" / "model"
    scorer = RewardScorer(model, batch_tokens=study.reward.batch_tokens, max_length=study.reward.max_length)
    scored = scorer.score_pairs(pairs)
    return permuted_scores(scored, seed) if study.margins == "noise" else scored


def permuted_scores(scored: Dataset, seed: int) -> Dataset:
    """The table with the scores permuted among the pairs, both responses' together, and each margin's sign drawn."""
    rng = np.random.default_rng(seed)
    order, turned = rng.permutation(len(scored)), rng.random(len(scored)) < 0.5
    first, second = (np.asarray(scored[name])[order] for name in ("reward_chosen", "reward_rejected"))
    chosen, rejected = np.where(turned, second, first), np.where(turned, first, second)
    columns = {"reward_chosen": chosen, "reward_rejected": rejected, "margin": chosen - rejected}
    return with_columns(scored, columns)


def make_reward_model(study: Study, prompts: Stage) -> Stage:
    """The outside reward model, trained on human-rated snippets."""

    def work(folder: Path) -> None:
        train_reward_model(read_pairs(study.root / "prompts" / "human"), study.reward, folder / "model", seed=0)

    settings = study.reward.made_from(without={"folds"})
    inputs = {"prompts": prompts.key, "settings": settings, "backbone": fingerprint_source(study.reward.model)}
    return run_stage("reward model", study.root / "reward", inputs, work)
