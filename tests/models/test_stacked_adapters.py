"""An adapter whose base is an adapter: what is loaded is the base with both, or nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from align.entanglement.measure import load_reference
from align.errors import ModelError
from align.generation.vllm_adapters import served_otherwise
from align.models.adapters import adapter_of_the_start
from align.models.loading import load_merged_policy, load_policy
from tests.helpers.builders import causal, tokenizer, trained_adapter

IDS = torch.tensor([[4, 5, 6, 7, 8, 9, 3, 12]])
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


@torch.no_grad()
def logps(model: Any) -> Tensor:
    """Log-probs of every token after every token, float64."""
    found: Tensor = model.eval()(input_ids=IDS).logits.double().log_softmax(-1)
    return found


def stacked(folder: Path) -> tuple[Path, Tensor, Tensor]:
    """An adapter that was trained on a merged adapter and names that one as its base.

    Returns its folder, its log-probs, and those of the merged adapter.
    """
    first = trained_adapter(causal(folder / "base"), folder / "first", 1)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32")
    merged: Any = PeftModel.from_pretrained(base, first).merge_and_unload()  # type: ignore[operator]
    start = logps(merged)
    torch.manual_seed(2)
    trained = get_peft_model(merged, LORA)
    trained.save_pretrained(folder / "second")
    tokenizer().save_pretrained(folder / "second")
    names_base(folder / "second", first)
    return folder / "second", logps(trained), start


def names_base(adapter: Path, base: Path | str) -> None:
    """Write another base into the configuration of an adapter."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))


def test_both_adapters_act(tmp_path: Path) -> None:
    """transformers puts the first into the base under the name that peft gives the second, which replaced it."""
    second, expected, start = stacked(tmp_path)
    for load in (load_policy, load_merged_policy):
        torch.testing.assert_close(logps(load(str(second), dtype="float32")), expected, rtol=0, atol=1e-4)
    policy = load_policy(str(second), dtype="float32", trainable=True)
    assert load_reference(str(second)) is None
    with adapter_of_the_start(policy):
        torch.testing.assert_close(logps(policy), start, rtol=0, atol=1e-4)


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    second, _, _ = stacked(tmp_path)
    with pytest.raises(ModelError, match=r"second: its base, .*first, is an adapter that cannot be merged here"):
        load_policy(str(second), dtype="bfloat16")
    assert served_otherwise(str(second)) == "an adapter as the base of an adapter"
    assert served_otherwise(str(tmp_path / "first")) is None


def test_an_adapter_on_the_hub_is_not_trained_as_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights would be trained, and only the adapter's saved."""
    adapter = trained_adapter(causal(tmp_path / "base"), tmp_path / "adapter", 1)
    monkeypatch.setattr("align.models.loading.is_adapter", lambda model: False)  # as of a name on the hub
    load_policy(str(adapter), dtype="float32")
    with pytest.raises(ModelError, match="adapter: is an adapter on the hub, expected a folder"):
        load_policy(str(adapter), dtype="float32", trainable=True)
