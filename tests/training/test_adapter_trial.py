"""An adapter that does not fit its model is refused when the run is checked, before the model's weights load."""

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig

from align import PreferenceConfig, PreferenceTrainer
from align.errors import ConfigError
from align.run.checks import check_train
from align.training.adapters import check_reward_adapter
from align.training.model_arguments import check_model_arguments
from tests.helpers.builders import make_base, rows
from tests.training.test_adapters import LAYERS, section


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), tied=True)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"r": 0}, "`r` should be a positive integer"),
        ({"r": "8"}, "not supported between instances of 'str' and 'int'"),
        ({"lora_dropout": 2}, "dropout probability has to be between 0 and 1"),
        ({"target_modules": ["zz"]}, "Target modules {'zz'} not found"),
        ({"target_modules": []}, "No `target_modules` passed"),
        ({"target_modules": ["input_layernorm"]}, "is not supported"),
        ({"layers_to_transform": [7]}, "not found in the base model"),
        ({"runtime_config": {"ephemeral_gpu_offload": True}}, "'dict' object has no attribute"),
        ({"init_lora_weights": "gausian"}, "gausian"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "rank to be even"),
        ({"trainable_token_indices": [99]}, r"trainable_token_indices: found 99, expected a list of ids from 0 to 20"),
        ({"trainable_token_indices": {"lm_head": [-1]}}, r"trainable_token_indices: found -1, expected a list of ids"),
        ({"trainable_token_indices": 5}, r"trainable_token_indices: found 5, expected a list of ids"),
    ],
)
def test_what_does_not_fit_the_model(base: Path, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.peft.*{told}") as error:
        check_model_arguments(section(base, LAYERS | fields))
    assert error.value.code == "adapter"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"lora_alpha": 0}, r"lora_alpha: found 0, .* nothing would be trained"),
        ({"revision": "v2"}, r"revision: found 'v2', expected none"),
        ({"peft_type": "IA3"}, r"peft_type: found 'IA3', expected none"),
        ({"base_model_name_or_path": "elsewhere"}, r"base_model_name_or_path: found 'elsewhere'"),
    ],
)
def test_what_trains_nothing_or_names_another_base(base: Path, fields: dict[str, Any], told: str) -> None:
    """The adapter had no effect, or its folder would have been loaded on other weights than it was trained on."""
    with pytest.raises(ConfigError, match=rf"train\.peft\.{told}"):
        check_train(section(base, LAYERS | fields), {"output_dir": "unused"})


def test_an_adapter_of_a_reward_model_trains_something() -> None:
    with pytest.raises(ConfigError, match=r"reward\.peft\.lora_alpha: found 0"):
        check_reward_adapter({"r": 2, "lora_alpha": 0})
    check_reward_adapter({"r": 2, "lora_alpha": 4})


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "mica"}, {"init_lora_weights": "orthogonal"}, {"target_modules": "all-linear"},
        {"target_modules": r".*\.q_proj"}, {"trainable_token_indices": {"lm_head": [20, 0]}},
        {"target_modules": [], "target_parameters": ["mlp.down_proj.weight"]}, {"use_dora": True},
        {"rank_pattern": {"^model.layers.0.*q_proj": 3}, "modules_to_save": ["lm_head"]},
    ],
)  # fmt: skip
def test_what_fits_passes(base: Path, fields: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    check_model_arguments(section(base, LAYERS | fields))
    assert "passed over" not in caplog.text


def test_names_that_no_module_has_are_told(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = {"target_modules": ["q_proj", "wq"], "modules_to_save": ["score"], "alpha_pattern": {"wv": 3, "q_proj": 2}}
    with caplog.at_level(logging.WARNING):
        check_model_arguments(section(base, LAYERS | fields))
    told = [record.message for record in caplog.records if "no module of the model is called" in record.message]
    assert [line.split(", which")[0].rsplit(" ", 1)[1] for line in told] == ["wq", "score", "wv"]


def test_an_adapter_that_starts_with_no_numbers_is_refused(base: Path, tmp_path: Path) -> None:
    """DoRA divides by the norm of each row; that of the padding token of a tied embedding is 0."""
    args = PreferenceConfig(str(tmp_path), report_to="none", bf16=False, max_length=64)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], use_dora=True)
    with pytest.raises(ConfigError, match="of the kind LORA: with it the model gives log-probs that are no numbers"):
        PreferenceTrainer(str(base), args=args, train_dataset=Dataset.from_list(rows(4)), peft_config=config)
