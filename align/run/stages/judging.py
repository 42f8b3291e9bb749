"""Verdicts of the judges of a run on the completions of its policies; a stopped stage repeats no finished part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.config.judging import JudgeSection
from align.errors import ModelError
from align.evaluation.compare_policies import mean_of_clusters
from align.evaluation.winrate import win_rate
from align.generation.types import as_completion
from align.io.hashing import digest
from align.run.plan import REFERENCE
from align.sharding.shards import in_parts
from reward_models.named_judges import AnyJudge, make_named
from reward_models.pairwise_judges import PairwiseJudge, from_scores, prefer_in_both_orders

PART = 64
"""Prompts per part; a stopped stage repeats at most one part of one policy."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What one judge says of the completions of every policy, the reference's among them."""

    judge: JudgeSection
    name: str
    rewards: dict[str, np.ndarray]
    """Policy -> reward of each of N completions, [N]. Of a judge that compares, it is the preference for the completion
    over the reference's for the same prompt, the mean of both orders, in [0, 1]; the reference's own is 0.5."""
    preferences: dict[str, tuple[np.ndarray, np.ndarray]]
    """Policy -> preference over the reference when shown first and when shown second, [N] each, in [0, 1]."""
    cost: dict[str, int] | None
    """Questions and tokens of a server."""

    def advantages(self) -> np.ndarray:
        """How much better each policy's completion is than the reference's, [policies, N]."""
        return np.stack([self.rewards[name] - self.rewards[REFERENCE] for name in self.preferences])

    def win_rates(self, texts: Mapping[str, Sequence[str]], clusters: np.ndarray | None) -> dict[str, Any]:
        """Win rate of each policy over the reference; see ``align.evaluation.winrate``."""
        found = {}
        for name, preference in self.preferences.items():
            lengths = [np.array([len(text) for text in texts[policy]]) for policy in (name, REFERENCE)]
            rate = win_rate(*(mean_of_clusters(values, clusters) for values in (*preference, *lengths)))
            found[name] = rate.to_dict()
        return found


def judge_completions(
    judge: JudgeSection, prompts: Sequence[Any], texts: Mapping[str, Sequence[str]], folder: Path
) -> Verdicts:
    """Let a judge score or compare the completions of all policies.

    Args:
        judge: its name and options.
        prompts: N prompts, text or messages.
        texts: policy -> its completions, [N].
        folder: finished parts are kept there, below a folder of the judge.

    Raises:
        AlignError: the judge cannot be loaded, or fails; one message that names it.
    """
    own = folder / digest([judge.name])[:16]
    loaded = make_named(judge, own / "answers.jsonl")
    answers = {
        name: [as_completion(prompt, text) for prompt, text in zip(prompts, written, strict=True)]
        for name, written in texts.items()
    }
    methods = [name for name in texts if name != REFERENCE]
    if judge.compares:
        preferences = {
            name: _compared(loaded, prompts, answers[name], answers[REFERENCE], own / name) for name in methods
        }
        rewards = {name: (first + second) / 2 for name, (first, second) in preferences.items()}
        rewards = {REFERENCE: np.full(len(prompts), 0.5)} | rewards
    else:
        rewards = {name: _scored(loaded, prompts, answers[name], own / name) for name in texts}
        verdicts = {name: from_scores(rewards[name], rewards[REFERENCE]) for name in methods}
        preferences = {name: (verdict, verdict) for name, verdict in verdicts.items()}
    for name, values in rewards.items():
        if not np.isfinite(values).all():
            place = int((~np.isfinite(values)).argmax())
            raise ModelError(
                f"judge {judge.name}: found {values[place]} for completion {place + 1} of {name}, expected a number",
                code="eval-judge",
                hint="use another judge, or float32",
            )
    return Verdicts(judge, loaded.name, rewards, preferences, getattr(loaded, "cost", None))


def _scored(judge: AnyJudge, prompts: Sequence[Any], answers: list[Any], folder: Path) -> np.ndarray:
    assert not isinstance(judge, PairwiseJudge)

    def part(rows: range) -> Dataset:
        asked, written = [prompts[k] for k in rows], [answers[k] for k in rows]
        return Dataset.from_dict({"score": np.asarray(judge.score(asked, written), dtype=np.float64)})

    found = in_parts(len(prompts), PART, folder, part, what=f"scores by {judge.name}")
    return np.asarray(found["score"], dtype=np.float64)


def _compared(
    judge: AnyJudge, prompts: Sequence[Any], ours: list[Any], theirs: list[Any], folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    assert isinstance(judge, PairwiseJudge)

    def part(rows: range) -> Dataset:
        asked, one, other = ([values[k] for k in rows] for values in (prompts, ours, theirs))
        first, second = prefer_in_both_orders(judge, asked, one, other)
        return Dataset.from_dict({"shown_first": first, "shown_second": second})

    found = in_parts(len(prompts), PART, folder, part, what=f"verdicts by {judge.name}")
    return np.asarray(found["shown_first"]), np.asarray(found["shown_second"])
