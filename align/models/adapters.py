"""What holds of every adapter: whether it can be merged, copied as a reference, or trained on from its folder."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import ConfigError
from align.io.console import log
from align.models.adapter_folders import FIRST_ADAPTER, changes_base
from align.models.layout import base_model, has_adapter, is_bypassed

TRIAL_ROWS, TRIAL_TOKENS = 2, 16
TOLERANCE = {torch.float32: 5e-3, torch.float64: 1e-8}
"""Difference of log-probs (nats) that rounding explains, by the dtype of the base; 16 bits are never merged."""
COPY_TOLERANCE = 0.05
"""The same between two copies of an adapter in 16 bits."""


def merge_adapter(policy: nn.Module) -> nn.Module | None:
    """Merge the adapter of a policy into its base; the base model, or None where the result would be another policy.

    A head that shares its weight with the input embedding gets its own where the adapter changes only one of the two;
    the merged model then says ``tie_word_embeddings: false``. In 16 bits nothing is merged, since rounding the sum of
    a weight and its update can lose the update; nor is a quantized base.

    The policy is used up in any case: load it again where the answer is None.

    Args:
        policy: a model with a PEFT adapter.
    """
    base = base_model(policy)
    if base.dtype not in TOLERANCE or getattr(base, "is_quantized", False) or is_bypassed(policy):
        return None
    training = policy.training
    policy.eval()
    ids = trial_ids(policy)
    expected = _logps(policy, ids)
    tied = _untie_head(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns of is checked below
            merged: nn.Module = policy.merge_and_unload()  # type: ignore[operator]
    except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        log.debug("merging an adapter", exc_info=True)
        log.info("the adapter is not merged (%s)", (str(error).splitlines() or [type(error).__name__])[0])
        return None
    if tied:
        _tie_again(merged)
    difference = float((_logps(merged, ids) - expected).abs().max())
    if not difference <= TOLERANCE[base.dtype]:
        log.info("the adapter is not merged: merging would change its log-probs by up to %.2g nats", difference)
        return None
    return merged.train(training)


def trial_ids(policy: nn.Module) -> Tensor:
    """Token ids [2, T] for a trial: random ones, with those that the adapter treats by itself among them."""
    vocabulary = base_model(policy).get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (TRIAL_ROWS, TRIAL_TOKENS), generator=torch.Generator().manual_seed(0))
    for adapter in policy.peft_config.values() if has_adapter(policy) else ():  # type: ignore[operator]
        own = _own_tokens(adapter)
        if own:
            ids[0, : len(own)] = torch.tensor(own)
    return ids.to(next(policy.parameters()).device)


def quantization_of(policy: nn.Module) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantize the base of a policy as it is; none if it is not quantized.

    Nor are there any for weights that were saved quantized.
    """
    base: Any = base_model(policy)
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized:
        return {}
    dtype = getattr(base.config, "dtype", None) or base.dtype
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": quantizer.quantization_config.to_dict(),
    }


def starts_from_adapter(policy: nn.Module) -> bool:
    """Whether the policy started as a trained adapter; the reference is then trl's frozen copy of it."""
    return has_adapter(policy) and FIRST_ADAPTER in policy.peft_config  # type: ignore[operator]


def stays_when_off(policy: nn.Module) -> str | None:
    """The field of an adapter with which the model is not its base when the adapter is off; None if there is none."""
    for adapter in policy.peft_config.values() if has_adapter(policy) else ():  # type: ignore[operator]
        if getattr(adapter, "bias", "none") != "none":
            return f"bias: {adapter.bias!r}"
        if changes_base(getattr(adapter, "init_lora_weights", True)):
            return f"init_lora_weights: {adapter.init_lora_weights!r}"
    return None


@contextmanager
def adapter_of_the_start(policy: nn.Module) -> Iterator[None]:
    """Turn a policy into the model that its adapter was trained from: the adapter off, or the one it started from.

    Which parameters require gradients stays as it is.
    """
    trained = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    active = policy.active_adapter
    try:
        if starts_from_adapter(policy):
            policy.set_adapter(FIRST_ADAPTER)  # type: ignore[operator]
            yield
        else:
            with policy.disable_adapter():  # type: ignore[operator]
                yield
    finally:
        policy.set_adapter(active)  # type: ignore[operator]
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(trained[name])


def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Make one adapter of a model an exact copy of another of the same configuration.

    The copy has the same dtypes. Every parameter and buffer counts whose name has the adapter's among its parts, at its
    end too (``ia3_l.default``, ``lora_embedding_A.default``).

    Raises:
        ConfigError: the copy computes something else, so it has a state that is not in its tensors.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, value in tensors.items():
            parts = name.split(".")
            copied = tensors.get(".".join(target if part == source else part for part in parts))
            if source in parts and copied is not None:
                copied.data = value.detach().clone()  # in its dtype, which may not be the one peft has made it in
    ids, training = trial_ids(model), model.training
    model.eval()
    found = []
    for name in (target, source):
        model.set_adapter(name)  # type: ignore[operator]
        found.append(_logps(model, ids))
    model.train(training)  # the source is active, and takes gradients again
    difference = float((found[0] - found[1]).abs().max())
    if not difference <= TOLERANCE.get(base_model(model).dtype, COPY_TOLERANCE):
        raise ConfigError(
            f"train.model: a copy of its adapter, the reference, has log-probs that differ by {difference:.2g} nats",
            code="adapter-start",
            hint="merge the adapter into its base model and train from that",
        )


def _own_tokens(adapter: Any) -> list[int]:
    """The tokens that an adapter trains or waits for, as many as a trial has room for."""
    indices = getattr(adapter, "trainable_token_indices", None) or getattr(adapter, "token_indices", None) or []
    groups = indices.values() if isinstance(indices, Mapping) else [indices]
    found = [token for group in groups for token in group]
    return (list(getattr(adapter, "alora_invocation_tokens", None) or ()) + found)[:TRIAL_TOKENS]


@torch.no_grad()
def _logps(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probs [2, T, V] of every token at every place of ``ids``, float64."""
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[:, -ids.shape[1] :].double().log_softmax(dim=-1)


def _untie_head(base: nn.Module) -> bool:
    """Give a head that shares its weight with the embedding its own, where an adapter is on one of them."""
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()  # type: ignore[operator]
    if head is None or not (list(head.children()) or list(embedding.children())):
        return False
    shared = {id(parameter) for parameter in embedding.parameters()} & {id(own) for own in head.parameters()}
    own: dict[int, nn.Parameter] = {}
    for module in head.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in shared:
                copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                module._parameters[name] = own.setdefault(id(parameter), copied)
    return bool(shared)


def _tie_again(model: nn.Module) -> None:
    """Tie head and embedding where merging has left them equal, and say in the configuration what they are."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    equal = torch.equal(head.weight, embedding.weight)
    if equal:
        head.weight = embedding.weight
    config: Any = model.config
    for one in (config, config.get_text_config()):
        one.tie_word_embeddings = equal
