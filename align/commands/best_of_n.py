"""`align best-of-n`: the best of each prompt's sampled completions, and the value of every n up to their number."""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from align.commands.generate import METRICS, STEM, Format, find_completions, write_table
from align.data.completions import Group, read_groups
from align.errors import ConfigError, DataError, listed
from align.generation.best_of_n import best_index, expected_best, kl_bound
from align.io.console import log
from align.io.files import write_json
from align.io.hashing import fingerprint_source
from align.io.stage import Stage, check_output, run_stage
from align.models.message_checks import check_prompts_of
from align.reports.best_of_n_page import shown_samples, write_best_of_n_page
from align.stats import interval, mean_interval
from reward_models.scorers import ScorerSpec, score_in_chunks

STAGE = "best-of-n"
SCORES = "scores"
CACHE = "parts-"
PAGE = "report.html"
SHOWN = 50
"""Prompts that the page shows."""


@dataclass(frozen=True, slots=True)
class BestSettings:
    """Settings of `align best-of-n`.

    Raises:
        ConfigError: the scorer is also the judge that measures.
    """

    scorer: ScorerSpec
    """Chooses the best completion."""
    gold: ScorerSpec | None = None
    """Only measures the chosen completions: their scores by ``scorer`` are high by construction."""
    format: Format = "parquet"
    seed: int = 0
    """Seed of the intervals."""

    def __post_init__(self) -> None:
        if self.gold is not None and self.gold.name == self.scorer.name:
            raise ConfigError(
                f"--gold {self.gold.name}: found the judge that chooses, expected another judge",
                code="best-of-n-option",
                hint="leave --gold out, or name another judge",
            )


def choose_best(completions: str | Path, settings: BestSettings, output: Path) -> Stage:
    """Write the best completion of each prompt, all scores, and ``metrics.json``; skip this if up to date.

    ``completions.parquet`` (or ``.jsonl``) has the row of the best completion as ``align generate`` wrote it, with
    ``score`` (and ``gold``); ``scores.parquet`` has ``id``, ``sample``, ``score`` (and ``gold``) of all completions;
    ``report.html`` shows the gain over n. A score is a reward, or P(yes) of a yes-no judge. ``best_of_n_curve``
    describes ``metrics.json``. A stopped scoring resumes.

    Raises:
        AlignError: the completions or a scorer cannot be used.
    """
    check_output(output, STAGE)
    file = find_completions(completions)
    groups = read_groups(file)
    count = _same_count(groups, file)
    measured = f", measured by {settings.gold.name}" if settings.gold else ""
    log.info("best-of-n: %d prompts of %s, the best of %d by %s%s -> %s",
             len(groups), file, count, settings.scorer.name, measured, output)  # fmt: skip
    judges = [settings.scorer, *([settings.gold] if settings.gold else [])]
    for judge in judges:
        if judge.reward_model is not None:
            check_prompts_of(
                [group.prompt for group in groups], [judge.reward_model], answered=True,
                trust_remote_code=judge.options.trust_remote_code, text_pair=judge.options.text_pair,
            )  # fmt: skip
    inputs = {
        "completions": fingerprint_source(file),
        "scorers": [judge.key for judge in judges],
        "settings": asdict(settings),
    }
    return run_stage(STAGE, output, inputs, lambda folder: _work(groups, count, settings, folder))


def best_of_n_curve(scores: np.ndarray, gold: np.ndarray | None, *, seed: int) -> list[dict[str, Any]]:
    """Unbiased estimates of the value of best-of-n for each n = 1..N, from all N samples.

    Args:
        scores: scores of N samples of each of P prompts, [P, N].
        gold: another judge's scores of the same samples, [P, N], or None.
        seed: seed of the intervals over prompts.

    Returns:
        ``[{"n", "score", "gain", "gold", "gold_gain", "kl_bound"}]``: mean score of the best of n and its paired gain
        over one sample, by the scorer and by ``gold`` (None without it), each with a 95% interval; ``kl_bound`` in
        nats.
    """
    curves = {"score": expected_best(scores, scores), "gold": None if gold is None else expected_best(scores, gold)}
    gains = {"score": "gain", "gold": "gold_gain"}
    found = []
    for n in range(1, scores.shape[1] + 1):
        row: dict[str, Any] = {"n": n}
        for name, curve in curves.items():
            at = None if curve is None else (curve[:, n - 1], curve[:, n - 1] - curve[:, 0])
            row[name] = at and mean_interval(at[0]).to_dict()
            row[gains[name]] = at and mean_interval(at[1]).to_dict()
        found.append(row | {"kl_bound": kl_bound(n)})
    return found


def second_half(scores: np.ndarray, gold: np.ndarray | None) -> dict[str, Any] | None:
    """What the second half of the samples adds: paired changes from the best of N // 2 to the best of N.

    The two ends do not depend on the scores, so the intervals are not those of a choice.

    Returns:
        ``{"from", "to", "score", "gold"}``, estimates with 95% intervals as JSON values; None below four samples.
    """
    count = scores.shape[1]
    if count < 4:
        return None
    half = count // 2
    found: dict[str, Any] = {"from": half, "to": count}
    for name, values in (("score", scores), ("gold", gold)):
        curve = None if values is None else expected_best(scores, values)
        found[name] = None if curve is None else mean_interval(curve[:, -1] - curve[:, half - 1]).to_dict()
    return found


def _same_count(groups: Sequence[Group], file: str) -> int:
    """The number of completions that every prompt has.

    Raises:
        DataError: prompts have different numbers of completions (the first 20 and a count).
    """
    counts = Counter(len(group.candidates) for group in groups)
    usual = counts.most_common(1)[0][0]
    odd = [f"{group.id}: found {len(group.candidates)}" for group in groups if len(group.candidates) != usual]
    if odd:
        raise DataError(
            f"{file}: {len(odd)} prompts have another number of completions than the {usual} of the others:\n"
            f"{listed(odd)}",
            code="completion-count",
            hint="give what one `align generate -n N` wrote",
        )
    return usual


def _work(groups: list[Group], count: int, settings: BestSettings, folder: Path) -> None:
    prompts = [group.prompt for group in groups for _ in group.candidates]
    texts = [candidate.completion for group in groups for candidate in group.candidates]

    def scored(judge: ScorerSpec, name: str) -> np.ndarray:
        rewards = score_in_chunks(judge.load, prompts, texts, folder / f"{CACHE}{name}")
        return np.asarray(expit(rewards) if judge.probabilities else rewards).reshape(len(groups), count)

    scores = {"score": scored(settings.scorer, "score")}
    if settings.gold is not None:
        scores["gold"] = scored(settings.gold, "gold")
    best = [best_index(row) for row in scores["score"].tolist()]
    write_table(
        [
            group.candidates[chosen].row | {name: float(values[k, chosen]) for name, values in scores.items()}
            for k, (group, chosen) in enumerate(zip(groups, best, strict=True))
        ],
        folder / f"{STEM}.{settings.format}",
    )
    write_table(
        [
            {"id": group.id, "sample": one.sample} | {name: float(v[k, place]) for name, v in scores.items()}
            for k, group in enumerate(groups)
            for place, one in enumerate(group.candidates)
        ],
        folder / f"{SCORES}.parquet",
    )
    found: dict[str, Any] = {
        "prompts": len(groups),
        "n": count,
        "scorer": settings.scorer.name,
        "gold": settings.gold and settings.gold.name,
        "curve": best_of_n_curve(scores["score"], scores.get("gold"), seed=settings.seed),
        "second_half": second_half(scores["score"], scores.get("gold")),
    }
    write_json(folder / METRICS, found)
    write_best_of_n_page(folder / PAGE, found, shown_samples(groups, best, scores, SHOWN))
    for name in scores:
        shutil.rmtree(folder / f"{CACHE}{name}")
    _log_curve(found["curve"])


def _log_curve(curve: list[dict[str, Any]]) -> None:
    """Log one line for the scorer and one for the judge that measures."""
    first, last = curve[0], curve[-1]
    log.info("best of %d: score %s, of one sample %s; KL to what was sampled from at most %.3g nats",
             last["n"], interval(last["score"]), interval(first["score"]), last["kl_bound"])  # fmt: skip
    if last["gold"] is not None:
        log.info("best of %d: by the other judge %s, of one sample %s, gain %s",
                 last["n"], interval(last["gold"]), interval(first["gold"]), interval(last["gold_gain"]))  # fmt: skip
