"""Forward-mode predictions against gradients and against real steps."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from align.entanglement.check import check_predictions
from align.entanglement.predict import directional_logps, predicted_changes
from align.entanglement.products import GradientProducts
from align.loss_registry import resolve
from tests.test_logps import make_batch, one_by_one, tiny

BATCH = make_batch([(6, 5, 8), (1, 3, 2), (12, 4, 4), (3, 1, 9)], same_start=1)
OTHERS = make_batch([(4, 6, 5), (2, 7, 3)], seed=9)


def small(lora: bool) -> nn.Module:
    torch.manual_seed(2)
    model = tiny("Llama", tie_word_embeddings=True)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)) if lora else model


@pytest.mark.parametrize("lora", [False, True])
def test_derivatives_are_gradient_products(lora: bool) -> None:
    model = small(lora)
    generator = torch.Generator().manual_seed(0)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in named.items()}
    found = torch.cat(predicted_changes(model, BATCH, direction))
    for value, row in zip(found, one_by_one(model, BATCH), strict=True):
        grads = torch.autograd.grad(row, list(named.values()), retain_graph=True)
        expected = sum(float((g * direction[n]).sum()) for n, g in zip(named, grads, strict=True))
        assert float(value) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_tokens_sum_to_the_product() -> None:
    """Along the rejected gradient the chosen tokens' derivatives sum to <gw, gl>."""
    model = small(lora=False)
    pair = {name: value[[0, 4]] for name, value in BATCH.items()}
    names = [name for name, _ in model.named_parameters()]
    gradient = torch.autograd.grad(one_by_one(model, pair)[1], list(model.parameters()))
    _, tokens = directional_logps(model, pair, dict(zip(names, gradient, strict=True)))
    products = GradientProducts(model)(pair)
    assert float(tokens[0].sum()) == pytest.approx(float(products.inner[0]), rel=1e-4)
    assert float(tokens[1].sum()) == pytest.approx(float(products.rejected_sq[0]), rel=1e-4)
    assert not tokens[~pair["completion_mask"][:, 1:].bool()].any()


@pytest.mark.parametrize("lora", [False, True])
def test_predictions_hold_for_real_steps(lora: bool) -> None:
    """Signs agree, and the error falls with the square of the step, for pairs in and out of the batch."""
    rates = {"sgd": 2.0 if lora else 0.03, "adamw": 1e-2 if lora else 1e-3}
    for probes in (BATCH, OTHERS):
        found = check_predictions(small(lora), BATCH, probes, resolve("dpo", {"beta": 0.5}), rates)
        for name, result in found.items():
            assert result["steps"][0]["compared"] > 0, name
            assert all(step["sign_agreement"] >= 0.99 for step in result["steps"] if step["compared"]), name
            assert 1.9 < result["order_of_error"] < 2.1, name


@pytest.mark.slow
@pytest.mark.model
def test_the_real_model(assets: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets / "smollm2", dtype=torch.float32)
    found = check_predictions(model, BATCH, OTHERS, resolve("dpo", {}), {"sgd": 1e-4, "adamw": 1e-6})
    assert all(result["steps"][0]["sign_agreement"] >= 0.99 for result in found.values())
