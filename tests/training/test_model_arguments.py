"""Fields of the trainer that depend on the model's configuration are refused before its weights load."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from align.config import TrainSection
from align.errors import ConfigError
from align.training.model_arguments import check_model_arguments
from tests.helpers.builders import causal


def section(model: Path, **trainer: Any) -> TrainSection:
    return TrainSection.model_validate({"model": str(model), "methods": {"dpo": {"loss": "dpo"}}, "trainer": trainer})


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder


def test_keys_that_nothing_reads_are_refused_with_the_nearest(tmp_path: Path) -> None:
    llama = saved(LlamaConfig(), tmp_path)
    with pytest.raises(ConfigError, match=r"neither an argument .* LlamaConfig \(did you mean `attn_i"):
        check_model_arguments(section(llama, model_init_kwargs={"attn_implementaton": "sdpa"}))
    with pytest.raises(ConfigError, match=r"model_init_kwargs\.attention_dropuot"):
        check_model_arguments(section(llama, model_init_kwargs={"attention_dropuot": 0.1}))


def test_keys_that_transformers_reads_pass(tmp_path: Path) -> None:
    """Each is also given to from_pretrained, which takes it."""
    model = causal(tmp_path / "model")
    for keys in (
        {"attn_implementation": "eager"}, {"attention_dropout": 0.1}, {"device_map": None}, {"low_cpu_mem_usage": True},
        {"ignore_mismatched_sizes": True}, {"local_files_only": True}, {"use_cache": False}, {"dtype": "float32"},
    ):  # fmt: skip
        check_model_arguments(section(model, model_init_kwargs=keys))
        AutoModelForCausalLM.from_pretrained(model, **keys)


def test_experts(tmp_path: Path) -> None:
    dense, experts = saved(LlamaConfig(), tmp_path / "dense"), saved(MixtralConfig(), tmp_path / "experts")
    check_model_arguments(section(experts, router_aux_loss_coef=0.1))
    check_model_arguments(section(experts))
    check_model_arguments(section(dense))
    check_model_arguments(section(dense, router_aux_loss_coef=0.0))
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef: found 0\.1, and a LlamaConfig is"):
        check_model_arguments(section(dense, router_aux_loss_coef=0.1))


def test_a_model_of_the_hub_is_left_to_its_loading() -> None:
    check_model_arguments(section(Path("nobody/nothing"), router_aux_loss_coef=0.1))
