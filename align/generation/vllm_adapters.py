"""Which adapters vLLM applies as peft does. The others are merged into their base for it where that is exact."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open

from align.errors import ModelError
from align.io.console import log
from align.models.adapter_folders import base_loading, changes_base
from align.models.folders import ADAPTER, adapter_config, is_adapter
from align.models.layout import has_adapter
from align.models.loading import load_merged_policy, load_tokenizer

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts as ``max_lora_rank``."""
APPLIED = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules",
        "layers_to_transform", "layers_pattern", "init_lora_weights", "fan_in_fan_out", "megatron_core",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
    }
)  # fmt: skip
"""Fields of ``peft.LoraConfig`` that vLLM applies, or that only a training reads. One that is not listed has to have
its default."""
IN_A_LAYER = re.compile(r"\.\d+\..*\.lora_[AB]\.weight")
"""Name of a weight of a low-rank update inside a numbered layer; vLLM applies no other kind everywhere."""
ELSEWHERE = "use --engine transformers"


@dataclass(frozen=True, slots=True)
class VllmModel:
    """What vLLM is given for a model."""

    base: str
    """Folder or hub id."""
    options: dict[str, Any]
    """Arguments of ``vllm.LLM`` that the model needs."""
    adapter: str | None = None
    """Folder of a LoRA adapter that vLLM applies itself."""


def served_otherwise(folder: str) -> str | None:
    """What vLLM would leave out or compute otherwise than peft, of an adapter; None if nothing, or for a model.

    vLLM applies low-rank updates of linear layers that have one rank and one scale (rank-stabilized or not). It passes
    over most other fields of an adapter without an error, and some of its weights.

    Raises:
        ModelError: the adapter's configuration cannot be read.
    """
    if not is_adapter(folder):
        return None
    from peft import LoraConfig

    config = adapter_config(folder)
    kind, rank = config.get("peft_type"), int(config.get("r") or 0)
    if kind != "LORA":
        return f"peft_type: {kind}"
    if not 0 < rank <= RANKS[-1]:
        return f"r: {rank}"
    if is_adapter(str(config.get("base_model_name_or_path"))):
        return "an adapter as the base of an adapter"
    if changes_base(config.get("init_lora_weights")):
        return f"init_lora_weights: {config['init_lora_weights']!r}"
    plain = LoraConfig().to_dict()
    for field, value in config.items():
        if field not in APPLIED and value not in (None, False, [], {}, plain.get(field)):
            return f"{field}: {value!r}"
    for file in sorted(Path(folder).glob("adapter_model*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            other = [name for name in weights.keys() if not IN_A_LAYER.search(name)]  # noqa: SIM118 - no mapping
        if other:
            return f"the weight {other[0]}"
    return None


def check_vllm_adapter(model: str) -> None:
    """Refuse an adapter that vLLM can serve neither by itself nor merged, before anything is loaded.

    Raises:
        ModelError: see above; or the adapter's configuration cannot be read.
    """
    if not is_adapter(model):
        return
    config, file = adapter_config(model), Path(model) / ADAPTER
    if base_loading(model):
        raise ModelError(
            f"{file}: it was trained on a quantized base, and vLLM would serve it on another one",
            code="adapter",
            hint=ELSEWHERE,
        )
    unmerged = {"alora_invocation_tokens": config.get("alora_invocation_tokens"),
                "num_virtual_tokens": config.get("num_virtual_tokens")}  # fmt: skip
    for field, value in unmerged.items():
        if value:
            raise ModelError(
                f"{file}: {field}: found {value!r}: vLLM would serve another model, and such an adapter cannot be "
                "merged into its base",
                code="adapter",
                hint=ELSEWHERE,
            )


@contextmanager
def vllm_model(model: str, *, trust_remote_code: bool = False) -> Iterator[VllmModel]:
    """The model that vLLM is to load while this context lasts; an adapter that it would serve otherwise is merged.

    The merged model is in float32, and so is its computation unless ``dtype`` is given: 16 bits can lose an update.

    Args:
        model: folder (an adapter's too) or hub id.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ModelError: vLLM would serve the adapter as another model, and merging it is not exact.
    """
    if not is_adapter(model):
        yield VllmModel(model, {})
        return
    check_vllm_adapter(model)
    reason = served_otherwise(model)
    if reason is None:
        yield _beside_its_base(model)
        return
    log.info("%s: vLLM does not apply %s, so the adapter is merged into its base", model, reason)
    policy = load_merged_policy(model, dtype="float32", trust_remote_code=trust_remote_code)
    if has_adapter(policy):
        raise ModelError(
            f"{Path(model) / ADAPTER}: found {reason}, which vLLM does not apply, and merging the adapter into its "
            "base is not exact",
            code="adapter",
            hint=ELSEWHERE,
        )
    with TemporaryDirectory(prefix="align-merged-") as folder:
        policy.save_pretrained(folder)
        tokenizer = model if (Path(model) / "tokenizer_config.json").exists() else policy.config._name_or_path
        load_tokenizer(tokenizer, trust_remote_code=trust_remote_code).save_pretrained(folder)
        del policy
        yield VllmModel(folder, {"dtype": "float32"})


def _beside_its_base(model: str) -> VllmModel:
    config = adapter_config(model)
    base, revision = str(config["base_model_name_or_path"]), config.get("revision")
    options: dict[str, Any] = {
        "enable_lora": True,
        "max_lora_rank": next(room for room in RANKS if room >= config["r"]),
        "max_loras": 1,
    }
    if revision is not None and not Path(base).is_dir():
        options["revision"] = revision
    return VllmModel(base, options, str(Path(model).absolute()))
