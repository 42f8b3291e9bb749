"""Scoring: (prompt, completion) -> reward, independent of batch size and padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset

from align.config.columns import SCORES
from align.data.pairs import with_columns
from align.distributed import local_device
from align.errors import NumericsError
from align.io.console import log, progress
from align.models.batching import token_batches
from align.models.tokenization import encode_reward_texts, pad, render
from align.sharding.jobs import Work
from reward_models.loading import fitting_length, load_reward_model
from reward_models.tokenization import cut_alike, pair_texts

SHOWN = 80
"""Characters of a text in an error."""
ALIKE = "cut_alike"
"""Column of a shard: whether both responses are the same tokens after truncation, so that their margin is 0."""


class RewardScorer:
    """A reward model ready to score.

    Args:
        model: folder or hub id.
        batch_tokens: padded tokens per batch; a longer text is a batch of its own.
        max_length: tokens per text; longer ones are truncated on the right.
        padding_side: padding side of a decoder; rewards do not depend on it. Encoders are padded on the right.
        trust_remote_code: whether code that comes with the model may run.
        new_head: the model may be a backbone without a head, used for its features only.

    Raises:
        ModelError: the model cannot be used.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        batch_tokens: int,
        max_length: int,
        padding_side: Literal["left", "right"] = "right",
        trust_remote_code: bool = False,
        new_head: bool = False,
    ) -> None:
        self.name = str(model)
        loaded, self.tokenizer = load_reward_model(model, trust_remote_code=trust_remote_code, new_head=new_head)
        self.device = torch.device(local_device())
        self.model = loaded.to(self.device).eval()
        self.batch_tokens = batch_tokens
        self.max_length = fitting_length(loaded, max_length)
        # an encoder pools its first token, which left padding would replace
        self.padding_side = padding_side if hasattr(loaded, "score") else "right"

    def score_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Reward of each text, float64 [N], in the order given.

        Raises:
            NumericsError: a reward is not a finite number.
        """
        return self._score(texts, encode_reward_texts(texts, self.tokenizer, self.max_length))

    def _score(self, texts: Sequence[str], ids: list[list[int]]) -> np.ndarray:
        rewards = np.empty(len(ids), dtype=np.float64)
        batches = token_batches([len(row) for row in ids], self.batch_tokens)
        with torch.inference_mode():
            for batch in progress(batches, what="scoring", total=len(batches), unit="batches"):
                rewards[batch] = self.rewards([ids[k] for k in batch])
        for k in np.flatnonzero(~np.isfinite(rewards))[:1]:
            raise NumericsError(
                f"{self.name}: found the reward {rewards[k]} for {texts[k][:SHOWN]!r}, expected a finite number",
                code="score-not-finite",
                hint="copy the model again, or train it with a smaller learning_rate",
            )
        return rewards

    def score_completions(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """Reward of each completion given its prompt, float64 [N].

        Raises:
            ModelError, DataError: messages that cannot go through the chat template.
        """
        rows = zip(prompts, completions, strict=True)
        return self.score_texts([render(prompt, completion, self.tokenizer) for prompt, completion in rows])

    def score_pairs(self, pairs: Dataset) -> Dataset:
        """The table with reward_chosen, reward_rejected and margin (their difference)."""
        return self.score_and_tell(pairs)[0]

    def score_and_tell(self, pairs: Dataset) -> tuple[Dataset, np.ndarray]:
        """``score_pairs``, and whether both responses are the same after truncation, bool [N]; see ``ALIKE``."""
        read = pair_texts(pairs, self.tokenizer, self.max_length)
        return with_rewards(pairs, *self._score(read.texts, read.ids).reshape(2, len(pairs))), read.alike

    def unread(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """Whether the prompt leaves no room for its completion within ``max_length``, bool [N]."""
        rows = list(zip(prompts, completions, strict=True))
        whole = [render(prompt, completion, self.tokenizer) for prompt, completion in rows]
        asked = [render(prompt, "" if isinstance(prompt, str) else [], self.tokenizer) for prompt, _ in rows]
        return cut_alike(whole, asked, self.tokenizer, self.max_length)

    def rewards(self, rows: list[list[int]]) -> np.ndarray:
        """Reward of each row of token ids, float64 [N], in one forward pass."""
        return self.model(**self.inputs(rows)).logits.squeeze(-1).double().cpu().numpy()

    def inputs(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Inputs of the model for rows of token ids: padded ids and mask, int64 [N, T], on its device."""
        left = self.padding_side == "left"
        padded = pad(rows, self.tokenizer.pad_token_id or 0, left=left)
        found = padded._asdict()
        if left:
            found["position_ids"] = (padded.attention_mask.cumsum(dim=1) - 1).clamp_min(0)
        return {name: value.to(self.device) for name, value in found.items()}


def with_rewards(pairs: Dataset, chosen: np.ndarray, rejected: np.ndarray) -> Dataset:
    """The table with the rewards [N] of both responses and their margin."""
    return with_columns(pairs, dict(zip(SCORES, (chosen, rejected, chosen - rejected), strict=True)))


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """Rewards of the pairs of a shard, and whether their responses are the same after truncation; see ``ALIKE``."""

    model: str
    batch_tokens: int
    max_length: int
    trust_remote_code: bool

    def start(self) -> Work:
        """Load the model."""
        scorer = RewardScorer(
            self.model, batch_tokens=self.batch_tokens, max_length=self.max_length,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip

        def work(rows: Dataset) -> Dataset:
            scored, alike = scorer.score_and_tell(rows)
            return scored.select_columns(list(SCORES[:2])).add_column(ALIKE, alike.tolist())

        return work


def tell_alike(alike: np.ndarray) -> None:
    """Log how many of the pairs, bool [N], have a margin of 0 because their responses are the same tokens."""
    if alike.any():
        log.warning("%d of %d pairs have a margin of 0: their responses are the same tokens to the model",
                    alike.sum(), len(alike))  # fmt: skip


REWARDS = 3
"""Revision of rewards and verdicts, part of their keys: raised when models or judges read or return something else."""
