"""What an adapter folder says about the models it belongs to: what it was trained from, and on which kind of base."""

from pathlib import Path
from typing import Any

from safetensors import safe_open

from align.io.files import read_json
from align.models.folders import CONFIG, adapter_base, adapter_config, is_adapter

FIRST_ADAPTER = "ref"
"""Name of the adapter that a training started from, and of its folder inside the trained adapter (trl's)."""
QUANTIZATION = "base_loading.json"
"""File of an adapter: how its base was quantized in training, as arguments of ``from_pretrained``."""
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Prefixes of ``init_lora_weights`` values that subtract the adapter's start from the base weights."""


def changes_base(init: object) -> bool:
    """Whether an ``init_lora_weights`` subtracts the adapter's start from the base weights."""
    return isinstance(init, str) and init.lower().startswith(CHANGES_THE_BASE)


def adapter_start(folder: str) -> str | None:
    """The model that the adapter in ``folder`` was trained from, where it is not the model with the adapter off.

    It is the adapter from which the training started, of which trl keeps a copy inside the trained one. It is the base
    model where turning the adapter off does not give the base back: trained biases stay, and so does what an
    initialization subtracted from the base weights.

    Returns:
        A folder or hub id; None for a model without adapter, and where turning the adapter off is enough.

    Raises:
        ModelError: the adapter's configuration cannot be read.
    """
    if not is_adapter(folder):
        return None
    first = Path(folder) / FIRST_ADAPTER
    if is_adapter(first):
        return str(first)
    config = adapter_config(folder)
    if config.get("bias", "none") != "none" or changes_base(config.get("init_lora_weights")):
        return adapter_base(folder)
    return None


def base_loading(folder: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` with which the base of an adapter was quantized in its training; else none."""
    for place in (Path(folder), Path(folder).parent):  # the first adapter lies in the folder of the trained one
        if (place / QUANTIZATION).exists() and is_adapter(place):
            found: dict[str, Any] = read_json(place / QUANTIZATION)
            return found
    return {}


def is_quantized(model: str) -> bool:
    """Whether the weights in a model folder, or the base of an adapter, are quantized; False for a hub id."""
    if is_adapter(model):
        return bool(base_loading(model)) or is_quantized(str(adapter_base(model)))
    config = Path(model) / CONFIG
    return config.is_file() and "quantization_config" in read_json(config)


def saved_dtypes(folder: str) -> dict[str, str]:
    """Name of a weight in an adapter folder -> its dtype, as safetensors writes it (``BF16``)."""
    found: dict[str, str] = {}
    for file in sorted(Path(folder).glob("adapter_model*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            found |= {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 - no mapping
    return found
