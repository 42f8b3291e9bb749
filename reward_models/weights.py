"""Whether every weight of a reward model is read: none new and random, none in its files that would not be used."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from align.errors import ModelError
from align.io.console import log
from align.models.folders import HEADS, no_head, several_outputs

NAMED = 3
"""Names of weights that a message gives."""
NOT_READ = re.compile(
    r"(^|\.)(lm_head|embed_out|mtp(_layers)?)\."
    r"|(^|\.)(lm_head|(attn|attention)\.(masked_)?bias|position_ids|token_type_ids|\w*inv_freq|(cos|sin)_cached)$"
)
"""Heads that predict tokens, and buffers: a reward does not depend on them."""
NOT_READ_BY_ENCODERS = re.compile(
    r"^(cls\.(predictions|seq_relationship)|lm_predictions|mask_predictions|generator_predictions|decoder"
    r"|discriminator_predictions|vocab_(transform|layer_norm|projector))\.|(^|\.)pooler\.dense\.(weight|bias)$"
)
"""Heads of an encoder's pretraining, and poolers that its head does not read. Nothing in a decoder has these names, so
there they are of a head of its own."""
POOLER = "pooler"
"""Part of a backbone that models pretrained without it lack; it is trained with the head."""


@dataclass(frozen=True, slots=True)
class FoundWeights:
    """What became of the weights of a model while it was loaded."""

    missing: frozenset[str]
    """Parameters that are new and random."""
    unexpected: frozenset[str]
    """Weights in the files that the model has no place for."""
    mismatched: Mapping[str, tuple[int, ...]]
    """Parameters of another shape in the files, and that shape."""
    adapter: bool = False
    head_of_adapter: bool = False
    """An adapter has given parameters that its base lacks."""

    @classmethod
    def of(cls, model: PreTrainedModel, info: Mapping[str, Any]) -> "FoundWeights":
        """From the ``output_loading_info`` of ``from_pretrained``."""
        parameters = {name for name, _ in model.named_parameters()}
        mismatched = {name: tuple(found) for name, found, _ in info["mismatched_keys"]}
        missing = parameters & set(info["missing_keys"]) - mismatched.keys()
        return cls(frozenset(missing), frozenset(info["unexpected_keys"]), mismatched)

    def adapted(self, given: Iterable[str]) -> "FoundWeights":
        """After an adapter has given the parameters of these names."""
        names = frozenset(given)
        head = bool(self.missing & names) or not names.isdisjoint(self.mismatched)
        kept = {name: shape for name, shape in self.mismatched.items() if name not in names}
        return replace(
            self, missing=self.missing - names, mismatched=kept, adapter=True,
            head_of_adapter=self.head_of_adapter or head,
        )  # fmt: skip


def check_weights(name: str, model: PreTrainedModel, found: FoundWeights, *, new_head: bool) -> None:
    """Refuse a model that would be read in part, or be new in part.

    Args:
        name: folder or hub id.
        model: as loaded.
        found: what became of its weights.
        new_head: a backbone without a head is taken; its other weights must be there all the same.

    Raises:
        ModelError: names the weights.
    """
    for weight, shape in found.mismatched.items():
        if weight in HEADS and shape[0] != 1:
            raise several_outputs(name, shape[0])
        raise ModelError(
            f"{name}: cannot be loaded as a reward model (its weights have other shapes than config.json says: "
            f"{weight} {list(shape)})",
            code="model-load",
            hint="copy the model again",
        )
    harmless = [NOT_READ] if hasattr(model, "score") else [NOT_READ, NOT_READ_BY_ENCODERS]
    unused = {weight for weight in found.unexpected if not any(names.search(weight) for names in harmless)}
    lacking = {weight for weight in found.missing if not new_head or _in_backbone(model, weight)}
    if lacking:
        also = f"; it has {listed_names(unused)}, which would not be read" if unused else ""
        raise no_head(name, listed_names(lacking), of_adapter=found.adapter, also=also)
    refused = {weight for weight in unused if not found.missing or _beside_a_parameter(model, weight)}
    if refused:
        raise ModelError(
            f"{name}: has weights {listed_names(refused)}, which {type(model).__name__} does not read, expected none "
            "but a backbone's and its head's",
            code="reward-unread",
            hint="the model is of another kind than its config.json says, or needs code of its own: take one that "
            "transformers' AutoModelForSequenceClassification reads as it was trained",
        )
    if unused:
        log.warning("%s: %s are not read, a new head is trained", name, listed_names(unused))


def _in_backbone(model: PreTrainedModel, weight: str) -> bool:
    inside = weight.startswith(f"{model.base_model_prefix}.")
    return inside and f".{POOLER}." not in weight


def _beside_a_parameter(model: PreTrainedModel, weight: str) -> bool:
    """Whether it belongs to the backbone: to a module that is there, or below the backbone's prefix."""
    owner = weight.rpartition(".")[0]
    modules = {name for name, _ in model.named_modules()}
    prefix = model.base_model_prefix
    return weight.startswith(f"{prefix}.") or (bool(owner) and not modules.isdisjoint({owner, f"{prefix}.{owner}"}))


def listed_names(names: Iterable[str]) -> str:
    """The first of them in alphabetical order, and how many more there are."""
    found = sorted(names)
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(found[:NAMED]) + more
