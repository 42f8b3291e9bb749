"""A policy that is trained on a quantized base is sampled, evaluated and measured on that base, or refused.

The quantizer here is a stand-in that rounds the weights of linear layers far more than bitsandbytes does.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from align.config import RunConfig
from align.entanglement.measure import MeasureJob
from align.errors import ConfigError
from align.evaluation.policies import Policy, find_reference
from align.io.console import log
from align.losses.registry import resolve
from align.models.adapter_folders import FIRST_ADAPTER, QUANTIZATION, base_loading, is_quantized
from align.models.adapters import copy_adapter
from align.models.loading import load_merged_policy, load_policy, load_tokenizer
from align.run.pipeline import _Runner
from align.run.stages.policy import stage_trust
from align.run.stages.sampling import run_sampling
from align.training.adapters import check_merges
from align.trust.features import pair_features
from tests.helpers.builders import make_base, rows, trained_adapter
from tests.training.test_adapters import (
    CLOSE,
    LAYERS,
    TRAINER,
    completions,
    difference,
    measured_like,
    plain,
    section,
    train,
)

STEP = 0.05
"""Weights are rounded to multiples of this."""
GIVEN = {"quantization_config": {"load_in_8bit": True, "quant_method": "bitsandbytes"}}


@pytest.fixture(autouse=True)
def quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """``from_pretrained`` with a quantizer that needs no bitsandbytes."""
    real = AutoModelForCausalLM.from_pretrained

    def load(*args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        if quantization_config is not None:
            assert quantization_config == GIVEN["quantization_config"]
            own = SimpleNamespace(to_dict=lambda: dict(quantization_config))
            model.hf_quantizer = SimpleNamespace(pre_quantized=False, is_trainable=True, quantization_config=own)
            with torch.no_grad():
                for module in model.modules():
                    if isinstance(module, nn.Linear):
                        module.weight.copy_((module.weight / STEP).round() * STEP)
        return found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr("align.training.base.settings._has", lambda package: True)


def quantized(base: Path, **more: Any) -> Any:
    return section(base, LAYERS, trainer=TRAINER | {"model_init_kwargs": GIVEN | more})


def test_a_quantized_policy_is_one_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is trained further from it, without another word about the quantization."""
    base = make_base(tmp_path / "base", tied=False)
    start = plain(load_policy(str(base), dtype="float32", **GIVEN))
    assert difference(start, plain(load_policy(str(base), dtype="float32"))) > 1e-2
    trainer, reference = train(quantized(base), tmp_path / "out", monkeypatch)
    assert difference(reference, completions(start).sum(dim=1)) < 10 * CLOSE
    trained, folder = plain(trainer.model), tmp_path / "out" / "model"
    for load in (load_policy, load_merged_policy):
        assert difference(plain(load(str(folder), dtype="float32")), trained) < CLOSE
    measured_like(str(folder), trained, completions(start))
    trainer, reference = train(section(folder, None), tmp_path / "further", monkeypatch)
    further = tmp_path / "further" / "model"
    assert difference(plain(load_policy(str(further), dtype="float32")), plain(trainer.model)) < CLOSE
    measured_like(str(further), plain(trainer.model), completions(trained))


def test_the_base_is_loaded_in_its_dtype_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding to 16 bits comes before quantizing, so it belongs to the quantized base."""
    base = make_base(tmp_path / "base", tied=False)
    train(quantized(base, dtype="bfloat16"), tmp_path / "out", monkeypatch)
    folder = str(tmp_path / "out" / "model")
    assert base_loading(folder) == {"dtype": "bfloat16"} | GIVEN and is_quantized(folder)
    assert load_policy(folder, dtype="float32").get_base_model().dtype == torch.bfloat16


def test_an_adapter_on_a_quantized_base_computes_as_it_was_trained(tmp_path: Path) -> None:
    """In 16 bits, but for DoRA's magnitudes; in float32, as peft loads it, its log-probs are others."""
    base = make_base(tmp_path / "base", tied=False)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], use_dora=True)
    policy = get_peft_model(load_policy(str(base), dtype="float32", **GIVEN), lora)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:  # as trl.DPOTrainer does
            parameter.data = (parameter.data + 0.1 * torch.randn_like(parameter)).to(torch.bfloat16)
    folder = str(tmp_path / "adapter")
    policy.save_pretrained(folder)
    wanted = {name: parameter.dtype for name, parameter in policy.named_parameters()}
    assert set(wanted.values()) == {torch.float32, torch.bfloat16}
    loaded = {name: parameter.dtype for name, parameter in load_policy(folder, dtype="float32").named_parameters()}
    assert set(loaded.values()) == {torch.float32}, "a base in full precision"
    (Path(folder) / QUANTIZATION).write_text(json.dumps(GIVEN))
    for trainable in (False, True):
        policy = load_policy(folder, dtype="float32", trainable=trainable)
        assert {name: parameter.dtype for name, parameter in policy.named_parameters()} == wanted
    policy.add_adapter(FIRST_ADAPTER, policy.peft_config["default"])
    copy_adapter(policy, "default", FIRST_ADAPTER)
    copied = {
        n.replace(f".{FIRST_ADAPTER}.", ".default."): p for n, p in policy.named_parameters() if FIRST_ADAPTER in n
    }
    assert copied and all(parameter.dtype == wanted[name] for name, parameter in copied.items())


@pytest.mark.parametrize(("bits", "threshold", "told"), [(8, 6.0, True), (8, 0.0, False), (4, 6.0, False)])
def test_log_probs_that_depend_on_the_batch_are_told(
    bits: int, threshold: float, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured with bitsandbytes: a row alone and in a batch differ by 0.07 nats at 6, and by 0.0 at 0."""
    base, load = str(make_base(tmp_path / "base", tied=False)), AutoModelForCausalLM.from_pretrained

    def marked(*args: Any, **kwargs: Any) -> Any:
        found = load(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        if model.__dict__.get("hf_quantizer") is not None:
            model.hf_quantizer.quantization_config.llm_int8_threshold = threshold
            setattr(model, f"is_loaded_in_{bits}bit", True)
        return found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", marked)
    said: list[str] = []
    monkeypatch.setattr(log, "warning", lambda text, *values: said.append(text % values))
    load_policy(base, dtype="float32")
    assert not said, "not quantized"
    for _ in range(2):
        load_policy(base, dtype="float32", **GIVEN)
    assert len(said) == told and all("llm_int8_threshold 6" in text and base in text for text in said)


def test_a_run_samples_and_evaluates_on_the_quantized_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film"}\n')
    tree = {
        "name": "r", "output_dir": str(tmp_path), "pairs": {"path": str(tmp_path / "pairs.jsonl")},
        "evaluate": {"prompts": str(tmp_path / "prompts.jsonl"), "judge": "vader"},
        "train": quantized(base).model_dump(),
    }  # fmt: skip
    config = RunConfig.model_validate(tree)
    assert config.evaluate is not None and config.train is not None
    assert run_sampling(config, config.evaluate).options == {"dtype": "float32"} | GIVEN
    inputs = _Runner(config, tmp_path)._inputs("generate-m")
    assert (
        inputs["quantization"]
        == {"dtype": "float32"} | GIVEN
        == _Runner(config, tmp_path)._inputs("trust")["quantization"]
    )
    config.train.trainer.pop("model_init_kwargs")
    assert run_sampling(config, config.evaluate).options == {}
    assert not any("quantization" in _Runner(config, tmp_path)._inputs(name) for name in ("generate-m", "trust"))


def test_a_reference_in_full_precision_is_not_taken_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", tied=False)
    folder = trained_adapter(base, tmp_path / "adapter", 1)
    policy = Policy("a", str(folder))
    assert find_reference([policy], None).model == str(base)
    (folder / QUANTIZATION).write_text('{"quantization_config": {"load_in_4bit": true}}')
    with pytest.raises(ConfigError, match=r"--reference: needed, .* in quantized form"):
        find_reference([policy], None)
    said: list[str] = []
    monkeypatch.setattr(log, "warning", lambda text, *values: said.append(text % values))
    assert find_reference([policy], str(base)).model == str(base)
    assert said == [f"--reference {base} is not quantized, but the base that {folder} was trained on is"]


def test_rounds_do_not_start_from_a_quantized_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    with pytest.raises(ConfigError, match="model_init_kwargs: found a quantized base, expected one that is not"):
        check_merges(quantized(base))
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    with pytest.raises(ConfigError, match=r"train\.model: found a quantized base"):
        check_merges(section(base, LAYERS))


def test_the_job_of_the_command_measures_on_the_quantized_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    folder = trained_adapter(base, tmp_path / "adapter", 1)
    job = MeasureJob(str(folder), None, resolve("dpo", {}), None, 2048, 64)
    full = plain(job.start().products.model)  # type: ignore[attr-defined]
    (folder / QUANTIZATION).write_text(json.dumps(GIVEN))
    assert difference(plain(job.start().products.model), full) > 1e-2  # type: ignore[attr-defined]


def test_trust_reads_the_hidden_states_of_the_quantized_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an adapter's own base, and of the model of a run; both are the features of the rounded weights."""
    base, pairs = make_base(tmp_path / "base", tied=False), Dataset.from_list(rows(4))
    rounded = tmp_path / "rounded"
    model = load_policy(str(base), dtype="float32", **GIVEN)
    model.hf_quantizer = None
    model.save_pretrained(rounded)
    load_tokenizer(str(base)).save_pretrained(rounded)

    def features(model: Path, name: str, **loading: Any) -> np.ndarray:
        return pair_features(pairs, str(model), tmp_path / name, max_length=64, loading=loading)

    expected = features(rounded, "expected")
    assert np.abs(features(base, "full") - expected).max() > 1e-3
    assert np.allclose(features(base, "loaded", **GIVEN), expected, atol=1e-6)
    folder = trained_adapter(base, tmp_path / "adapter", 1)
    full = features(folder, "adapter-full")
    (folder / QUANTIZATION).write_text(json.dumps(GIVEN))
    assert np.abs(features(folder, "adapter") - full).max() > 1e-3

    tree = {"name": "r", "output_dir": str(tmp_path), "pairs": {"path": "p"}, "train": quantized(base).model_dump()}
    given: list[Any] = []

    def measure(*args: Any, loading: Any, **kwargs: Any) -> Any:
        given.append(loading)
        raise InterruptedError

    monkeypatch.setattr("align.run.stages.policy.read_pairs", lambda table: pairs)
    monkeypatch.setattr("align.run.stages.policy.margin_source", lambda *given: "outside")
    monkeypatch.setattr("align.run.stages.policy.check_margins", lambda *given, **kwargs: None)
    monkeypatch.setattr("align.run.stages.policy.measure_trust", measure)
    with pytest.raises(InterruptedError):
        stage_trust(RunConfig.model_validate(tree), tmp_path / "trust")
    assert given == [{"dtype": "float32"} | GIVEN]
