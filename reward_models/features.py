"""Features of a reward model: the pooled hidden state that its head turns into the reward."""

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from align.config import RewardSection
from align.distributed import process_rank
from align.errors import ModelError
from align.io.console import progress
from align.io.files import atomic_write
from align.io.hashing import digest
from align.models.batching import token_batches
from align.models.fingerprint import NOT_OF_THE_MODEL
from align.models.folders import TEXT_PAIR
from reward_models.score import REWARDS, RewardScorer, ScoreJob
from reward_models.token_rows import KEY_BYTES, first_of_equals, row_key
from reward_models.tokenization import reward_ids

CHUNK = 4096
HEADS = ("score", "classifier")
"""Names of the layer that turns features into a reward."""
OF_THE_HEAD = ("architectures", "dtype", "id2label", "label2id", "num_labels", "problem_type", TEXT_PAIR)
NOT_OF_FEATURES = NOT_OF_THE_MODEL | frozenset(OF_THE_HEAD)
"""Fields of a model's config on which no feature depends, given the token ids and where a second text begins."""


class FeatureStore:
    """Features that were computed before, in files of ``CHUNK`` texts, so that trainings of a stage share them.

    They are found by the token ids of a text and the weights of the backbone, a pooler that was drawn at random among
    them; the head has no part in the key.

    Args:
        folder: its files belong to any number of backbones.
        scorer: whose features are stored.
    """

    def __init__(self, folder: Path, scorer: RewardScorer) -> None:
        self.folder = folder / _backbone(scorer.model)[:32]
        self._places: dict[bytes, tuple[Path, int]] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            self._index(file, load_file(file)["keys"])

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def add(self, keys: Sequence[bytes], features: np.ndarray) -> None:
        """Write features float32 [N, D] under the keys of their texts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.safetensors"
        table = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
        with atomic_write(file) as temporary:
            save_file({"keys": table, "features": features}, temporary)
        self._index(file, table)

    def read(self, keys: Sequence[bytes]) -> np.ndarray:
        """Features of stored texts, float64 [N, D]; one file at a time is in memory."""
        by_file: dict[Path, list[int]] = {}
        for k, key in enumerate(keys):
            by_file.setdefault(self._places[key][0], []).append(k)
        found: np.ndarray | None = None
        for file, own in by_file.items():
            features = load_file(file)["features"]
            found = np.empty((len(keys), features.shape[1])) if found is None else found
            found[own] = features[[self._places[keys[k]][1] for k in own]]
        assert found is not None
        return found

    def _index(self, file: Path, keys: np.ndarray) -> None:
        self._places |= {key.tobytes(): (file, row) for row, key in enumerate(keys)}


class FeatureScorer(RewardScorer):
    """A reward model with a linear head on a frozen backbone, whose features come from a store as far as it has them.

    Args:
        features: folder of the store.
        model, batch_tokens, max_length, options: as in ``RewardScorer``.
    """

    def __init__(self, model: Path | str, features: Path, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._store = FeatureStore(features, self)

    def in_batches(self, rows: Sequence[list[int]]) -> np.ndarray:
        """Reward of each row of token ids, float64 [N]: its features times the head."""
        if not rows:
            return np.empty(0)
        layer = head_layer(self.model)
        weight = layer.weight.detach().double().cpu().numpy()[0]
        bias = 0.0 if layer.bias is None else float(layer.bias)
        rewards: np.ndarray = features_of(self, rows, self._store) @ weight + bias
        return rewards


@dataclass(frozen=True, slots=True)
class FeatureScoreJob(ScoreJob):
    """``ScoreJob`` of a model with a linear head; the processes share the store in ``features``."""

    features: Path = Path()

    def load(self) -> RewardScorer:
        """Load the model."""
        return FeatureScorer(
            self.model, self.features, batch_tokens=self.batch_tokens, max_length=self.max_length, options=self.options
        )


def head_features(scorer: RewardScorer, texts: Sequence[str]) -> np.ndarray:
    """Input of the one-logit head for each text, float64 [N, D]; see ``features_of``."""
    return features_of(scorer, reward_ids(texts, scorer.tokenizer, scorer.max_length))


def features_of(scorer: RewardScorer, ids: Sequence[list[int]], store: FeatureStore | None = None) -> np.ndarray:
    """Input of the one-logit head for each row of token ids, float64 [N, D]; equal rows are computed once.

    It is the hidden state of the last token of a decoder, and of the first or pooled token of an encoder.

    Args:
        scorer: a reward model; its head is not used.
        ids: at least one row.
        store: keeps the features of each ``CHUNK`` texts, so that a stopped pass resumes; None: nothing is kept.

    Raises:
        ModelError: the model has neither a ``score`` nor a ``classifier`` head.
    """
    keys = [row_key(row) for row in ids]
    firsts, source = first_of_equals(keys)
    missing = [k for k in firsts if store is None or keys[k] not in store]
    parts = []
    for start in range(0, len(missing), CHUNK):
        own = missing[start : start + CHUNK]
        parts.append(_pass(scorer, [ids[k] for k in own]))
        if store is not None:
            store.add([keys[k] for k in own], parts.pop())
    found: np.ndarray = np.concatenate(parts) if store is None else store.read([keys[k] for k in firsts])
    return found[source].astype(np.float64, copy=False)


def features_folder(config: RewardSection, folder: Path) -> Path | None:
    """Folder below ``folder`` for features that trainings and scorings share; None where the backbone is trained."""
    return None if config.head == "full" else folder / "features"


def remove_features(features: Path | None) -> None:
    """Remove the folder, on the first process; all processes have finished with it."""
    if features is not None and process_rank() == 0:
        shutil.rmtree(features, ignore_errors=True)


def head_layer(model: nn.Module) -> Any:
    """The layer that turns features into a reward; None where no layer has one of the names ``HEADS``."""
    return next((layer for name in HEADS if (layer := getattr(model, name, None)) is not None), None)


def _pass(scorer: RewardScorer, ids: Sequence[list[int]]) -> np.ndarray:
    """One forward pass over rows of token ids, a batch at a time, float32 [N, D]."""
    head = head_layer(scorer.model)
    if head is None:
        name = type(scorer.model).__name__
        raise ModelError(f"{name}: has no head called score or classifier", code="reward-labels")
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].detach())

    batches = token_batches([len(row) for row in ids], scorer.batch_tokens)
    made: dict[int, np.ndarray] = {}
    hook = head.register_forward_pre_hook(keep)
    try:
        for batch in progress(batches, what="features", total=len(batches), unit="batches"):
            seen.clear()
            _, places = scorer.forward([ids[k] for k in batch])
            states = seen[0]
            if states.ndim == 3:
                states = states[torch.arange(len(batch)), places]
            made.update(zip(batch, states.float().cpu().numpy(), strict=True))
    finally:
        hook.remove()
    return np.stack([made[k] for k in range(len(ids))])


def _backbone(model: Any) -> str:
    """sha256 of the configuration and all weights but the head's, and of the revision of what models read."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_OF_FEATURES}
    state = hashlib.sha256(digest([REWARDS, config]).encode())
    tensors: Iterable[tuple[str, torch.Tensor]] = sorted(model.state_dict().items())
    for name, tensor in tensors:
        if name.partition(".")[0] not in HEADS:
            state.update(name.encode())
            state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
