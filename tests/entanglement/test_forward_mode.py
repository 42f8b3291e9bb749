"""Directional derivatives, by forward mode and by the products, against gradients and against real steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from align.entanglement.check import check_predictions
from align.entanglement.forward_mode import logps_and_jvp
from align.entanglement.products import GradientProducts
from align.entanglement.token_products import token_matrix, token_products
from align.errors import ModelError
from align.losses.registry import resolve
from tests.entanglement.test_products import FAMILIES
from tests.models.test_logps import make_batch, one_by_one, tiny

BATCH = make_batch([(6, 5, 8), (1, 3, 2), (12, 4, 4), (3, 1, 9)], same_start=1)
OTHERS = make_batch([(4, 6, 5), (2, 7, 3)], seed=9)


def small(lora: bool) -> nn.Module:
    torch.manual_seed(2)
    model = tiny("Llama", tie_word_embeddings=True)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)) if lora else model


def somewhere(model: nn.Module) -> dict[str, Tensor]:
    """A direction for every trained parameter."""
    generator = torch.Generator().manual_seed(0)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for n, p in named.items()}


def by_gradients(model: nn.Module, batch: dict[str, Tensor], direction: dict[str, Tensor]) -> Tensor:
    """[2B], one backward pass per sequence."""
    named = {name: p for name, p in model.named_parameters() if name in direction}
    found = []
    for row in one_by_one(model, batch):
        grads = torch.autograd.grad(row, list(named.values()), retain_graph=True, allow_unused=True)
        parts = (
            0.0 if g is None else (g * direction[n]).sum(dtype=torch.float64) for n, g in zip(named, grads, strict=True)
        )
        found.append(float(sum(parts)))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_directional_derivatives_are_gradient_products(family: str) -> None:
    """Reverse mode with the products, forward mode token by token, and gradients themselves."""
    model = tiny(family.partition(",")[0], **FAMILIES[family]).double()
    direction = somewhere(model)
    expected = by_gradients(model, BATCH, direction)
    tolerance = 1e-5 if family.startswith("Gemma") else 1e-9  # their norms are float32
    found = GradientProducts(model)(BATCH, direction)
    assert torch.allclose(torch.cat([found.chosen_jvp, found.rejected_jvp]), expected, rtol=tolerance, atol=tolerance)
    _, tokens = logps_and_jvp(model, BATCH, direction)
    assert torch.allclose(tokens.sum(dim=1), expected, rtol=1e-5, atol=1e-5)
    alone = GradientProducts(model)(BATCH)
    assert alone.chosen_jvp.isnan().all() and torch.equal(alone.inner, found.inner)


@pytest.mark.parametrize("modules", [["q_proj", "down_proj"], ["q_proj", "lm_head"], ["embed_tokens", "v_proj"]])
def test_derivatives_through_adapters(modules: list[str]) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny("Llama"), LoraConfig(r=2, target_modules=modules, init_lora_weights=False)).double()
    direction = somewhere(model)
    found = GradientProducts(model)(BATCH, direction)
    expected = by_gradients(model, BATCH, direction)
    assert torch.allclose(torch.cat([found.chosen_jvp, found.rejected_jvp]), expected, rtol=1e-9, atol=1e-9)


def test_parameters_that_are_not_named_do_not_move() -> None:
    model = tiny("Llama", tie_word_embeddings=True).double()
    whole = somewhere(model)
    part = {name: u for name, u in whole.items() if "layers.1.mlp" in name or name.endswith("layernorm.weight")}
    found = GradientProducts(model)(BATCH, part)
    assert torch.allclose(found.chosen_jvp, by_gradients(model, BATCH, part)[:4], rtol=1e-9)
    nowhere = GradientProducts(model)(BATCH, {})
    assert not nowhere.chosen_jvp.any() and not nowhere.rejected_jvp.any()


def test_tokens_sum_to_the_product() -> None:
    """Along the rejected gradient the chosen tokens' derivatives sum to <gw, gl>."""
    model = small(lora=False)
    pair = {name: value[[0, 4]] for name, value in BATCH.items()}
    names = [name for name, _ in model.named_parameters()]
    gradient = torch.autograd.grad(one_by_one(model, pair)[1], list(model.parameters()))
    _, tokens = logps_and_jvp(model, pair, dict(zip(names, gradient, strict=True)))
    products = GradientProducts(model)(pair)
    assert float(tokens[0].sum()) == pytest.approx(float(products.inner[0]), rel=1e-4)
    assert float(tokens[1].sum()) == pytest.approx(float(products.rejected_sq[0]), rel=1e-4)
    assert not tokens[~pair["completion_mask"][:, 1:].bool()].any()


@pytest.mark.parametrize("pair", [0, 2])
def test_token_matrix_against_two_gradients_per_entry(pair: int) -> None:
    """For pairs in which either response is the longer one."""
    model = tiny("Llama", tie_word_embeddings=True).double()
    batch = {name: value[[pair, pair + 4]] for name, value in BATCH.items()}
    found = token_matrix(model, batch)
    parameters = list(model.parameters())
    logps = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    logps = logps.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    gradients = [
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(logps[row, place], parameters, retain_graph=True)])
            for place in mask[1:].nonzero()[:, 0].tolist()
        ]
        for row, mask in enumerate(batch["completion_mask"])
    ]
    expected = torch.tensor([[float(a @ b) for b in gradients[1]] for a in gradients[0]], dtype=torch.float64)
    assert found.shape == expected.shape and torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
    chosen, rejected = token_products(model, batch)
    scored = batch["completion_mask"][:, 1:].bool()
    assert torch.allclose(found.sum(dim=1), chosen[scored[0]], rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.sum(dim=0), rejected[scored[1]], rtol=1e-4, atol=1e-4)


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


def test_tokens_of_some_parameters_sum_to_their_product() -> None:
    """The colors of a pair are about the parameters that the table is about."""
    model, names = tiny("Llama").double(), r"layers\.1\.mlp"
    batch = make_batch([(3, 4, 2)])
    found = GradientProducts(model, names)(batch)
    for values in token_products(model, batch, names):
        assert float(values.sum()) == pytest.approx(float(found.inner[0]), rel=1e-6)
    assert float(token_matrix(model, batch, names).sum()) == pytest.approx(float(found.inner[0]), rel=1e-6)
    assert float(token_products(model, batch)[0].sum()) != pytest.approx(float(found.inner[0]), rel=1e-2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fields", [None, {"trainable_token_indices": [3, 5]}, {"target_modules": ["embed_tokens"]}])
def test_colors_of_a_prompt_that_holds_the_padding_token(fields: dict[str, Any] | None, tied: bool) -> None:
    """A look-up of ``padding_idx`` has no gradient, so a tied row that moves by its head's part colors no token."""
    torch.manual_seed(1)
    model: nn.Module = tiny("Llama", tie_word_embeddings=tied, pad_token_id=3).double()
    if fields is not None:
        config = LoraConfig(r=2, **({"target_modules": ["q_proj"]} | fields), init_lora_weights=False)
        model = get_peft_model(model, config).double()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
    batch = make_batch([(6, 5, 8)])
    batch["input_ids"][:, [0, 3, 5]] = 3
    inner = float(GradientProducts(model)(batch).inner[0])
    for values in (*token_products(model, batch), token_matrix(model, batch)):
        assert float(values.sum()) == pytest.approx(inner, rel=2e-5)


def test_an_adapter_with_a_forward_of_before_is_refused_by_name() -> None:
    model = get_peft_model(tiny("Llama"), AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1))
    with pytest.raises(ModelError, match=r"\[adapter\] adapter of the kind ADAPTION_PROMPT"):
        GradientProducts(model)
