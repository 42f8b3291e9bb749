"""Fields of the trainer that depend on the model's configuration are refused before its weights load."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig
from trl import DPOConfig

from align import PreferenceConfig, PreferenceTrainer
from align.config import TrainSection
from align.errors import ConfigError, ModelError
from align.models.loading import load_policy
from align.training.base.arguments import build_trainer_args
from align.training.base.settings import tell_of_one_process
from align.training.model_arguments import check_model_arguments
from tests.helpers.builders import causal, rows, trained_adapter


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
        {"local_files_only": True}, {"use_cache": False}, {"dtype": "float32"},
    ):  # fmt: skip
        check_model_arguments(section(model, model_init_kwargs=keys))
        AutoModelForCausalLM.from_pretrained(model, **keys)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_init_kwargs": {"dtype": "int8"}}, "model_init_kwargs.dtype: found 'int8', expected a dtype"),
        ({"model_init_kwargs": {"dtype": 32}}, "model_init_kwargs.dtype: found 32, expected a dtype"),
        ({"model_init_kwargs": {"attn_implementation": 7}}, "attn_implementation: found 7, expected one of eager"),
        ({"model_init_kwargs": {"ignore_mismatched_sizes": True}}, "weights that do not fit are drawn at random"),
        ({"model_init_kwargs": "float32"}, "found 'float32', expected a mapping from names to values"),
        ({"model_init_kwargs": []}, r"found \[\], expected a mapping from names to values"),
        ({"model_init_kwargs": {1: 2}}, "found {1: 2}, expected a mapping from names to values"),
        ({"optim_args": 3}, "optim_args: found 3, expected text"),
        ({"liger_kernel_config": "all"}, "liger_kernel_config: found 'all', expected a mapping"),
        ({"parallelism_config": "tp"}, "parallelism_config: found 'tp', expected ParallelismConfig"),
        ({"debug": 3}, "debug: found 3, expected a list or text"),
        ({"accelerator_config": "nowhere.json"}, "no such file: nowhere.json"),
    ],
)
def test_values_of_another_kind(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    """They ended in a traceback, or while the model was loading, or drew weights."""
    with pytest.raises(ConfigError, match=rf"(?s)\[trainer-key\].*{message}"):
        build_trainer_args(DPOConfig, fields, path="x.trainer", forced={"output_dir": str(tmp_path)})


@pytest.mark.parametrize(("name", "value"), [("fsdp", False), ("include_for_metrics", []), ("report_to", ["none"])])
def test_values_of_the_kinds_that_transformers_takes(name: str, value: Any, tmp_path: Path) -> None:
    build_trainer_args(DPOConfig, {name: value}, path="x.trainer", forced={"output_dir": str(tmp_path)})


def test_float16_that_a_launcher_asks_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ConfigError, match="fp16: found it in ACCELERATE_MIXED_PRECISION"):
        build_trainer_args(DPOConfig, {"use_cpu": True}, path="x", forced={"output_dir": str(tmp_path)})


def test_a_launcher_that_starts_one_process_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``accelerate launch --cpu --num_processes 2`` does; these are the variables that it sets."""
    told = "accelerate was asked for several processes and has started one"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    for name, value, expected in (("MASTER_ADDR", "127.0.0.1", 0), ("MASTER_PORT", "29500", 1), ("WORLD_SIZE", "1", 1)):
        monkeypatch.setenv(name, value)
        tell_of_one_process.cache_clear()
        build_trainer_args(DPOConfig, {}, path="x", forced={"output_dir": str(tmp_path)})
        assert caplog.text.count(told) == expected
    tell_of_one_process.cache_clear()


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


def test_values_that_make_another_model_are_refused(tmp_path: Path) -> None:
    """The saved adapter, and what samples and evaluates, would be on the weights as config.json reads them."""
    model = causal(tmp_path / "model")
    for keys in ({"num_hidden_layers": 1}, {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
                 {"tie_word_embeddings": True}, {"max_position_embeddings": 16}):  # fmt: skip
        (name,) = keys
        with pytest.raises(
            ConfigError, match=rf"model_init_kwargs\.{name}: found .* in the configuration of the model"
        ):
            check_model_arguments(section(model, model_init_kwargs=keys))
    check_model_arguments(section(model, model_init_kwargs={"num_hidden_layers": 2, "attention_dropout": 0.5}))


def test_an_adapter_made_in_python_has_the_base_of_its_folder(tmp_path: Path) -> None:
    """A full training saves its configuration, an adapter does not."""
    model = str(causal(tmp_path / "model"))
    args = PreferenceConfig(
        str(tmp_path / "out"), report_to="none", bf16=False, max_length=64, model_init_kwargs={"num_hidden_layers": 1}
    )
    pairs = Dataset.from_list(rows(4))
    full = PreferenceTrainer(model, args=args, train_dataset=pairs)
    assert full.model.config.num_hidden_layers == 1
    with pytest.raises(ConfigError, match=r"PreferenceConfig\.model_init_kwargs\.num_hidden_layers: found 1, and 2"):
        PreferenceTrainer(model, args=args, train_dataset=pairs, peft_config=LoraConfig(task_type="CAUSAL_LM"))


def test_weights_are_never_drawn_at_random(tmp_path: Path) -> None:
    """Neither those of other shapes, nor those that the base of an adapter lacks."""
    base = causal(tmp_path / "base")
    with pytest.raises(ModelError, match=r"has no weights .* more, so it is not a causal language model"):
        load_policy(str(base), ignore_mismatched_sizes=True, intermediate_size=48)
    adapter = trained_adapter(base, tmp_path / "adapter", 0)
    config = (base / "config.json").read_text()
    AutoModelForCausalLM.from_pretrained(base).model.save_pretrained(base)
    (base / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"base: has no weights lm_head\.weight"):
        load_policy(str(adapter))
