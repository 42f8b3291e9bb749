"""A language model behind an OpenAI-compatible server as a judge of two responses."""

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from align.data.text import plain
from align.errors import DataError, ModelError
from align.generation.server_client import DEFAULT_URL, ServerClient
from align.generation.server_engine import in_threads
from align.io.console import log, progress
from align.io.hashing import digest
from reward_models.answers import Answers
from reward_models.questions import QUESTION, SERVER

INSTRUCTION = "Answer with one letter only: A or B."
LABELS = ("A", "B")
TOP = 10
"""Most probable tokens of the answer that the server is asked for."""
ANSWER_TOKENS = 8
UNREADABLE = 0.1
"""Share of answers that name neither response above which a warning is given."""
NEUTRAL: dict[str, Any] = {
    "temperature": 0.0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": 0,
}  # fmt: skip
"""Fields that a server fills from the model's generation config, at values that change nothing."""
OPTIONAL: dict[str, dict[str, Any]] = {
    "logprob": {"logprobs": True, "top_logprobs": TOP},
    "repetition_penalty": {"repetition_penalty": 1.0},
}
"""Word in a server's refusal -> the fields that it refuses; not every OpenAI-compatible server has them."""
WITHOUT = {
    "logprob": "the server gives no log-probs: its verdicts are letters",
    "repetition_penalty": "the server knows no repetition_penalty, so none is asked for",
}
REVISION = 2
"""Revision of question and reading, part of the key of an answer."""


class ServerJudge:
    """Asks which of two responses is better; the answer is P(A) / (P(A) + P(B)) where the server gives log-probs.

    Without log-probs it is 1 or 0 by the letter that the model writes; an answer without a letter is a tie and counted.
    Every answer goes into ``cache`` at once, so a stopped evaluation asks nothing twice.

    Args:
        model: the name that the server uses.
        base_url: the server's address, ending in ``/v1``.
        concurrency: requests in flight at once.
        attempts: tries for each request.
        cache: file of the answers, one JSON object per line; None: they are kept in memory.
        first_wait: seconds before the second try.
    """

    def __init__(
        self, model: str, *, base_url: str | None = None, concurrency: int = 16, attempts: int = 6,
        cache: Path | None = None, first_wait: float = 0.5,
    ) -> None:  # fmt: skip
        self.name = SERVER + model
        self.client = ServerClient(
            model, base_url=base_url or DEFAULT_URL, concurrency=concurrency, attempts=attempts, first_wait=first_wait
        )
        self._answers = Answers(cache)
        self._used: set[str] = set()
        self._optional = dict(OPTIONAL)
        self._checked = False

    def prefer(self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> np.ndarray:
        """Probability that the first response is the better one, [N] in [0, 1].

        Raises:
            EnvironmentProblem: the server cannot be reached; the answers so far are kept.
            DataError: it refuses a question, or every answer is unreadable.
            ModelError: it does not serve the model.
        """
        texts = [
            QUESTION.format(prompt=plain(prompt), first=plain(one), second=plain(other)) + INSTRUCTION
            for prompt, one, other in zip(prompts, first, second, strict=True)
        ]
        keys = [digest([self.client.model, REVISION, text]) for text in texts]
        left = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._answers}
        self._ask(left)
        self._used |= set(keys)
        found = [self._answers[key]["preference"] for key in keys]
        self._report(sum(value is None for value in found), len(found))
        return np.array([0.5 if value is None else value for value in found])

    @property
    def cost(self) -> dict[str, int]:
        """Questions asked, and tokens that the server counted for them, those answered in an earlier call included."""
        answers = [self._answers[key] for key in self._used]
        return {"questions": len(answers)} | {
            name: sum(answer[name] for answer in answers) for name in ("prompt_tokens", "completion_tokens")
        }

    def _ask(self, left: dict[str, str]) -> None:
        """Ask what has no answer yet; write each answer as it arrives."""
        if not left:
            return
        if not self._checked:
            self.client.check_model()
            self._checked = True
        self.client.stopping = stopping = Event()
        keys, jobs = list(left), [partial(self._answer, text) for text in left.values()]
        asked = in_threads(jobs, self.client.concurrency, stopping)
        for number, answer in progress(asked, what="judging", total=len(jobs), unit="questions"):
            self._answers.add(keys[number], answer)

    def _answer(self, text: str) -> dict[str, Any]:
        """Preference for the first response (None if unreadable) and tokens of one question."""
        body = {
            "model": self.client.model, "messages": [{"role": "user", "content": text}], "max_tokens": ANSWER_TOKENS,
        } | NEUTRAL  # fmt: skip
        answer = self._asked(body)
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            preference = _preference(choice)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"judge {self.name}: the answer of {self.client.base_url} lacks what is needed "
                f"({type(error).__name__}: {error})",
                code="eval-judge",
                hint="is this an OpenAI-compatible server with /chat/completions?",
            ) from None
        tokens = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        return {"preference": preference, **tokens}

    def _asked(self, body: dict[str, Any]) -> dict[str, Any]:
        """The server's answer, without the optional fields that it does not know."""
        while True:
            left = dict(self._optional)
            try:
                found: dict[str, Any] = self.client.request(
                    "POST", "/chat/completions", body | {k: v for one in left.values() for k, v in one.items()}
                )
            except DataError as error:
                refused = next((name for name in left if name in error.message), None)
                if refused is None:
                    raise
                if self._optional.pop(refused, None) is not None:  # else another question has found it out
                    log.info("%s: %s", self.name, WITHOUT[refused])
            else:
                return found

    def _report(self, unreadable: int, count: int) -> None:
        if unreadable == count and count:
            raise DataError(
                f"judge {self.name}: none of {count} answers names A or B",
                code="eval-judge",
                hint="use a model that follows instructions, without a reasoning parser",
            )
        if unreadable > UNREADABLE * count:
            log.warning("%s: %d of %d answers name neither A nor B and count as ties", self.name, unreadable, count)


def _preference(choice: dict[str, Any]) -> float | None:
    """P(A) / (P(A) + P(B)) at the first token that is a letter, or the letter itself; None without one."""
    for entry in (choice.get("logprobs") or {}).get("content") or []:
        if _letter(entry["token"]) is None:
            continue
        tops = entry.get("top_logprobs") or []
        mass = {label: sum(math.exp(one["logprob"]) for one in tops if _letter(one["token"]) == label)
                for label in LABELS}  # fmt: skip
        if sum(mass.values()) > 0:
            return mass["A"] / sum(mass.values())
    found = re.search(r"\b([AB])\b", str(choice["message"]["content"] or ""))
    return None if found is None else float(found[1] == "A")


def _letter(token: Any) -> str | None:
    text = str(token).strip().strip("*\"'().:")
    return text if text in LABELS else None
