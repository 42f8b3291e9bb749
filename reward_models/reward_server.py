"""A reward model behind a vLLM server (`vllm serve MODEL --runner pooling --convert classify`) as a judge."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from align.errors import ModelError, NumericsError
from align.generation.server_client import DEFAULT_URL, ServerClient
from align.generation.server_engine import in_threads
from align.io.console import progress
from align.io.hashing import digest
from align.models.folders import check_model_folder, is_adapter, loading
from reward_models.answers import Answers
from reward_models.ensemble import members
from reward_models.loading import KIND, fitting_length, is_decoder
from reward_models.questions import REWARD_SERVER
from reward_models.tokenization import reward_ids, reward_text, warn_of_unread

MAX_LENGTH = 1024
ROWS = 16
"""Texts per request."""
REVISION = 1
"""Revision of the question, part of the key of an answer."""


class RewardServerJudge:
    """Scores responses by a reward model that a server computes, in the reward's own unit.

    The texts become token ids here, with the tokenizer of ``model``, exactly as a local reward model reads them; the
    server is asked for the head's output without activation, at the last token that is not padding.

    Args:
        model: folder or hub id of the reward model, which is also the name under which the server serves it; its
            weights are not loaded here.
        base_url: the server's address, ending in ``/v1``.
        concurrency: requests in flight at once.
        attempts: tries for each request.
        max_length: tokens per text; longer ones are truncated on the right. None: 1024.
        cache: file of the rewards, from which a stopped evaluation goes on; None: they are kept in memory.
        first_wait: seconds before the second try.

    Raises:
        ModelError: see ``check_served``.
    """

    def __init__(
        self, model: str, *, base_url: str | None = None, concurrency: int = 16, attempts: int = 6,
        max_length: int | None = None, cache: Path | None = None, first_wait: float = 0.5,
    ) -> None:  # fmt: skip
        self.name = REWARD_SERVER + model
        shape = check_served(model)
        with loading(model, KIND):
            self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._pad = shape.config.get_text_config().pad_token_id
        self.max_length = fitting_length(shape, max_length or MAX_LENGTH)
        self.client = ServerClient(
            model, base_url=base_url or DEFAULT_URL, concurrency=concurrency, attempts=attempts, first_wait=first_wait
        )
        self._rewards = Answers(cache)
        self._checked = False

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """Reward of each completion given its prompt, float64 [N].

        Raises:
            EnvironmentProblem: the server cannot be reached; the rewards so far are kept.
            DataError: it refuses a text, or messages do not go through the chat template.
            ModelError: it does not serve the model, or does not give one output without activation.
            NumericsError: a reward is not a finite number.
        """
        warn_of_unread(prompts, completions, self._tokenizer, self.max_length)
        texts = [reward_text(*row, self._tokenizer, text_pair=False) for row in zip(prompts, completions, strict=True)]
        rows = [self._until_padding(ids) for ids in reward_ids(texts, self._tokenizer, self.max_length)]
        keys = [digest([self.client.model, REVISION, ids]) for ids in rows]
        left = {key: ids for key, ids in zip(keys, rows, strict=True) if key not in self._rewards}
        self._ask(left)
        return np.array([self._rewards[key]["reward"] for key in keys], dtype=np.float64)

    def _until_padding(self, ids: list[int]) -> list[int]:
        """The ids up to the last one that is not padding, where transformers reads the reward."""
        end = len(ids)
        while end > 1 and ids[end - 1] == self._pad:
            end -= 1
        return ids[:end]

    def _ask(self, left: dict[str, list[int]]) -> None:
        if not left:
            return
        if not self._checked:
            self.client.check_model(hint=f"serve it with `--served-model-name {self.client.model}`")
            self._check_activation(list(left.values())[:2])
            self._checked = True
        self.client.stopping = stopping = Event()
        keys = list(left)
        parts = [keys[k : k + ROWS] for k in range(0, len(keys), ROWS)]
        jobs = [partial(self._values, [left[key] for key in part]) for part in parts]
        asked = in_threads(jobs, self.client.concurrency, stopping)
        for number, values in progress(asked, what="scoring", total=len(jobs), unit="requests"):
            for key, value in zip(parts[number], values, strict=True):
                self._rewards.add(key, {"reward": value})

    def _check_activation(self, rows: list[list[int]]) -> None:
        """Refuse a server whose answers without activation are those with one: probabilities are no rewards."""
        plain, activated = self._values(rows), self._values(rows, activation=True)
        if plain == activated and all(0 <= value <= 1 for value in plain):
            raise ModelError(
                f"judge {self.name}: {self.client.base_url} gives {plain[0]:g} with and without activation, expected "
                "the head's own output",
                code="eval-judge",
                hint="a vLLM server whose /classify takes use_activation, or name the model as a local reward model",
            )

    def _values(self, rows: list[list[int]], *, activation: bool = False) -> list[float]:
        """The head's output for each row of token ids."""
        body = {"model": self.client.model, "input": rows, "use_activation": activation}
        answer = self.client.request("POST", "/classify", body, at_root=True)
        try:
            found = {int(one["index"]): [float(value) for value in one["probs"]] for one in answer["data"]}
            if len(answer["data"]) != len(rows):
                raise ValueError(f"found {len(answer['data'])} answers to {len(rows)} texts")
            values = [found[k] for k in range(len(rows))]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"judge {self.name}: the answer of {self.client.base_url} lacks what is needed "
                f"({type(error).__name__}: {error})",
                code="eval-judge",
                hint="is this vLLM, started with --runner pooling --convert classify?",
            ) from None
        if any(len(value) != 1 for value in values):
            raise ModelError(
                f"judge {self.name}: found {max(map(len, values))} outputs, expected one", code="eval-judge",
                hint="use a reward model with one output",
            )  # fmt: skip
        if not np.isfinite(values).all():
            raise NumericsError(
                f"judge {self.name}: found a reward that is not finite", code="score-not-finite",
                hint="serve the model with --dtype float32",
            )  # fmt: skip
        return [value[0] for value in values]


def check_served(model: str) -> PreTrainedModel:
    """Refuse a reward model that no server computes as it is computed here; returns it without its weights.

    Args:
        model: folder or hub id.

    Raises:
        ModelError: the folder holds no reward model of one output, an adapter, an ensemble, or an encoder.
    """
    check_model_folder(model, rewards=True, head=True)
    count = len(members(model))
    found = "an adapter" if is_adapter(model) else f"an ensemble of {count} models" if count > 1 else ""
    if not found:
        with loading(model, KIND):
            config = AutoConfig.from_pretrained(model)
            with torch.device("meta"):
                shape = AutoModelForSequenceClassification.from_config(config)
        found = "" if is_decoder(shape) else f"an encoder ({type(shape).__name__})"
    if found:
        raise ModelError(
            f"judge {REWARD_SERVER}{model}: found {found}, expected one decoder with one output, which the server "
            "reads at the last token",
            code="eval-judge",
            hint=f"name {model} as a local reward model",
        )
    return shape
