"""Score completions with a reward model or a judge, in chunks, so that a stopped scoring resumes."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.config import nearest
from align.errors import ConfigError, NumericsError
from align.io.array_cache import cached_array
from align.models.folders import fingerprint_model
from reward_models.judges import JUDGES, YES_NO, make_judge
from reward_models.loading import DEFAULTS, LoadOptions, not_of_a_judge
from reward_models.score import REWARDS

CHUNK = 512
Score = Callable[[Sequence[Any], Sequence[Any]], np.ndarray]
"""(prompts [N], completions [N]) -> rewards, float64 [N]."""


@dataclass(frozen=True, slots=True)
class ScorerSpec:
    """Name and settings of a reward model or a judge that is not loaded yet.

    Raises:
        ConfigError: none or both are given, or there is no such judge.
    """

    reward_model: str | None = None
    """Folder or hub id."""
    judge: str | None = None
    """Name as in ``make_judge``."""
    batch_tokens: int = 4096
    """Padded tokens per forward pass."""
    max_length: int = 2048
    """Tokens of one text."""
    options: LoadOptions = DEFAULTS
    """How a reward model is loaded and reads texts."""

    def __post_init__(self) -> None:
        if (self.reward_model is None) == (self.judge is None):
            raise ConfigError("give either a reward model or a judge", code="config-option")
        if self.judge is not None and self.options != DEFAULTS:
            raise not_of_a_judge(self.judge)
        if self.judge is not None and self.judge not in JUDGES and not self.probabilities:
            known = [*JUDGES, f"{YES_NO}:MODEL"]
            raise ConfigError(f"judge {self.judge!r} is not known{nearest(self.judge, known)}", code="judge-name")

    @property
    def name(self) -> str:
        """Name of the scorer, for provenance."""
        return self.reward_model or str(self.judge)

    @property
    def model(self) -> str:
        """Folder or hub id of the model; the name of a judge without one."""
        return self.reward_model or str(self.judge).removeprefix(f"{YES_NO}:")

    @property
    def probabilities(self) -> bool:
        """Whether the sigmoid of a reward is P(yes) of a judge."""
        return self.judge is not None and self.judge.startswith(f"{YES_NO}:") and self.judge != f"{YES_NO}:"

    @property
    def key(self) -> str:
        """Part of a cache key: content of the model and revision of the scoring."""
        return f"{REWARDS}:{fingerprint_model(self.model)}{self.options.suffix}"

    def load(self) -> Score:
        """Load the scorer.

        The reward of a yes-no judge is its log-odds, log P(yes) - log P(no). The sigmoid of a margin is then the
        probability of yes for the chosen response, given that the judge says yes to exactly one of the two.

        Raises:
            ModelError: the model cannot be used.
        """
        if self.probabilities:
            from reward_models.llm_judges import YesNoJudge

            return YesNoJudge(self.model, batch_tokens=self.batch_tokens, max_length=self.max_length).log_odds
        if self.judge is not None:
            return make_judge(self.judge).score
        from reward_models.ensemble import EnsembleScorer

        return EnsembleScorer(
            self.model, batch_tokens=self.batch_tokens, max_length=self.max_length, options=self.options
        ).score_completions


def parse_scorer(name: str, *, batch_tokens: int, max_length: int, options: LoadOptions = DEFAULTS) -> ScorerSpec:
    """The scorer of a name: a folder or hub id is a reward model, any other name a judge.

    ``options`` are for a reward model, and have no effect on a judge.

    Raises:
        ConfigError: there is no such judge.
    """
    is_model = not name.startswith(f"{YES_NO}:") and ("/" in name or Path(name).is_dir())
    if not is_model:
        return ScorerSpec(judge=name, batch_tokens=batch_tokens, max_length=max_length)
    return ScorerSpec(reward_model=name, batch_tokens=batch_tokens, max_length=max_length, options=options)


def score_in_chunks(
    load: Callable[[], Score], prompts: Sequence[Any], completions: Sequence[Any], cache: Path
) -> np.ndarray:
    """Rewards [N] of completions, computed ``CHUNK`` at a time.

    Args:
        load: loads the scorer; called once, and only if a chunk is missing in the cache.
        prompts: N prompts.
        completions: N completions.
        cache: folder for finished chunks; valid for the same scorer, prompts and completions only.

    Raises:
        NumericsError: a score is not a finite number.
    """
    loaded = functools.cache(load)

    def scores(start: int) -> np.ndarray:
        part = slice(start, start + CHUNK)
        found = loaded()(prompts[part], completions[part])
        for place in np.flatnonzero(~np.isfinite(found))[:1]:
            raise NumericsError(
                f"completion {start + int(place) + 1}: found the score {found[place]}, expected a finite number",
                code="score-not-finite",
                hint="look at this completion; a reward model with intact weights scores every text",
            )
        return found

    starts = range(0, len(prompts), CHUNK)
    parts = [cached_array(cache / f"{start:010d}.npy", functools.partial(scores, start)) for start in starts]
    return np.concatenate([np.empty(0), *parts])
