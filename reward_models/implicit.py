"""A policy as a reward model: beta times the log-ratio of a response to the reference (arXiv 2305.18290, eq. 5).

Rewards of two responses to one prompt can be compared; those of different prompts have different offsets.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from align.config import LossSection
from align.config.columns import FINISH_COLUMNS, ID_COLUMNS, RESPONSES, TEMPLATE_COLUMNS, TEXT
from align.data.thumbs import without_other
from align.distributed import local_device
from align.errors import ConfigError, NumericsError
from align.io.console import progress
from align.io.hashing import digest
from align.io.stage import read_manifest
from align.losses.sums import bind_section
from align.models.batching import token_batches
from align.models.folders import adapter_base, fingerprint_model
from align.models.layout import base_model
from align.models.loading import load_policy, load_tokenizer
from align.models.logps import add_completion_head, pair_logps
from align.models.tokenization import collate, encode_table
from align.models.turns import TURNS, Turns
from reward_models.score import with_rewards

FOLDERS_ABOVE = 3
"""Folders above a model that may be its training's: train-NAME/model, train-NAME/checkpoints/checkpoint-N."""


@dataclass(frozen=True, slots=True)
class ImplicitSource:
    """A policy, its reference and its beta."""

    policy: str
    reference: str
    beta: float
    turns: Turns = "assistant"
    """Whose words count in responses of several messages, as in the training."""

    @property
    def key(self) -> str:
        """Identifies the rewards: content of both models, beta, whose words count."""
        return digest([fingerprint_model(self.policy), fingerprint_model(self.reference), self.beta, self.turns])

    @classmethod
    def find(cls, policy: str, reference: str | None = None, beta: float | None = None) -> "ImplicitSource":
        """Complete what is not given from the folder of the run that trained the policy.

        Args:
            policy: folder or hub id.
            reference: folder or hub id; None: that of the run, or the base of an adapter.
            beta: scale; None: that of the run's loss.

        Raises:
            ConfigError: something is not given and not found, or beta is not above 0.
        """
        trained = _training_of(policy)
        settings: dict[str, Any] = trained.get("settings", {})
        loss = None
        if trained:
            parameters = trained.get("trust", {}) | trained["loss"]["parameters"]
            loss = bind_section(LossSection(**trained["loss"] | {"parameters": parameters}))
        reference = reference or settings.get("reference") or settings.get("model") or adapter_base(policy)
        if reference is None:
            raise _not_found(policy, "reference", "give the model that its training started from: --reference")
        if beta is None and loss is not None:
            if not loss.spec.reads_reference or not any("beta" in part.parameters for part in loss.parts):
                raise _not_found(policy, f"beta under the loss {loss.spec.name}", "give one: --beta, and --reference")
            beta = loss.beta
        if beta is None:
            raise _not_found(policy, "beta", "give that of its loss: --beta")
        if not 0 < beta < float("inf"):
            raise ConfigError(f"beta: found {beta}, expected a number above 0", code="implicit-reward")
        turns = settings.get("turns", "all" if trained else "assistant")
        return cls(str(policy), str(reference), float(beta), turns if turns in TURNS else "assistant")


def _training_of(policy: str) -> dict[str, Any]:
    """What the training of a run was made from, by the manifest of its folder; empty if there is none."""
    folder = Path(policy).absolute()
    for above in list(folder.parents)[:FOLDERS_ABOVE] if folder.is_dir() else []:
        manifest = read_manifest(above)
        if manifest and {"loss", "settings"} <= set(manifest["inputs"]):
            inputs: dict[str, Any] = manifest["inputs"]
            return inputs
    return {}


def _not_found(policy: str, what: str, hint: str) -> ConfigError:
    return ConfigError(f"{policy}: found no {what} in the folder of a run", code="implicit-reward", hint=hint)


class ImplicitReward:
    """Scores responses by beta (log policy - log reference), summed over their tokens as in training.

    Args:
        source: policy, reference and beta.
        batch_tokens: padded tokens per forward pass.
        max_length: tokens of prompt and response together; longer ones are cut off at the end.
        trust_remote_code: code that comes with the models may run.
    """

    def __init__(
        self,
        source: ImplicitSource,
        *,
        batch_tokens: int = 4096,
        max_length: int = 1024,
        trust_remote_code: bool = False,
    ) -> None:
        self.source = source
        self.batch_tokens, self.max_length = batch_tokens, max_length
        self.trust_remote_code = trust_remote_code
        self.tokenizer = load_tokenizer(source.policy, trust_remote_code=trust_remote_code)
        other = load_tokenizer(source.reference, trust_remote_code=trust_remote_code)
        if other.get_vocab() != self.tokenizer.get_vocab():
            raise ConfigError(
                f"{source.reference}: has other tokens than {source.policy}, expected the policy's tokenizer",
                code="implicit-reward",
                hint="give the model that its training started from",
            )

    def score_pairs(self, pairs: Dataset) -> Dataset:
        """The table with reward_chosen, reward_rejected and margin, their difference.

        Raises:
            NumericsError: a reward is not finite.
        """
        rewards = self._rewards(
            encode_table(pairs.select_columns(_read(pairs)), self.tokenizer, turns=self.source.turns)
        )
        return with_rewards(pairs, *rewards)

    def score_completions(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """Reward of each response after its prompt, float64 [N].

        Raises:
            NumericsError: a reward is not finite.
        """
        rows = [
            {"id": str(k), "prompt": prompt} | dict.fromkeys(RESPONSES, completion)
            for k, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        table = encode_table(Dataset.from_list(rows), self.tokenizer, turns=self.source.turns)
        found: np.ndarray = self._rewards(without_other(table))[0]
        return found

    def _rewards(self, table: Dataset) -> np.ndarray:
        """Rewards [2, N] of the chosen and the rejected responses of a tokenized table."""
        policy, reference = (self._logps(model, table) for model in (self.source.policy, self.source.reference))
        rewards = self.source.beta * (policy - reference)
        for row in np.flatnonzero(~np.isfinite(rewards).all(axis=0))[:1]:
            raise NumericsError(
                f"{self.source.policy}: found the reward {rewards[:, row].tolist()} for row {row + 1}, expected finite "
                "numbers",
                code="score-not-finite",
                hint="copy the models again",
            )
        return rewards

    def _logps(self, name: str, table: Dataset) -> np.ndarray:
        """Log-probs [2, N], summed over the tokens that count, one model in memory."""
        found = np.empty((2, len(table)))
        lengths = [
            2 * min(len(prompt) + max(len(chosen), len(rejected)), self.max_length)
            for prompt, chosen, rejected in zip(*(table[column] for column in ID_COLUMNS), strict=True)
        ]
        batches = token_batches(lengths, self.batch_tokens)
        with self._loaded(name) as model:
            for batch in progress(batches, what="scoring", total=len(batches), unit="batches"):
                rows = collate(table.select(batch), self.tokenizer.pad_token_id or 0, max_length=self.max_length)
                rows = {key: value.to(model.device) for key, value in rows.items()}
                logps = pair_logps(model, rows, "concatenated", metrics=False)
                found[:, batch] = torch.stack([logps.chosen, logps.rejected]).double().cpu().numpy()
        return found

    @contextmanager
    def _loaded(self, name: str) -> Iterator[Any]:
        model = load_policy(name, trust_remote_code=self.trust_remote_code, dtype="float32")
        model = model.to(local_device()).eval()
        add_completion_head(base_model(model))
        with torch.inference_mode():
            yield model


def _read(pairs: Dataset) -> list[str]:
    """Columns that tokenization reads."""
    return [name for name in ("id", *TEXT, *FINISH_COLUMNS.values(), *TEMPLATE_COLUMNS) if name in pairs.column_names]
