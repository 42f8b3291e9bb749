"""What `align eval reward-model` does: how often, how surely and how comparably a reward model is right."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.config import OodConfig, PairsConfig
from align.console import log, out
from align.errors import ConfigError
from align.estimates import share_among
from align.evaluation.ranking import auc_interval, opis
from align.evaluation.reward_pairs import findings_said, pair_findings
from align.evaluation.rewardbench import is_plain, section_scores
from align.model_folders import fingerprint_model
from align.pair_sources import read_source
from align.pairs import clusters_of, fingerprint, load_pairs
from align.reports.verdict import interval
from align.revisions import REWARDS
from align.shards import in_parts, read_table
from align.stage import check_files, run_stage, write_json
from reward_models.calibration import evaluate_margins
from reward_models.length_bias import word_difference

PART = 256
"""Pairs per part; a stopped scoring makes at most one of them again."""
REPORT = "reward_model.json"
PAGE = "reward_model.html"
SCORES = "scores.parquet"
SCORED = "pair-scores"
"""Folder below the output; `align eval reward` has its own in ``scores``."""
CHANCE = 0.5


def evaluate(
    source: PairsConfig,
    model: str,
    output: Path,
    *,
    chat: bool | None,
    batch_tokens: int,
    max_length: int,
    seed: int,
    trained_on: str | None = None,
) -> None:
    """Score pairs, write ``reward_model.json`` and ``reward_model.html`` into ``output``, print the numbers as JSON.

    Args:
        source: pairs; a ``subset`` column counts as ``group`` where there is none.
        model: reward model, folder or hub id.
        output: folder to write into.
        chat: plain pairs as messages; None: where they are in RewardBench's format and the model has a chat template.
        batch_tokens: padded tokens per batch.
        max_length: tokens per text; longer ones are cut from the right.
        seed: of the intervals.
        trained_on: the pairs that the model was trained on; distances to them are measured where given.

    Raises:
        AlignError: the pairs or the model cannot be used.
    """
    check_files(output, [])
    pairs, chat = _load(source, model, chat)
    log.info("scoring %d pairs of %s with %s%s -> %s", len(pairs), source.path, model,
             " as chat" if chat else "", output)  # fmt: skip
    inputs = {"pairs": fingerprint(pairs), "model": fingerprint_model(model), "max_length": max_length, "part": PART}
    inputs["revision"] = REWARDS

    def work(folder: Path) -> None:
        from reward_models.ensemble import EnsembleScorer

        scorer = EnsembleScorer(model, batch_tokens=batch_tokens, max_length=max_length)

        def part(rows: range) -> Dataset:
            scored = scorer.score_pairs(pairs.select(rows))
            return scored.select_columns(["id", "reward_chosen", "reward_rejected"])

        in_parts(len(pairs), PART, folder / "parts", part, what="scoring").to_parquet(str(folder / SCORES))
        shutil.rmtree(folder / "parts")

    stage = run_stage("scores", output / SCORED, inputs, work)
    scores = read_table(stage.folder / SCORES)
    groups = [str(group) for group in pairs["group"]] if "group" in pairs.column_names else None
    chosen, rejected = (np.asarray(scores[column]) for column in ("reward_chosen", "reward_rejected"))
    clusters, far = clusters_of(pairs), _distances(pairs, model, trained_on, output)
    found = reward_model_metrics(chosen, rejected, groups, seed=seed, clusters=clusters)
    found |= pair_findings(pairs, chosen - rejected, distances=far, seed=seed, clusters=clusters)
    found["said"] += findings_said(found)
    found["run"] = {
        "command": shlex.join(["align", *sys.argv[1:]]), "pairs": source.path, "model": model, "chat": chat,
        "seed": seed, "seconds": round(stage.seconds, 1),
    }  # fmt: skip
    write_json(output / REPORT, found | {"margins": (chosen - rejected).tolist()})
    from align.reports.reward_model_page import write_page

    write_page(output / PAGE, found, chosen - rejected, groups=groups, words=word_difference(pairs))
    texts = {"disagreements", "ood"}
    out.print_json(json.dumps({name: value for name, value in found.items() if name not in texts}))
    log.info("%s", found["said"][0])
    log.info("numbers: %s; look at it: open %s", output / REPORT, output / PAGE)


def reward_model_metrics(
    chosen: np.ndarray,
    rejected: np.ndarray,
    groups: list[str] | None,
    *,
    seed: int,
    clusters: np.ndarray | None = None,
) -> dict[str, Any]:
    """Accuracy, calibration, global AUC, categories, OPIS, RewardBench's sections; and what they say in words. Pure.

    Args:
        chosen: rewards of the chosen responses, [N].
        rejected: rewards of the rejected ones, [N].
        groups: category of each pair, [N], or None.
        seed: of the intervals.
        clusters: of the pairs, [N], that the intervals draw together; None: each pair is an independent draw.
    """
    right = np.where(chosen == rejected, 0.5, chosen > rejected)
    found: dict[str, Any] = evaluate_margins(chosen - rejected, seed=seed, clusters=clusters).to_dict()
    found["auc"] = auc_interval(chosen, rejected, seed=seed, clusters=clusters).to_dict()
    found |= {"categories": {}, "macro_accuracy": None, "opis": None, "rewardbench": None}
    if groups is not None:
        names = np.asarray(groups)
        for name in sorted(set(groups)):
            found["categories"][name] = {
                "accuracy": share_among(right, names == name, seed=seed, clusters=clusters),
                "mean_reward": float(np.concatenate([chosen[names == name], rejected[names == name]]).mean()),
            }
        accuracies = {name: item["accuracy"]["value"] for name, item in found["categories"].items()}
        found["macro_accuracy"] = float(np.mean(list(accuracies.values())))
        found["rewardbench"] = section_scores(accuracies)
        if len(accuracies) > 1:
            found["opis"] = opis(chosen, rejected, groups, seed=seed).to_dict()
    return found | {"said": _said(found)}


def _said(found: dict[str, Any]) -> list[str]:
    """The metrics in words, the most important first."""
    accuracy, area = found["accuracy"], found["auc"]
    if accuracy["low"] <= CHANCE <= accuracy["high"]:
        said = [f"At chance: the reward model agrees with {interval(accuracy)} of the labels."]
    else:
        said = [f"The reward model agrees with {interval(accuracy)} of the labels."]
    if area["high"] < accuracy["low"]:
        said.append(
            f"Across prompts it orders worse than within them: global AUC {interval(area)}. Its rewards carry an "
            "offset of the prompt, so compare responses to the same prompt only, not rewards of different prompts."
        )
    if found["opis"] is not None:
        level = f"OPIS {found['opis']['value']:.4f}, by chance up to {found['opis']['chance_high']:.4f}"
        if found["opis"]["differs"]:
            worst = max(found["opis"]["categories"], key=lambda name: found["opis"]["categories"][name])
            said.append(
                f"One reward threshold does not mean the same in every category ({level}); furthest off: {worst}."
            )
        else:
            said.append(f"No difference between the categories at a common reward threshold was seen ({level}).")
    return said


def _distances(pairs: Dataset, model: str, trained_on: str | None, output: Path) -> tuple[np.ndarray, float] | None:
    """Distance [N] of each pair to the training pairs, and that of 99% of those held back; kept below ``output``."""
    if trained_on is None:
        return None
    from align.filtering.columns import distances

    known = load_pairs(PairsConfig(path=trained_on))
    if isinstance(known["prompt"][0], str) != isinstance(pairs["prompt"][0], str):
        raise ConfigError(
            f"--trained-on {trained_on}: found pairs of another kind, expected plain text or messages like the others",
            code="eval-trained-on",
            hint="use --text, or give the training pairs as messages",
        )
    settings = OodConfig(model=model, pairs=PairsConfig(path=trained_on))
    return distances(pairs, settings, output / "distances" / fingerprint(pairs)[:16])


def _load(source: PairsConfig, model: str, chat: bool | None) -> tuple[Dataset, bool]:
    """The pairs with ``group``, as messages where wanted; and whether they were turned into messages."""
    rows, columns = read_source(source)
    plain = is_plain(sorted(columns), next((row.values for row in rows if not row.unreadable), {}))
    if "group" not in columns and "subset" in columns:
        source = source.model_copy(update={"columns": source.columns | {"group": "subset"}})
    pairs = load_pairs(source)
    if chat is None:
        chat = plain and _has_template(model)
    if not chat or not isinstance(pairs["prompt"][0], str):
        return pairs, False
    if not _has_template(model):
        raise ConfigError(
            f"--chat: {model} has no chat template", code="no-chat-template", hint="use --text, or another model"
        )
    return Dataset.from_list([_as_messages(row) for row in pairs]), True


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    answers = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return row | {"prompt": [{"role": "user", "content": row["prompt"]}]} | answers


def _has_template(model: str) -> bool:
    from align.model_loading import load_tokenizer

    return load_tokenizer(model).chat_template is not None
