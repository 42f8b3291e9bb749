"""What vLLM is given for an adapter: the adapter as it is, a merged model with the same log-probs, or nothing."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from align.commands.generate import GenerateSettings, complete_prompts
from align.data.prompts import PromptRow
from align.errors import ModelError
from align.generation import vllm_engine
from align.generation.types import Sampling
from align.generation.vllm_adapters import VllmModel, check_vllm_adapter, served_otherwise, vllm_model
from align.models.adapter_folders import QUANTIZATION
from align.models.loading import load_policy
from tests.helpers.builders import changed_adapter, make_base

TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LORA: dict[str, Any] = TASK | {"r": 4, "target_modules": ["q_proj", "v_proj"]}
IDS = torch.tensor([[3, 4, 9, 12, 5, 7], [8, 4, 4, 20, 6, 10]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose head is its embedding."""
    return make_base(tmp_path_factory.mktemp("base"), tied=True)


def trained(base: Path, folder: Path, config: Any) -> str:
    return str(changed_adapter(base, folder, config))


def logps(model: str) -> Tensor:
    policy = load_policy(model, dtype="float32").eval()
    with torch.no_grad():
        return policy(input_ids=IDS).logits.log_softmax(-1)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"lora_dropout": 0.1, "init_lora_weights": "gaussian"}])
def test_low_rank_updates_are_served_beside_the_base(fields: dict[str, Any], base: Path, tmp_path: Path) -> None:
    folder = trained(base, tmp_path / "a", LoraConfig(**LORA | fields))
    assert served_otherwise(folder) is None
    with vllm_model(folder) as found:
        options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
        assert found == VllmModel(str(base), options, folder)
    with vllm_model(str(base)) as found:
        assert found == VllmModel(str(base), {})


OTHERWISE: list[tuple[Any, str]] = [
    (LoraConfig(**LORA, use_dora=True), "use_dora: True"),
    (LoraConfig(**LORA, modules_to_save=["lm_head"]), "modules_to_save: ['lm_head']"),
    (LoraConfig(**LORA, trainable_token_indices=[4, 9]), "trainable_token_indices: [4, 9]"),
    (LoraConfig(**LORA, bias="all"), "bias: 'all'"),
    (LoraConfig(**LORA | {"target_modules": ["q_proj", "embed_tokens"]}), "the weight base_model.model.model.embed"),
    (LoraConfig(**LORA | {"target_modules": ["q_proj", "lm_head"]}), "the weight base_model.model.lm_head"),
    (LoraConfig(**LORA, rank_pattern={"q_proj": 2}), "rank_pattern: {'q_proj': 2}"),
    (LoraConfig(**LORA, alpha_pattern={"q_proj": 5}), "alpha_pattern: {'q_proj': 5}"),
    (LoraConfig(**LORA, target_parameters=["mlp.down_proj.weight"]), "target_parameters: "),
    (LoraConfig(**LORA, init_lora_weights="pissa"), "init_lora_weights: 'pissa'"),
    (peft.LoHaConfig(**TASK, r=2, target_modules=["q_proj"]), "peft_type: LOHA"),
    (peft.IA3Config(**TASK, target_modules=["k_proj"], feedforward_modules=[]), "peft_type: IA3"),
]


@pytest.mark.parametrize(("config", "reason"), OTHERWISE, ids=[reason for _, reason in OTHERWISE])
def test_what_vllm_serves_otherwise_is_merged(config: Any, reason: str, base: Path, tmp_path: Path) -> None:
    folder = trained(base, tmp_path / "a", config)
    assert str(served_otherwise(folder)).startswith(reason)
    expected = logps(folder)
    with vllm_model(folder) as found:
        assert found.adapter is None and found.options == {"dtype": "float32"}
        files = {file.name for file in Path(found.base).iterdir()}
        assert "tokenizer.json" in files and "adapter_config.json" not in files
        assert float((logps(found.base) - expected).abs().max()) < 1e-5
        assert float((logps(str(base)) - expected).abs().max()) > 1e-3
    assert not Path(found.base).exists()


def test_what_cannot_be_merged_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    biased = trained(base, tmp_path / "b", LoraConfig(**LORA, lora_bias=True))
    with pytest.raises(ModelError, match="lora_bias: True, which vLLM does not apply") as error, vllm_model(biased):
        pass
    assert error.value.code == "adapter" and "--engine transformers" in str(error.value.hint)


def test_it_is_refused_before_anything_loads(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    activated = trained(base, tmp_path / "a", LoraConfig(**LORA, alora_invocation_tokens=[9]))
    prompted = trained(base, tmp_path / "p", peft.PromptTuningConfig(**TASK, num_virtual_tokens=3))
    quantized = trained(base, tmp_path / "q", LoraConfig(**LORA))
    (tmp_path / "q" / QUANTIZATION).write_text(json.dumps({"quantization_config": {"load_in_4bit": True}}))
    monkeypatch.setattr("align.commands.generate.choose_engine", lambda *_, **__: ("vllm", "as asked"))
    for folder, message in (
        (activated, r"alora_invocation_tokens: found \[9\]"),
        (prompted, "num_virtual_tokens: found 3"),
        (quantized, "trained on a quantized base"),
    ):
        with pytest.raises(ModelError, match=message) as error:
            check_vllm_adapter(folder)
        assert error.value.code == "adapter"
        settings = GenerateSettings(folder, Sampling(4))
        with pytest.raises(ModelError, match=message):
            complete_prompts([PromptRow("a", "the film", None)], "prompts", settings, tmp_path / "out")


def test_the_engine_loads_what_it_is_given(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself is a stand-in that keeps what it is asked to load."""
    loaded: list[tuple[float, dict[str, Any]]] = []
    folder = trained(base, tmp_path / "a", LoraConfig(**LORA, use_dora=True))
    expected = logps(folder)

    def load(model: str, **options: Any) -> None:
        loaded.append((float((logps(model) - expected).abs().max()), options))

    platform = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: False))
    stand_in = SimpleNamespace(exceptions=SimpleNamespace(), platforms=platform, LLM=load)
    monkeypatch.setattr(vllm_engine, "import_vllm", lambda: stand_in)
    engine = vllm_engine.VllmEngine(folder)
    ((difference, options),) = loaded
    assert difference < 1e-5 and options["dtype"] == "float32" and "enable_lora" not in options
    assert engine.adapter is None
