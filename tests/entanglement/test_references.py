"""The reference of an adapter is what it was trained from: its base, or the adapter that its training started from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import align
from align.entanglement.measure import MeasureJob
from align.entanglement.measure_pairs import measure_entanglement
from align.errors import ModelError
from align.losses.registry import resolve
from align.models.adapter_folders import adapter_start
from align.models.loading import load_policy, load_tokenizer
from align.models.tokenization import tokenize_pairs
from tests.helpers.builders import llama_config, rows, tokenizer, trained_adapter

LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def base_with_biases(folder: Path) -> Path:
    torch.manual_seed(0)
    config = llama_config()
    config.attention_bias = True
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, **fields: Any) -> Path:
    """An adapter of which everything that it trains has been moved."""
    torch.manual_seed(1)
    model = get_peft_model(load_policy(str(base), dtype="float32"), LoraConfig(**LORA, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def logps(model: nn.Module, side: str) -> Tensor:
    """Log-prob of each response of ``rows(4)`` under a model, with its end-of-sequence token, by plain forward passes.

    Shape [4], nats.
    """
    own, found = tokenizer(), []
    for row in rows(4):
        start = len(own(row["prompt"])["input_ids"])
        ids = torch.tensor([own(row["prompt"] + row[side])["input_ids"] + [own.eos_token_id]])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found.append(scores.gather(1, ids[0, 1:, None])[start - 1 :].sum())
    return torch.stack(found)


def check_changes(found: Dataset, policy: nn.Module, start: nn.Module) -> None:
    """The changes in a table are those of the policy's log-probs since ``start``."""
    for side in ("chosen", "rejected"):
        expected = logps(policy.eval(), side) - logps(start.eval(), side)
        assert torch.allclose(torch.tensor(found[f"logp_{side}_change"]), expected, atol=1e-4)
        assert float(expected.abs().min()) > 1e-3


@pytest.mark.parametrize("fields", [{"bias": "all"}, {"bias": "lora_only"}, {"init_lora_weights": "olora"}])
def test_what_stays_when_the_adapter_is_off_is_no_reference(fields: dict[str, Any], tmp_path: Path) -> None:
    """The job of the command loads the base; a model in memory is refused."""
    base = base_with_biases(tmp_path / "base")
    folder = adapter(base, tmp_path / "adapter", **fields)
    assert adapter_start(str(folder)) == str(base)
    job = MeasureJob(str(folder), None, resolve("dpo", {}), None, 2048, 64)
    own = load_tokenizer(str(folder))
    found = job.start()(tokenize_pairs(Dataset.from_list(rows(4)), own))
    policy = load_policy(str(folder), trainable=True, dtype="float32")
    check_changes(found, policy, load_policy(str(base), dtype="float32"))
    with pytest.raises(ModelError, match=f"{next(iter(fields))}: .*adapter off is not the model") as error:
        measure_entanglement(policy, own, Dataset.from_list(rows(4)))
    assert error.value.code == "adapter" and error.value.hint


def test_a_model_in_memory_refers_to_the_adapter_that_it_started_from(tiny_policy: Path, tmp_path: Path) -> None:
    """trl keeps that one as ``ref`` in the same model; which parameters take gradients stays as it is."""
    now, before = (trained_adapter(tiny_policy, tmp_path / f"a{seed}", seed) for seed in (1, 2))
    policy: Any = load_policy(str(now), trainable=True, dtype="float32")
    policy.load_adapter(str(before), "ref")
    frozen = next(parameter for name, parameter in policy.named_parameters() if "lora_A.default" in name)
    frozen.requires_grad_(False)
    state = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    found = measure_entanglement(policy, load_tokenizer(str(now)), Dataset.from_list(rows(4)))
    check_changes(found, load_policy(str(now), dtype="float32"), load_policy(str(before), dtype="float32"))
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == state
    assert policy.active_adapter == "default"
    policy.save_pretrained(tmp_path / "both")  # as trl saves a training that went on from an adapter
    tokenizer().save_pretrained(tmp_path / "both")
    found = align.measure_entanglement(tmp_path / "both", None, rows(4))
    check_changes(found, load_policy(str(now), dtype="float32"), load_policy(str(before), dtype="float32"))


def test_a_plain_adapter_and_a_model_have_no_start_of_their_own(tiny_policy: Path, tmp_path: Path) -> None:
    assert adapter_start(str(trained_adapter(tiny_policy, tmp_path / "a", 1))) is None
    assert adapter_start(str(tiny_policy)) is None and adapter_start("a/hub-id") is None
