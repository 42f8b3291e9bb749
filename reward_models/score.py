"""Scoring: (prompt, completion) -> reward, independent of batch size and padding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from align.config.columns import RESPONSES, SCORES
from align.data.pairs import with_columns
from align.distributed import local_device
from align.errors import NumericsError
from align.io.console import log, progress
from align.models.batching import token_batches
from align.models.folders import several_outputs
from align.models.tokenization import pad
from align.sharding.jobs import Work
from reward_models.loading import (
    DEFAULTS,
    LoadOptions,
    fitting_length,
    is_decoder,
    load_reward_model,
    reads_text_pairs,
    takes_segments,
)
from reward_models.token_rows import SegmentedIds, first_of_equals, row_key
from reward_models.tokenization import (
    pair_text,
    pair_tokens,
    reward_ids,
    reward_text,
    second_starts,
    segments,
)

SAME = {True: 1e-2, False: 0.1}
"""Largest difference, relative to 1 + |reward|, of a reward alone and in a batch: by whether it is in float32."""
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
        options: how the model is loaded and reads texts.
        new_head: the model may be a backbone without a head, used for its features only.
        device: where it computes; None: see ``local_device``.

    Raises:
        ModelError: the model cannot be used.
        ConfigError: a decoder is to read sentence pairs.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        batch_tokens: int,
        max_length: int,
        padding_side: Literal["left", "right"] = "right",
        options: LoadOptions = DEFAULTS,
        new_head: bool = False,
        device: str | None = None,
    ) -> None:
        self.name = str(model)
        loaded, self.tokenizer = load_reward_model(
            model, dtype=options.dtype, trust_remote_code=options.trust_remote_code, new_head=new_head
        )
        self.text_pair = reads_text_pairs(loaded, asked=options.text_pair, told=not new_head)
        self.device = torch.device(device or local_device())
        self.model = loaded.to(self.device).eval()
        self.batch_tokens = batch_tokens
        self.max_length = fitting_length(loaded, max_length)
        # an encoder pools its first token, which left padding would replace
        self.padding_side = padding_side if is_decoder(loaded) else "right"
        self._together: bool | None = None
        """Whether a text has the same reward alone and in a batch; None until it is known."""

    def score_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Reward of each text, float64 [N], in the order given.

        Raises:
            NumericsError: a reward is not a finite number.
        """
        return self._score(reward_ids(texts, self.tokenizer, self.max_length), texts.__getitem__)

    def _score(self, ids: Sequence[list[int]], text: Callable[[int], str]) -> np.ndarray:
        """Reward of each row of token ids, float64 [N], equal rows once; ``text`` names a row in an error."""
        firsts, source = first_of_equals([row_key(row) for row in ids])
        rewards = self.in_batches([ids[k] for k in firsts])
        for k in np.flatnonzero(~np.isfinite(rewards))[:1]:
            raise NumericsError(
                f"{self.name}: found the reward {rewards[k]} for {text(firsts[k])[:SHOWN]!r}, expected a finite number",
                code="score-not-finite",
                hint="copy the model again, or train it with a smaller learning_rate",
            )
        found: np.ndarray = rewards[source]
        return found

    def in_batches(self, rows: Sequence[list[int]]) -> np.ndarray:
        """Reward of each row of token ids, float64 [N], ``batch_tokens`` at a time."""
        rewards = np.empty(len(rows), dtype=np.float64)
        batches = token_batches([len(row) for row in rows], self.batch_tokens)
        for batch in progress(batches, what="scoring", total=len(batches), unit="batches"):
            rewards[batch] = self.rewards([rows[k] for k in batch])
        return rewards

    def score_completions(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """Reward of each completion given its prompt, float64 [N].

        Raises:
            ModelError, DataError: messages that cannot go through the chat template.
        """
        return self.score_texts([self.text(*row) for row in zip(prompts, completions, strict=True)])

    def text(self, prompt: Any, completion: Any, *, row: str = "", settings: Mapping[str, Any] | None = None) -> str:
        """What the model reads of a prompt and a completion; see ``reward_text``."""
        return reward_text(prompt, completion, self.tokenizer, text_pair=self.text_pair, row=row, settings=settings)

    def score_pairs(self, pairs: Dataset) -> Dataset:
        """The table with reward_chosen, reward_rejected and margin (their difference)."""
        return self.score_and_tell(pairs)[0]

    def score_and_tell(self, pairs: Dataset) -> tuple[Dataset, np.ndarray]:
        """``score_pairs``, and whether both responses are the same after truncation, bool [N]; see ``ALIKE``."""
        read = pair_tokens(pairs, self.tokenizer, self.max_length, text_pair=self.text_pair)

        def text(place: int) -> str:
            side, row = divmod(place, len(pairs))
            return pair_text(pairs[row], RESPONSES[side], self.tokenizer, text_pair=self.text_pair)

        rewards = self._score([*read.chosen, *read.rejected], text)
        return with_rewards(pairs, *rewards.reshape(2, len(pairs))), read.alike

    def rewards(self, rows: list[list[int]]) -> np.ndarray:
        """Reward of each row of token ids, float64 [N]: what the model gives each alone.

        Raises:
            ModelError: the model gives another number of outputs than one per row.
        """
        if self._together is None and len({len(row) for row in rows}) > 1:
            self._together = self._read_alike_together(rows)
        parts = [rows] if self._together is not False else [[row] for row in rows]
        return np.concatenate([self.forward(part)[0] for part in parts])

    def forward(self, rows: list[list[int]]) -> tuple[np.ndarray, torch.Tensor]:
        """One forward pass over rows of token ids: rewards, float64 [N], and the token that each is read at, [N].

        A decoder's reward is read where transformers reads it of a row alone: at the last token that is not the
        padding token of the model's configuration, or at the last one where that names none. An encoder's place is 0.
        """
        pad_token_id = self._filler(rows)
        inputs = self._inputs(rows, pad_token_id)
        with torch.inference_mode(), padded_with(self.model, pad_token_id):
            logits = self.model(**inputs).logits
        if logits.shape not in ((len(rows),), (len(rows), 1)):
            raise several_outputs(self.name, logits[0].numel())
        places = torch.zeros(len(rows), dtype=torch.long)
        if is_decoder(self.model):
            ids = inputs["input_ids"].cpu()
            places = (torch.arange(ids.shape[1]).expand_as(ids) * (ids != pad_token_id)).argmax(dim=1)
        return logits.reshape(-1).double().cpu().numpy(), places

    def _read_alike_together(self, rows: list[list[int]]) -> bool:
        """Whether the shortest row has the same reward alone as among the others."""
        shortest = min(range(len(rows)), key=lambda k: len(rows[k]))
        alone, among = self.forward([rows[shortest]])[0][0], self.forward(rows)[0][shortest]
        tolerance = SAME[self.model.dtype == torch.float32] * (1 + abs(alone))
        same = bool(abs(alone - among) <= tolerance) or not np.isfinite([alone, among]).all()
        if not same:
            log.warning("%s: its rewards depend on padding; texts are scored one at a time", self.name)
        return same

    def _filler(self, rows: list[list[int]]) -> int:
        """The token to pad with: the configuration's, else one that no row ends in, so that none is read early."""
        stated = self.model.config.get_text_config().pad_token_id
        count = self.model.get_input_embeddings().weight.shape[0]
        if stated is not None and 0 <= stated < count:
            return int(stated)
        ends = {row[-1] for row in rows if row}
        return next(token for token in range(count + 1) if token not in ends)

    def _inputs(self, rows: list[list[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
        """What the model is given of the rows of token ids: padded ids and mask [N, width], on its device."""
        left = self.padding_side == "left"
        padded = pad(rows, pad_token_id, left=left)
        found = padded._asdict()
        if left:
            found["position_ids"] = (padded.attention_mask.cumsum(dim=1) - 1).clamp_min(0)
        if takes_segments(self.model) and any(isinstance(row, SegmentedIds) for row in rows):
            found["token_type_ids"] = segments(padded.attention_mask, second_starts(rows))
        return {name: value.to(self.device) for name, value in found.items()}


@contextmanager
def padded_with(model: PreTrainedModel, pad_token_id: int) -> Iterator[None]:
    """Let the model's configuration name this padding token for one forward pass."""
    configs = [model.config.get_text_config(), model.config]
    before = [config.pad_token_id for config in configs]
    for config in configs:
        config.pad_token_id = pad_token_id
    try:
        yield
    finally:
        for config, token in zip(configs, before, strict=True):
            config.pad_token_id = token


def with_rewards(pairs: Dataset, chosen: np.ndarray, rejected: np.ndarray) -> Dataset:
    """The table with the rewards [N] of both responses and their margin."""
    return with_columns(pairs, dict(zip(SCORES, (chosen, rejected, chosen - rejected), strict=True)))


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """Rewards of the pairs of a shard, and whether their responses are the same after truncation; see ``ALIKE``."""

    model: str
    batch_tokens: int
    max_length: int
    options: LoadOptions = DEFAULTS

    def load(self) -> RewardScorer:
        """Load the model."""
        return RewardScorer(
            self.model, batch_tokens=self.batch_tokens, max_length=self.max_length, options=self.options
        )

    def start(self) -> Work:
        """Load the model and return the work."""
        scorer = self.load()

        def work(rows: Dataset) -> Dataset:
            scored, alike = scorer.score_and_tell(rows)
            return scored.select_columns(list(SCORES[:2])).add_column(ALIKE, alike.tolist())

        return work


def tell_alike(alike: np.ndarray) -> None:
    """Log how many of the pairs, bool [N], have a margin of 0 because their responses are the same tokens."""
    if alike.any():
        log.warning("%d of %d pairs have a margin of 0: their responses are the same tokens to the model",
                    alike.sum(), len(alike))  # fmt: skip


REWARDS = 4
"""Revision of rewards and verdicts, part of their keys: raised when models or judges read or return something else."""
