"""A language model as a judge: how probable it holds "Yes" to be after a rubric that asks about a response.

score = P(yes) / (P(yes) + P(no)), read from the logits of the first token of the answer, each probability summed over
the spellings that are one token (UniME-V2, arXiv 2510.13515, has one spelling each). Nothing is sampled.
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
    """P(yes) of a causal language model, whatever the batch.

    The text of a prompt or completion is never read as special tokens, so a response cannot end its own turn and answer
    in the judge's place; a completion that does not fit is cut from the right, the rubric never is.

    Args:
        model: folder or hub id.
        rubric: question with the fields ``{prompt}`` and ``{completion}``, each once and in this order; sent as one
            user message where the model has a chat template, else followed by ``Answer:``.
        batch_tokens: padded tokens per forward pass.
        max_length: tokens of one question.
        dtype: of the weights.

    Raises:
        ConfigError: the rubric lacks a field.
        ModelError: the model cannot be loaded, or yes and no are not tokens of it.
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
                f"{model}: `Yes` and `No` are not tokens of its own, so their probabilities cannot be read",
                code="judge-tokens",
                hint="use another judge model",
            )

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """P(yes) / (P(yes) + P(no)) of each completion, float64 [N] in (0, 1); prompts and completions are text or
        messages."""
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
            log.warning("%s: yes and no together have only %.2g of the probability; mind its scores", self.name, mass)
        return found[:, 0] - found[:, 1]

    def _forward(self, rows: list[list[int]]) -> np.ndarray:
        """log P(yes) and log P(no) [n, 2] after each row."""
        logps = torch.log_softmax(self._next_logits(rows), dim=-1)
        return torch.stack([logps[:, side].logsumexp(dim=-1) for side in (self.yes, self.no)], dim=1).cpu().numpy()

    def _next_logits(self, rows: list[list[int]]) -> torch.Tensor:
        """The model's own logits, float64 [n, V], of the token after each row."""
        width = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        last = mask.sum(dim=1) - 1 - width  # from the end: a prompt-learning adapter puts tokens of its own before
        if self._keeps_places:
            inputs["logits_to_keep"], last = last.unique(return_inverse=True)
        return self.model(**inputs).logits[torch.arange(len(rows), device=self.device), last].double()

    def _frame(self, rubric: str) -> list[str]:
        """The three pieces of the question around prompt and completion."""
        text = rubric
        if self.tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": rubric}]
            text = str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
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
        special = first and self.tokenizer.chat_template is None
        ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        eos = self.tokenizer.eos_token_id
        return ids[:-1] if special and ids and ids[-1] == eos and len(ids) > 1 else ids

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
        """Ids of the spellings that are one token and not the unknown one."""
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in spellings]
        return sorted({row[0] for row in ids if len(row) == 1 and row[0] != self.tokenizer.unk_token_id})
