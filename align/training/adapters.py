"""Which adapters a policy can be trained with, and from; what cannot be right is refused when the run is checked."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from trl.trainer import dpo_trainer

from align.config import TrainSection
from align.errors import ConfigError
from align.models.adapter_folders import changes_base, is_quantized
from align.models.folders import ADAPTER, adapter_base, adapter_config, is_adapter

OTHER_BASES = {
    "layer_replication": "repeats layers of the base",
    "kasa_config": "changes the base weights",
    "monteclora_config": "draws weights at random in each forward pass",
    "arrow_config": "routes between other adapters",
}
"""Fields of peft.LoraConfig with which the model without its adapter is not ``train.model``, and why."""
UNMERGED = {
    "layer_replication": "repeats layers of the base, which share their weights",
    "alora_invocation_tokens": "an activated LoRA cannot be merged",
}
"""Fields of peft.LoraConfig whose adapter cannot be merged into its base, and why."""
CONTINUED = (
    "BOFT", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "OFT",
    "RANDLORA", "TRAINABLE_TOKENS", "VBLORA", "VERA",
)  # fmt: skip
"""Values of ``peft_type`` with which a training can go on from an adapter: peft holds a second, frozen copy of one,
and ``copy_adapter`` makes it exact (tests/training/test_adapters.py)."""
TIED = ("embed_tokens", "lm_head")
"""Modules whose adapters ``ensure_weight_tying`` ties, as peft names them."""
OTHER_WEIGHTS = ("revision", "gguf_file", "subfolder", "variant", "config", "state_dict", "key_mapping")
"""Arguments of ``from_pretrained`` that choose which weights are loaded."""
WRITTEN_BY_PEFT = ("peft_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version")
PLAIN = "leave it out, or use gaussian, orthogonal or mica"
MERGE = "merge the adapter into its base model, and train from that with a train.peft"

Problem = tuple[str, str]
"""(what is wrong, what to do)."""


@dataclass(frozen=True, slots=True)
class Use:
    """What a training does with its adapter."""

    live: bool
    """The reference runs in each step."""
    synced: bool
    """The reference follows the policy (``sync_ref_model``)."""
    checkpointing: bool
    """Activations are computed again in the backward pass."""
    measured: bool
    """Gradients of single pairs are measured."""


def check_adapter(train: TrainSection) -> None:
    """Refuse an adapter that would be sampled, evaluated or measured as another model than the trained one.

    Reads ``train.peft``, or the configuration in the folder ``train.model``; no model is loaded.

    Raises:
        ConfigError: the first thing found wrong.
    """
    _raise_first(_weights_problems(train.trainer.get("model_init_kwargs")), code="trainer-key")
    if is_adapter(train.model):
        config = adapter_config(train.model)
        path = f"train.model: {Path(train.model) / ADAPTER}: "
        _raise_first(_both_problems(train))
        _raise_first(_base_problems(config, path))
        _raise_first(_continued_problems(config, path, lambda: _is_tied(str(adapter_base(train.model)))))
        _raise_first(_use_problems(config, path, _use_of(train)))
    elif train.peft is not None:
        _raise_first(_own_problems(train.peft))
        _raise_first(_base_problems(train.peft, "train.peft."))
        _raise_first(_fresh_problems(train.peft))
        _raise_first(_use_problems(train.peft, "train.peft.", _use_of(train)))


def _use_of(train: TrainSection) -> Use:
    trainer, methods = train.trainer, train.methods.values()
    return Use(
        live=trainer.get("precompute_ref_log_probs") is False or any(method.token_mask for method in methods),
        synced=bool(trainer.get("sync_ref_model")),
        checkpointing=trainer.get("gradient_checkpointing") is not False,
        measured=train.entanglement is not None or any(method.remedy for method in methods),
    )


def check_given_adapter(config: Any) -> None:
    """Refuse a new adapter, by its peft configuration, that would not start as this says; ``check_started`` follows.

    Raises:
        ConfigError: the first thing found wrong.
    """
    if config is not None:
        _raise_first(_base_problems(config.to_dict(), "train.peft."))
        _raise_first(_fresh_problems(config.to_dict()))


def check_started(model: Any, use: Use) -> None:
    """Refuse the adapters of a model that is about to be trained, by their peft configurations.

    Args:
        model: the policy with its adapter; further adapters are copies of it.
        use: what is done with it.

    Raises:
        ConfigError: the model without its adapter is not the one that training starts from, the adapter has no exact
            copy that is the reference, or peft does not do right what the training does with it.
    """
    for name, one in model.peft_config.items():
        config = {key: getattr(value, "value", value) for key, value in one.to_dict().items()}
        _raise_first(_base_problems(config, "train.peft."))
        if name != next(iter(model.peft_config)):
            tied = model.get_base_model().config.get_text_config().tie_word_embeddings
            _raise_first(_continued_problems(config, "train.model: its adapter: ", partial(bool, tied)))
        _raise_first(_use_problems(config, "train.peft.", use))


def check_merges(train: TrainSection) -> None:
    """Refuse an adapter that cannot be merged into its base, which is where a next training starts.

    Raises:
        ConfigError: see above.
    """
    if train.quantization or is_quantized(train.model):
        where = "train.trainer.model_init_kwargs" if train.quantization else "train.model"
        raise ConfigError(
            f"{where}: found a quantized base, expected one that is not: an adapter on it cannot be merged into the "
            "model that the next round starts from",
            code="adapter",
            hint="leave the quantization out, or train a single round with `align train`",
        )
    fields = train.peft or {}
    for name in ("alora_invocation_tokens", "lora_bias"):
        if fields.get(name):
            raise ConfigError(
                f"train.peft.{name}: found {fields[name]!r}, expected none: such an adapter cannot be merged into the "
                "model that the next round starts from",
                code="adapter",
                hint="leave it out",
            )


def check_reward_adapter(fields: Mapping[str, Any] | None) -> None:
    """Refuse an adapter of a reward model that would not be trained with its head, or not be merged afterwards.

    Args:
        fields: ``reward.peft``.

    Raises:
        ConfigError: the first thing found wrong.
    """
    _raise_first(_reward_problems(fields or {}))


def _reward_problems(fields: Mapping[str, Any]) -> Iterator[Problem]:
    yield from _no_update(fields, "reward.peft.")
    merged = "a trained reward model is saved with its adapter merged"
    for field, reason in UNMERGED.items():
        if fields.get(field):
            yield f"reward.peft.{field}: {reason}, expected none: {merged}", "leave it out"
    if fields.get("task_type") not in (None, "SEQ_CLS") and not fields.get("modules_to_save"):
        yield (
            f"reward.peft.task_type: found {fields['task_type']!r}, expected SEQ_CLS, with which the head is trained",
            "leave it out",
        )


def check_biases_merge(model: nn.Module) -> None:
    """Refuse trained biases (``lora_bias``) on a layer that has no bias to merge them into.

    Args:
        model: a reward model with its adapter, before it is trained.

    Raises:
        ConfigError: names the layer.
    """
    for name, layer in model.named_modules():
        base = getattr(layer, "base_layer", None)
        if base is not None and any(getattr(layer, "lora_bias", {}).values()) and getattr(base, "bias", None) is None:
            raise ConfigError(
                f"reward.peft.lora_bias: {name} has no bias that the adapter's could be merged into, expected none",
                code="adapter",
                hint="leave it out, or name target_modules that have biases",
            )


def _base_problems(config: Mapping[str, Any], path: str) -> Iterator[Problem]:
    start = config.get("init_lora_weights", True)
    if changes_base(start):
        yield (
            f"{path}init_lora_weights: {start!r} subtracts the adapter's start from the base weights, so the "
            "model without its adapter is not the reference",
            PLAIN,
        )
    for field, reason in OTHER_BASES.items():
        if config.get(field) is not None:
            yield (
                f"{path}{field}: {reason}, so that the model without its adapter is not the reference",
                "leave it out",
            )


def _own_problems(fields: Mapping[str, Any]) -> Iterator[Problem]:
    """Fields that peft writes itself; the folder of an adapter would name another base with some of them."""
    for name in WRITTEN_BY_PEFT:
        if fields.get(name) is not None:
            yield (
                f"train.peft.{name}: found {fields[name]!r}, expected none: it is set when the adapter is saved",
                "leave it out",
            )


def _no_update(fields: Mapping[str, Any], path: str) -> Iterator[Problem]:
    if fields.get("lora_alpha") == 0:
        yield (
            f"{path}lora_alpha: found 0, which multiplies the adapter, so nothing would be trained",
            "leave it out, or set a number above 0",
        )


def _fresh_problems(fields: Mapping[str, Any]) -> Iterator[Problem]:
    yield from _no_update(fields, "train.peft.")
    if fields.get("init_lora_weights") == "eva":
        yield (
            "train.peft.init_lora_weights: 'eva' needs activations that are not collected here; without them peft "
            "starts plain LoRA",
            PLAIN,
        )
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        yield (f"train.peft.task_type: found {fields['task_type']!r}, expected CAUSAL_LM", "leave it out")


def _use_problems(config: Mapping[str, Any], path: str, use: Use) -> Iterator[Problem]:
    """What this training would do with an adapter that peft does not do right."""
    if config.get("bias", "none") != "none" and use.live:
        yield (
            f"{path}bias: found {config['bias']!r}, expected none: trained biases stay when the adapter is off, which "
            "is the reference in each step (token_mask, or precompute_ref_log_probs: false)",
            "set bias: none, or precompute the reference log-probs",
        )
    if use.synced:
        yield (
            "train.trainer.sync_ref_model: found true, expected false: an adapter has no reference model of its own",
            "leave it out, or train all parameters",
        )
    if config.get("alora_invocation_tokens"):
        found = f"{path}alora_invocation_tokens: an activated LoRA"
        if use.checkpointing:
            yield (
                f"{found} cannot be trained with gradient checkpointing",
                "set train.trainer.gradient_checkpointing: false",
            )
        if use.measured:
            yield (f"{found} is not measured", "leave out train.entanglement and the remedies")


def _both_problems(train: TrainSection) -> Iterator[Problem]:
    if train.peft is not None:
        yield (
            f"train.peft: found it and an adapter, {train.model}, as train.model, expected one of them",
            f"leave train.peft out to train that adapter further, or {MERGE}",
        )


def _continued_problems(config: Mapping[str, Any], path: str, tied: Callable[[], bool]) -> Iterator[Problem]:
    """Adapters of which peft cannot hold the frozen copy that is the reference."""
    kind, bias = config.get("peft_type"), config.get("bias", "none")
    if kind not in CONTINUED:
        yield (f"{path}peft_type: found {kind}, expected one that can be trained further: {', '.join(CONTINUED)}",
               "train from its base model")  # fmt: skip
    if bias != "none":
        yield (
            f"{path}bias: found {bias!r}, expected none: peft holds one adapter with biases, not its copy too",
            MERGE,
        )
    targets = config.get("target_modules") or ()
    ties = config.get("ensure_weight_tying") and (
        isinstance(targets, str) or any(name.split(".")[-1] in TIED for name in targets)
    )
    if (kind == "TRAINABLE_TOKENS" or ties) and tied():
        field = "ensure_weight_tying" if ties else "peft_type"
        yield (
            f"{path}{field}: found {config[field]!r} and a base with tied embeddings: peft holds one such adapter, not "
            "its copy too",
            MERGE,
        )


def _weights_problems(given: Any) -> Iterator[Problem]:
    for name in OTHER_WEIGHTS:
        if isinstance(given, Mapping) and given.get(name) is not None:
            yield (
                f"train.trainer.model_init_kwargs.{name}: found {given[name]!r}, expected none: the tokenizer, the "
                "sampled reference and what is evaluated would be of other weights than the policy",
                "put the wanted weights into a folder and give that as train.model",
            )


def _is_tied(base: str) -> bool:
    from transformers import AutoConfig

    return Path(base).is_dir() and bool(AutoConfig.from_pretrained(base).get_text_config().tie_word_embeddings)


def _raise_first(problems: Iterator[Problem], *, code: str = "adapter") -> None:
    for message, hint in problems:
        raise ConfigError(message, code=code, hint=hint)


@contextmanager
def head_adapter_allowed() -> Iterator[None]:
    """Suspend trl's refusal of an adapter on the head: its own loss passes over one, ``score_tokens`` does not."""
    kind = dpo_trainer.BaseTunerLayer
    dpo_trainer.BaseTunerLayer = _NoLayer
    try:
        yield
    finally:
        dpo_trainer.BaseTunerLayer = kind


class _NoLayer:
    """A class without instances."""
