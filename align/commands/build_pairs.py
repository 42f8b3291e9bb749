"""`align pairs build`: score the completions of each prompt and build a table of preference pairs."""

import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from align.commands.generate import find_completions
from align.config.columns import CUT_OFF, FINISH_COLUMNS, TEMPLATE_COLUMNS
from align.data.completions import Candidate, Group, read_groups
from align.data.messages import argument_cells, split_arguments
from align.data.pair_selection import Guard, Mode, choose_pairs
from align.data.pairs import table_of, write_pairs
from align.data.statistics import summarize
from align.data.text import plain
from align.data.training_pairs import margin_sources, report_in_sample, with_source
from align.errors import ConfigError, DataError
from align.generation.types import report_broken
from align.io.console import log
from align.io.files import write_json
from align.io.hashing import fingerprint_source
from align.io.stage import Stage, check_output, run_stage
from align.models.message_checks import check_prompts_of
from align.stats import Estimate, mean_interval
from reward_models.ensemble import members
from reward_models.scorers import ScorerSpec, score_in_chunks

DROPPED = "dropped.jsonl"
METRICS = "metrics.json"
CACHE = "scores"
STAGE = "pairs-build"
ANY = (0.0, float("inf"))
MANY_CUT_OFF = 0.2
"""Share of completions cut off by the limit of tokens above which a warning says so."""

REVISION = 3
"""Part of the stage's key: raised when the same completions and scorer give another table or other metrics."""


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """Settings of `align pairs build`.

    Raises:
        ConfigError: a number is out of range, or a ratio is given for scores that are not probabilities.
    """

    scorer: ScorerSpec
    mode: Mode = "best_worst"
    guard_margin: float = 0.0
    """Least difference of the scores of a pair; scores are P(yes) of a yes-no judge, rewards otherwise."""
    guard_ratio: float | None = None
    """Largest ratio of the rejected score to the chosen one; for a yes-no judge only."""
    band: tuple[float, float] | None = None
    """Least and largest difference of the scores, for the mode ``band``; None: any."""
    temperature: float = 1.0
    """Rewards are divided by it; above 1 it softens an overconfident scorer."""

    def __post_init__(self) -> None:
        low, high = self.band or ANY
        problems = []
        if self.mode not in ("best_worst", "band", "all"):
            problems.append(f"--mode {self.mode}: expected best_worst, band or all")
        if self.band is not None and self.mode != "band":
            problems.append(f"--band: means nothing under --mode {self.mode}")
        if self.guard_margin < 0 or self.temperature <= 0 or not 0 <= low <= high:
            problems.append("--guard-margin and --band: expected numbers from 0 up; --temperature: one above 0")
        if self.guard_ratio is not None and not 0 < self.guard_ratio <= 1:
            problems.append(f"--guard-ratio {self.guard_ratio}: expected a number in (0, 1]")
        if self.guard_ratio is not None and not self.scorer.probabilities:
            problems.append(f"--guard-ratio: {self.scorer.name} gives rewards, which have no zero; use --guard-margin")
        if problems:
            raise ConfigError("\n".join(problems), code="pairs-option")


@dataclass(frozen=True, slots=True)
class Different:
    """The distinct, non-empty completions of a prompt."""

    of: Group
    candidates: list[Candidate]
    left_out: Counter[str]
    """Number of completions that are empty or equal to an earlier one."""
    counts: Counter[str]
    """Stripped text of each of ``candidates`` -> how often it was sampled."""


def build_pairs(completions: str | Path, settings: BuildSettings, output: Path) -> Stage:
    """Write ``pairs.parquet``, ``dropped.jsonl`` (prompts without a pair, with the reason) and ``metrics.json``.

    The columns are those of a pair table with ``reward_chosen``, ``reward_rejected`` and ``margin``; ``tools``,
    ``chat_template_kwargs`` and ``FINISH_COLUMNS`` as the completions have them; the provenance ``prompt_id``,
    ``sample_chosen``, ``sample_rejected``, ``scorer``, ``mode``; for a yes-no judge also ``probability_chosen``,
    ``probability_rejected`` and ``soft_label`` (the sigmoid of the margin).

    Raises:
        AlignError: the completions or the scorer cannot be used, or no pair is left.
    """
    check_output(output, STAGE)
    file = find_completions(completions)
    groups = [different(group) for group in read_groups(file)]
    log.info("pairs: %d prompts of %s, scored by %s, mode %s -> %s",
             len(groups), file, settings.scorer.name, settings.mode, output)  # fmt: skip
    if settings.scorer.reward_model is not None:
        options = settings.scorer.options
        check_prompts_of(
            [group.of.prompt for group in groups], [settings.scorer.reward_model], answered=True,
            trust_remote_code=options.trust_remote_code, text_pair=options.text_pair,
        )  # fmt: skip
    inputs = {
        "completions": fingerprint_source(file),
        "scorer": settings.scorer.key,
        "settings": asdict(settings),
        "revision": REVISION,
    }
    return run_stage(STAGE, output, inputs, lambda folder: _work(groups, settings, folder))


def different(group: Group) -> Different:
    """Leave out empty completions, and completions whose stripped text is equal to that of an earlier one."""
    found = Different(group, [], Counter(), Counter())
    known: set[str] = set()
    for candidate in group.candidates:
        text = plain(candidate.completion).strip()
        found.counts[text] += 1
        if not text or text in known:
            found.left_out["repeated" if text else "empty"] += 1
            continue
        known.add(text)
        found.candidates.append(candidate)
    return found


def _work(groups: list[Different], settings: BuildSettings, folder: Path) -> None:
    flat = [(group, candidate) for group in groups for candidate in group.candidates]
    raw = score_in_chunks(
        settings.scorer.load,
        [group.of.prompt for group, _ in flat],
        [candidate.completion for _, candidate in flat],
        folder / CACHE,
    )
    rewards = raw / settings.temperature
    position = 0
    pairs: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    guarded = 0
    for group in groups:
        count = len(group.candidates)
        made, against = _pairs_of(group, rewards[position : position + count], settings) if count > 1 else ([], 0)
        position += count
        guarded += against
        pairs += made
        if not made:
            reason = "fewer than two different completions" if count < 2 else "no two scores far enough apart"
            dropped.append({"id": group.of.id, "prompt": group.of.prompt, "reason": reason})
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in dropped)
    (folder / DROPPED).write_text("".join(lines), encoding="utf-8")
    if not pairs:
        raise DataError(
            f"no pair is left of {len(groups)} prompts: {dict(Counter(row['reason'] for row in dropped))}",
            code="pairs-none",
            hint="sample more completions, or lower the guard",
        )
    table = table_of(pairs, list(pairs[0]), str(folder))
    optional = ("group", *TEMPLATE_COLUMNS, *FINISH_COLUMNS.values())
    table = table.remove_columns([name for name in optional if all(row[name] is None for row in pairs)])
    model = settings.scorer.reward_model
    if model is not None:
        table = with_source(table, margin_sources(members(model), table))
        report_in_sample(table, "pairs")
    write_pairs(table, folder)
    shutil.rmtree(folder / CACHE)
    left_out = sum((group.left_out for group in groups), Counter[str]())
    metrics = summarize(table) | {
        "prompts_without_pair": len(dropped),
        "pairs_dropped_by_guard": guarded,
        "completions_empty": left_out["empty"],
        "completions_repeated": left_out["repeated"],
        "completions_cut_off_share": _cut_off_share(groups),
        "completions_broken": report_broken((plain(candidate.completion) for _, candidate in flat), "pairs"),
        "mean_margin": float(np.mean(table["margin"])),
        "mean_reward": _mean_reward(groups, raw).to_dict(),
    }
    write_json(folder / METRICS, metrics)
    log.info("pairs: %d of %d prompts; %d pairs dropped by the guard", len(table), len(groups), guarded)


def _cut_off_share(groups: list[Different]) -> float | None:
    """Share of the completions that the limit of tokens cut off, with a warning if it is large.

    None if no completion says how it ended.
    """
    ends = [one.finish_reason for group in groups for one in group.of.candidates if one.finish_reason is not None]
    if not ends:
        return None
    share = ends.count(CUT_OFF) / len(ends)
    if share > MANY_CUT_OFF:
        log.warning("pairs: %.0f%% of the completions were cut off by the limit of tokens: they are scored as they "
                    "are, and trained without an end; raise --max-new-tokens to let the model finish",
                    100 * share)  # fmt: skip
    return share


def _mean_reward(groups: list[Different], rewards: np.ndarray) -> Estimate:
    """Mean reward of the completions as they were sampled, repeated ones as often as they were, empty ones left out.

    The interval is over prompts.

    Args:
        groups: the prompts.
        rewards: reward of each different completion, in the order of the groups, in the scorer's own unit.
    """
    position, means = 0, []
    for group in groups:
        own = rewards[position : position + len(group.candidates)]
        position += len(group.candidates)
        if len(own):
            weights = [group.counts[plain(candidate.completion).strip()] for candidate in group.candidates]
            means.append(float(np.average(own, weights=weights)))
    return mean_interval(means)


def _pairs_of(found: Different, rewards: np.ndarray, settings: BuildSettings) -> tuple[list[dict[str, Any]], int]:
    """Return (rows of the pair table, number of pairs that the guard dropped) for one prompt."""
    scores = expit(rewards * settings.temperature) if settings.scorer.probabilities else rewards
    guard = Guard(settings.guard_margin, settings.guard_ratio)
    chosen_pairs, dropped = choose_pairs(scores.tolist(), settings.mode, guard, band=settings.band or ANY)
    rows = []
    group = found.of
    for best, worst in chosen_pairs:
        first, second = found.candidates[best], found.candidates[worst]
        margin = float(rewards[best] - rewards[worst])
        row: dict[str, Any] = {
            "id": f"{group.id}:{first.sample}-{second.sample}",
            "group": group.group,
            "prompt": split_arguments(group.prompt)[0],
            "chosen": first.completion,
            "rejected": second.completion,
            **dict.fromkeys(TEMPLATE_COLUMNS),
            **argument_cells(group.prompt),
            "chosen_finish_reason": first.finish_reason,
            "rejected_finish_reason": second.finish_reason,
            "reward_chosen": float(rewards[best]),
            "reward_rejected": float(rewards[worst]),
            "margin": margin,
            "prompt_id": group.id,
            "sample_chosen": first.sample,
            "sample_rejected": second.sample,
            "scorer": settings.scorer.name,
            "mode": settings.mode,
        }
        if settings.scorer.probabilities:
            row |= {
                "probability_chosen": float(scores[best]),
                "probability_rejected": float(scores[worst]),
                "soft_label": float(expit(margin)),
            }
        rows.append(row)
    return rows, dropped
