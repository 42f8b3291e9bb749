"""Quality of a response behind one protocol: a screen without a model, fluency under a language model, an LLM judge."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from align.batching import token_batches
from align.console import progress
from align.errors import ConfigError
from align.filtering.screen import screen

RATINGS = ("1", "2", "3", "4", "5")
RUBRIC = (
    "Rate the response to the request below for helpfulness, correctness, clarity and safety.\n"
    "1 is useless or harmful, 3 is acceptable, 5 is excellent.\n\n"
    "Request:\n{prompt}\n\nResponse:\n{completion}\n\n"
    "Answer with one digit from 1 to 5."
)
LEAD = "Rating:"


class QualityScorer(Protocol):
    """Anything that turns a prompt and a response into a number."""

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """Quality [N] of each completion; higher is better."""


class Screen:
    """Text or not: see ``screen``."""

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """[N] in [0, 1]; the prompts do not count."""
        return screen(pa.array(list(completions), type=pa.string()))


class Fluency:
    """Mean log-probability per token (nats) under a language model: minus the logarithm of the perplexity.

    Args:
        model: hub id or folder of a causal language model.
        batch_tokens: padded tokens of one forward pass.
        max_length: tokens of prompt and completion; the prompt's beginning and the completion's end are cut.

    Raises:
        ModelError: it cannot be loaded.
    """

    def __init__(self, model: str, *, batch_tokens: int = 4096, max_length: int = 1024) -> None:
        self.model, self.tokenizer = _language_model(model)
        self.batch_tokens = batch_tokens
        self.max_length = max_length

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """[N], at most 0; a completion without a token scores 0 tokens' worth: -infinity is never returned."""
        from align.evaluation.kl import completion_logps

        half = self.max_length // 2
        completion_ids = [row[:half] for row in _ids(self.tokenizer, completions)]
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        prompt_ids = [row[-half:] or [start] for row in _ids(self.tokenizer, prompts)]
        sums = completion_logps(
            self.model, prompt_ids, completion_ids, batch_tokens=self.batch_tokens, pad_token_id=_pad(self.tokenizer)
        )
        return sums / np.maximum([len(row) for row in completion_ids], 1)


class Rubric:
    """Expected rating, 1 to 5, that a language model's next-token probabilities give to the answer of a rubric prompt.

    No text is generated: the probabilities of the five digits are read from the logits and made to add up to 1.

    Args:
        model: hub id or folder of a causal language model, with a chat template where it was trained with one.
        batch_tokens: padded tokens of one forward pass.
        max_length: tokens of the rubric prompt; of a longer one the middle is cut out.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: its tokenizer splits a digit.
    """

    def __init__(self, model: str, *, batch_tokens: int = 4096, max_length: int = 1024) -> None:
        self.model, self.tokenizer = _language_model(model)
        self.batch_tokens = batch_tokens
        self.max_length = max_length
        self.digits = [_ids(self.tokenizer, [digit])[0] for digit in RATINGS]
        if any(len(digit) != 1 for digit in self.digits):
            raise ConfigError(
                f"{model}: its tokenizer does not keep the digits 1 to 5 whole", code="filter-option",
                hint="use another model for the rubric",
            )  # fmt: skip

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """[N] in [1, 5]."""
        return self.probabilities(prompts, completions) @ np.arange(1, len(RATINGS) + 1)

    def probabilities(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """P(1) ... P(5) given that the answer is one of them, [N, 5]."""
        asked = [self._ask(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        found = np.empty((len(asked), len(RATINGS)))
        choices = torch.tensor([digit[0] for digit in self.digits])
        device = next(self.model.parameters()).device
        batches = token_batches([len(row) for row in asked], self.batch_tokens)
        with torch.inference_mode():
            for batch in progress(batches, what="rubric", total=len(batches), unit="batches"):
                width = max(len(asked[k]) for k in batch)
                ids = torch.tensor(
                    [asked[k] + [_pad(self.tokenizer)] * (width - len(asked[k])) for k in batch], device=device
                )
                mask = torch.tensor([[1] * len(asked[k]) + [0] * (width - len(asked[k])) for k in batch], device=device)
                logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                last = logits[torch.arange(len(batch)), mask.sum(dim=1) - 1][:, choices.to(device)]
                found[batch] = torch.softmax(last.double(), dim=-1).cpu().numpy()
        return found

    def _ask(self, prompt: str, completion: str) -> list[int]:
        text = RUBRIC.format(prompt=prompt, completion=completion)
        if self.tokenizer.chat_template is not None:
            turn = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = _ids(self.tokenizer, [f"{text}\n{LEAD} " if not text.endswith("\n") else f"{text}{LEAD} "])[0]
        if len(ids) <= self.max_length:
            return ids
        half = self.max_length // 2
        return ids[:half] + ids[-(self.max_length - half) :]


SCORERS = ("screen", "fluency", "rubric", "yes_no")


def make_scorer(name: str, model: str | None) -> QualityScorer:
    """The scorer called ``name``.

    Raises:
        ConfigError: no such scorer, or it needs a model and there is none.
        ModelError: the model cannot be loaded.
    """
    if name not in SCORERS:
        raise ConfigError(f"quality scorer {name!r}: expected one of {', '.join(SCORERS)}", code="filter-option")
    if name == "screen":
        return Screen()
    if model is None:
        raise ConfigError(f"quality scorer {name}: needs a model", code="filter-option", hint="give --quality-model")
    if name == "yes_no":
        from reward_models.llm_judge import YesNoJudge

        judge: QualityScorer = YesNoJudge(model)
        return judge
    return Fluency(model) if name == "fluency" else Rubric(model)


def pair_quality(
    scorer: QualityScorer, prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]
) -> np.ndarray:
    """Quality of the worse of each pair's two responses, [N]: a pair is worth no more than its weaker half."""
    return np.minimum(scorer.score(prompts, chosen), scorer.score(prompts, rejected))


def _language_model(model: str) -> tuple[Any, Any]:
    from align.training.train import load_policy, load_tokenizer

    return load_policy(model, dtype="float32").eval(), load_tokenizer(model)


def _ids(tokenizer: Any, strings: Sequence[str]) -> list[list[int]]:
    return [list(row) for row in tokenizer(list(strings), add_special_tokens=False)["input_ids"]] if strings else []


def _pad(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
