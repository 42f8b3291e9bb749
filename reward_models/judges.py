"""Judges by rule: they evaluate finished policies and are never used in training."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from align.config import nearest
from align.data.text import plain
from align.errors import ConfigError


class Judge(Protocol):
    """Gives a score to a (prompt, completion)."""

    name: str

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """Reward of each, float64 [N]."""


class VaderJudge:
    """Sentiment by the VADER lexicon and rules (Hutto and Gilbert, 2014): 3 x the compound score, in [-3, 3]."""

    name = "vader"

    def __init__(self) -> None:
        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """3 x compound of prompt and completion, joined as one text, float64 [N]."""
        texts = [_joined(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        return np.array([3.0 * self._analyzer.polarity_scores(text)["compound"] for text in texts])


JUDGES: dict[str, type[VaderJudge]] = {"vader": VaderJudge}
YES_NO = "yes-no"


def make_judge(name: str) -> Judge:
    """The judge with this name: one of ``JUDGES``, or ``yes-no:MODEL`` for a language model.

    Raises:
        ConfigError: there is no such judge.
        ModelError: the model of the judge cannot be used.
    """
    kind, _, model = name.partition(":")
    if kind == YES_NO and model:
        from reward_models.llm_judges import YesNoJudge

        return YesNoJudge(model)
    if name not in JUDGES:
        raise ConfigError(
            f"judge {name!r} is not known{nearest(name, [*JUDGES, f'{YES_NO}:MODEL'])}", code="judge-name"
        )
    return JUDGES[name]()


def _joined(prompt: Any, completion: Any) -> str:
    """Prompt and completion as one text; a line break follows a prompt of messages."""
    return plain(prompt) + ("" if isinstance(prompt, str) else "\n") + plain(completion)
