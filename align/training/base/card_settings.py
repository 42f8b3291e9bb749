"""Settings of a training as its model card shows them where they are not the default."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from align.models.adapters import quantization_of

FURTHER = (
    "weight_decay", "warmup_steps", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs",
    "optim_args", "neftune_noise_alpha", "truncation_mode", "turns", "disable_dropout", "sync_ref_model",
    "ref_model_sync_steps", "ref_model_mixup_alpha", "router_aux_loss_coef", "center_rewards_coefficient",
)  # fmt: skip
"""Fields that change what is trained and are shown where they are not the default."""
OF_ADAPTER = ("lora_dropout", "use_rslora", "use_dora", "bias", "modules_to_save", "layers_to_transform")
"""Fields of an adapter's config that are shown where they are set."""
SHOWN_MODULES = 8


def changed_fields(args: Any) -> dict[str, Any]:
    """The fields among ``FURTHER`` that differ from the defaults of their class."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    return {name: getattr(args, name) for name in FURTHER if name in defaults and getattr(args, name) != defaults[name]}


def low_precision(model: nn.Module) -> str:
    """The dtypes of the trained weights other than float32; empty if there is none."""
    kept = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters() if weight.requires_grad}
    return ", ".join(sorted(kept - {"float32", "float64"}))


def precision_of(args: Any, model: nn.Module) -> str:
    """In what a training computes, and in what its weights are kept where that is 16 bits."""
    computed, kept = "bf16" if args.bf16 else "fp16" if args.fp16 else "", low_precision(model)
    if not kept:
        return computed or "float32"
    return f"{computed}, weights in {kept}".removeprefix(", ")


def base_of(model: nn.Module) -> dict[str, str]:
    """How the base of a policy is quantized; empty if it is not."""
    config = quantization_of(model).get("quantization_config")
    if config is None:
        return {}
    bits = next((bits for bits in ("4", "8") if config.get(f"load_in_{bits}bit")), "")
    kind = str(getattr(config.get("quant_method"), "value", config.get("quant_method")))
    return {"base": f"quantized by {kind}{f' to {bits} bits' if bits else ''}"}


def adapter_text(config: Any) -> str:
    """Kind, rank, scale and modules of an adapter, and what else is set, as far as its kind has them."""
    shown = [str(getattr(config.peft_type, "value", config.peft_type))]
    shown += [f"{name}={getattr(config, name)}" for name in ("r", "lora_alpha") if hasattr(config, name)]
    more = {name: getattr(config, name, None) for name in OF_ADAPTER}
    shown += [f"{name}={_text(value)}" for name, value in more.items() if value not in (None, False, 0.0, "none", [])]
    modules = getattr(config, "target_modules", None)
    return " ".join([*shown, f"on {_modules(modules)}"] if isinstance(modules, set | list) else shown)


def _modules(modules: Iterable[str]) -> str:
    """The names of modules; of many, the last part of each name once, and their number."""
    names = sorted(modules)
    if len(names) <= SHOWN_MODULES:
        return ", ".join(names)
    return f"{', '.join(sorted({name.rpartition('.')[2] for name in names}))} ({len(names)} modules)"


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | set | tuple) else str(value)
