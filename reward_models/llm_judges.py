"""A language model as a judge: the probability of "Yes" as its answer to a rubric about one response.

score = P(yes) / (P(yes) + P(no)) from the logits of the first token of the answer, where each probability is the sum
over the spellings that are a single token (UniME-V2, arXiv 2510.13515, uses one spelling each). Nothing is sampled.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit

from align.data.text import plain
from align.errors import ConfigError, ModelError
from align.io.console import log, progress
from align.models.batching import token_batches
from align.models.layout import base_model
from align.models.loading import load_policy, load_tokenizer
from align.models.tokenization import apply_template, encode_prompt, pad

RUBRIC = """Below are a request and a response to it.

[Request]
{prompt}

[Response]
{completion}

Is this a good response: does it do what was asked, is it correct, clear and complete? Answer only Yes or No."""
ANSWER = "\nAnswer:"
FIELDS = ("{prompt}", "{completion}")
YES = ("Yes", " Yes", "yes", " yes", "YES", " YES")
NO = ("No", " No", "no", " no", "NO", " NO")
RARE = 0.1


class YesNoJudge:
    """P(yes) of a causal language model; it does not depend on the batch.

    The text of a prompt or completion is never encoded as special tokens, so a response cannot end its turn and answer
    for the judge. A completion that does not fit is cut from the right; the rubric is never cut.

    Args:
        model: folder or hub id.
        rubric: question with the fields ``{prompt}`` and ``{completion}``, each once and in this order; one user
            message if the model has a chat template, else text followed by ``Answer:``.
        batch_tokens: padded tokens per forward pass.
        max_length: tokens of one question.
        dtype: dtype of the weights.

    Raises:
        ConfigError: the rubric lacks a field.
        ModelError: the model cannot be loaded, or yes and no are not single tokens.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        rubric: str = RUBRIC,
        batch_tokens: int = 4096,
        max_length: int = 2048,
        dtype: str = "float32",
    ) -> None:
        self.name = f"yes-no:{model}"
        self.tokenizer = load_tokenizer(str(model))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_policy(str(model), dtype=dtype).to(self.device).eval()
        self._keeps_places = "logits_to_keep" in inspect.signature(base_model(self.model).forward).parameters
        self.batch_tokens = batch_tokens
        self.max_length = max_length
        self.frame = [self._frame_ids(part, first=k == 0) for k, part in enumerate(self._frame(rubric))]
        self.yes, self.no = self._answers(YES), self._answers(NO)
        if not self.yes or not self.no or set(self.yes) & set(self.no):
            raise ModelError(
                f"{model}: `Yes` and `No` are not tokens of this model, so their probabilities cannot be read",
                code="judge-tokens",
                hint="use another judge model",
            )

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """P(yes) / (P(yes) + P(no)) of each completion (text or messages), float64 [N] in (0, 1)."""
        return np.asarray(expit(self.log_odds(prompts, completions)))

    def log_odds(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """log P(yes) - log P(no) of each completion, float64 [N]: ``score`` before the sigmoid."""
        rows = [self._question(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        found = np.empty((len(rows), 2))
        batches = token_batches([len(row) for row in rows], self.batch_tokens)
        with torch.inference_mode():
            for batch in progress(batches, what="judging", total=len(batches), unit="batches"):
                found[batch] = self._forward([rows[k] for k in batch])
        mass = float(np.exp(found).sum(axis=1).mean()) if rows else 1.0
        if mass < RARE:
            log.warning(
                "%s: yes and no together have a probability of only %.2g; its scores may be unreliable", self.name, mass
            )
        return found[:, 0] - found[:, 1]

    def _forward(self, rows: list[list[int]]) -> np.ndarray:
        """log P(yes) and log P(no) [n, 2] after each row."""
        logps = torch.log_softmax(self._next_logits(rows), dim=-1)
        return torch.stack([logps[:, side].logsumexp(dim=-1) for side in (self.yes, self.no)], dim=1).cpu().numpy()

    def _next_logits(self, rows: list[list[int]]) -> torch.Tensor:
        """Logits of the model, float64 [n, V], for the token after each row."""
        ids, mask = (part.to(self.device) for part in pad(rows, self.tokenizer.pad_token_id or 0))
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        last = mask.sum(dim=1) - 1 - ids.shape[1]  # negative: a prompt-learning adapter adds tokens in front
        if self._keeps_places:
            inputs["logits_to_keep"], last = last.unique(return_inverse=True)
        return self.model(**inputs).logits[torch.arange(len(rows), device=self.device), last].double()

    def _frame(self, rubric: str) -> list[str]:
        """The three pieces of the question before, between and after prompt and completion."""
        text = rubric
        if self.tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": rubric}]
            text = str(apply_template(turns, self.tokenizer, generation_prompt=True))
        before, found_prompt, rest = text.partition(FIELDS[0])
        between, found_completion, after = rest.partition(FIELDS[1])
        if not found_prompt or not found_completion or any(field in before + after for field in FIELDS):
            raise ConfigError(
                "judge rubric: expected {prompt}, then {completion}, each once",
                code="judge-rubric",
                hint="see RUBRIC in reward_models/llm_judges.py",
            )
        return [before, between, after if self.tokenizer.chat_template is not None else after + ANSWER]

    def _frame_ids(self, text: str, *, first: bool) -> list[int]:
        if first and self.tokenizer.chat_template is None:
            return encode_prompt(text, self.tokenizer)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _question(self, prompt: Any, completion: Any) -> list[int]:
        before, between, after = self.frame
        asked = self._text_ids(plain(prompt))
        room = self.max_length - len(before) - len(between) - len(after)
        asked = asked[-max(0, room // 2) :] if len(asked) > room // 2 else asked
        answer = self._text_ids(plain(completion))[: max(0, room - len(asked))]
        return [*before, *asked, *between, *answer, *after]

    def _text_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _answers(self, spellings: Sequence[str]) -> list[int]:
        """Ids of the spellings that are a single token other than the unknown token."""
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in spellings]
        return sorted({row[0] for row in ids if len(row) == 1 and row[0] != self.tokenizer.unk_token_id})
