"""Quality scorers with one protocol: a screen without a model, fluency under a language model, LLM judges."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from align.errors import ConfigError, ModelError
from align.filtering.screen import readability
from align.io.console import progress
from align.models.batching import token_batches
from reward_models.llm_judges import YesNoJudge

RATINGS = ("1", "2", "3", "4", "5")
RUBRIC = (
    "Rate the response to the request below for helpfulness, correctness, clarity and safety.\n"
    "1 is useless or harmful, 3 is acceptable, 5 is excellent.\n\n"
    "Request:\n{prompt}\n\nResponse:\n{completion}\n\n"
    "Answer with one digit from 1 to 5 only."
)


class QualityScorer(Protocol):
    """Protocol: scores a response to a prompt."""

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """Quality [N] of each completion; higher is better."""


class Screen:
    """Readability of the response, see ``readability``."""

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """Quality [N] in [0, 1]; the prompts are ignored."""
        return readability(pa.array(list(completions), type=pa.string()))


class Fluency:
    """Mean log-probability per token (nats) under a language model: the negative log perplexity.

    Args:
        model: hub id or folder of a causal language model.
        batch_tokens: padded tokens of one forward pass.
        max_length: tokens of prompt and completion; a prompt is truncated at its start, a completion at its end.

    Raises:
        ModelError: it cannot be loaded.
    """

    def __init__(self, model: str, *, batch_tokens: int = 4096, max_length: int = 1024) -> None:
        self.model, self.tokenizer = _language_model(model)
        self.batch_tokens = batch_tokens
        self.max_length = max_length

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """Quality [N], at most 0; 0 for a completion without a token."""
        from align.models.completion_logps import completion_logps

        half = self.max_length // 2
        completion_ids = [row[:half] for row in _ids(self.tokenizer, completions)]
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        prompt_ids = [row[-half:] or [start] for row in _ids(self.tokenizer, prompts)]
        sums = completion_logps(
            self.model, prompt_ids, completion_ids, batch_tokens=self.batch_tokens, pad_token_id=_pad(self.tokenizer)
        )
        return sums / np.maximum([len(row) for row in completion_ids], 1)


class Rubric(YesNoJudge):
    """Expected rating, 1 to 5, under a language model's next-token probabilities after a rubric prompt.

    No text is generated: the probabilities of the five digits are read from the logits and normalized. The prompt is
    built like that of ``YesNoJudge``.

    Raises:
        ModelError: the model cannot be loaded, or a digit is not a token of it.
    """

    def __init__(self, model: str, *, batch_tokens: int = 4096, max_length: int = 2048) -> None:
        super().__init__(model, rubric=RUBRIC, batch_tokens=batch_tokens, max_length=max_length)
        self.name = f"rubric:{model}"
        self.ratings = [self._answers((digit, f" {digit}")) for digit in RATINGS]
        if not all(self.ratings):
            raise ModelError(
                f"{model}: the digits 1 to 5 are not single tokens, so their probabilities cannot be read",
                code="judge-tokens",
                hint="use another judge model",
            )

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """Expected rating [N] in [1, 5]."""
        return self.probabilities(prompts, completions) @ np.arange(1, len(RATINGS) + 1)

    def probabilities(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """P(1) ... P(5), given that the answer is one of them, float64 [N, 5]."""
        rows = [self._question(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        probabilities = np.empty((len(rows), len(RATINGS)))
        batches = token_batches([len(row) for row in rows], self.batch_tokens)
        with torch.inference_mode():
            for batch in progress(batches, what="rubric", total=len(batches), unit="batches"):
                logits = self._next_logits([rows[k] for k in batch])
                per_rating = torch.stack([logits[:, row].logsumexp(dim=-1) for row in self.ratings], dim=1)
                probabilities[batch] = torch.softmax(per_rating, dim=-1).cpu().numpy()
        return probabilities


SCORERS = ("screen", "fluency", "rubric", "yes_no")


def make_scorer(name: str, model: str | None) -> QualityScorer:
    """The scorer called ``name``.

    Raises:
        ConfigError: there is no such scorer, or it needs a model and none is given.
        ModelError: the model cannot be loaded.
    """
    if name not in SCORERS:
        raise ConfigError(f"quality scorer {name!r}: expected one of {', '.join(SCORERS)}", code="filter-option")
    if name == "screen":
        return Screen()
    if model is None:
        raise ConfigError(f"quality scorer {name}: needs a model", code="filter-option", hint="give --quality-model")
    kinds: dict[str, Callable[[str], QualityScorer]] = {"fluency": Fluency, "rubric": Rubric, "yes_no": YesNoJudge}
    return kinds[name](model)


def pair_quality(
    scorer: QualityScorer, prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]
) -> np.ndarray:
    """Quality of the worse of each pair's two responses, [N]."""
    return np.minimum(scorer.score(prompts, chosen), scorer.score(prompts, rejected))


def _language_model(model: str) -> tuple[Any, Any]:
    from align.models.loading import load_policy, load_tokenizer

    return load_policy(model, dtype="float32").eval(), load_tokenizer(model)


def _ids(tokenizer: Any, strings: Sequence[str]) -> list[list[int]]:
    return [list(row) for row in tokenizer(list(strings), add_special_tokens=False)["input_ids"]] if strings else []


def _pad(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
