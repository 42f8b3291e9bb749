"""Gradient products against two full backward passes per pair, summed in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.entanglement.layer_rules import LINEAR, RULES, Call, Input, products_of_grads
from align.entanglement.products import GradientProducts
from align.errors import DataError, ModelError
from align.models.tokenization import collate, tokenize_pairs
from tests.helpers.bad_input_makers import CHAT
from tests.helpers.builders import rows, tokenizer
from tests.models.test_logps import make_batch, one_by_one, tiny
from tests.training.test_trainer import ours

BATCH = make_batch([(6, 5, 8), (1, 3, 2), (12, 4, 4), (3, 1, 9)], same_start=2)
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {},
    "Qwen3": {"tie_word_embeddings": True},
    "Gemma2": {"tie_word_embeddings": True, "attn_implementation": "eager", "sliding_window": 64},
    "Gemma3Text": {"tie_word_embeddings": True},
    "Gemma3Text, untied": {"tie_word_embeddings": False},
    "GPT2": {},
    "GPTNeoX": {},
    "OPT": {},
    "Phi": {"partial_rotary_factor": 0.5},
}


def brute_force(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[2B, 2B], one backward pass per sequence over all trained parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vectors = []
    for value in one_by_one(model, batch):
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        vectors.append(torch.cat([grad.flatten().double() for grad in flat]))
    stacked = torch.stack(vectors)
    return stacked @ stacked.T


def check(model: nn.Module, batch: dict[str, Tensor], tolerance: float) -> GradientProducts:
    expected = brute_force(model, batch)
    measure = GradientProducts(model)
    found = measure(batch)
    pairs = len(expected) // 2
    scale = expected.diagonal().sqrt()
    for value, true, size in (
        (found.chosen_sq, expected.diagonal()[:pairs], scale[:pairs] ** 2),
        (found.rejected_sq, expected.diagonal()[pairs:], scale[pairs:] ** 2),
        (found.inner, expected.diagonal(pairs), scale[:pairs] * scale[pairs:]),
    ):
        assert ((value - true).abs() <= tolerance * size).all()
    gram, pairwise = measure.gram_and_pairs(batch)
    for name in ("chosen_sq", "rejected_sq", "inner", "chosen_logps", "rejected_logps", "chosen_length"):
        assert torch.allclose(getattr(pairwise, name).double(), getattr(found, name).double(), rtol=1e-3, atol=1e-3), (
            name
        )
    assert ((gram - expected).abs() <= tolerance * scale[:, None] * scale).all()
    logps = one_by_one(model, batch).detach()
    assert torch.allclose(torch.cat([found.chosen_logps, found.rejected_logps]), logps.double(), atol=1e-3)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(measure.covered.values()) == trained
    return measure


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_two_backward_passes(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """All parameters, tied and untied heads, biases, caps, learned positions."""
    fields = dict(FAMILIES[family])
    if fields.get("attn_implementation") == "eager":
        tolerance = max(tolerance, 1e-5)  # its softmax is float32 whatever the model's dtype
    model = tiny(family.split(",", maxsplit=1)[0], **fields).to(dtype)
    before = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    measure = check(model, BATCH, max(tolerance, 1e-6 if family.startswith("Gemma") else 0))
    assert (measure.covered["autograd"] > 0) == (family in {"OPT", "GPT2"})  # learned positions, one row for all
    assert [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()] == before


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "OPT"])
def test_a_prompt_that_holds_the_padding_token(family: str, tied: bool) -> None:
    """torch gives the row of ``padding_idx`` no gradient from look-ups; the head's part of a tied row stays."""
    model = tiny(family, tie_word_embeddings=tied, pad_token_id=3)
    assert model.get_input_embeddings().padding_idx == 3
    batch = {name: values.clone() for name, values in BATCH.items()}
    batch["input_ids"][:, 0] = 3
    batch["input_ids"][0, 5] = 3
    check(model, batch, 1e-6)


@pytest.mark.parametrize("family", ["Phi", "Persimmon"])
def test_biases_that_heads_share(family: str) -> None:
    """A LayerNorm over each head's values: its outputs are [2B, T, H, D]."""
    check(tiny(family, qk_layernorm=True, partial_rotary_factor=0.5), BATCH, 1e-6)


@pytest.mark.parametrize("modules", [["q_proj", "down_proj"], ["q_proj", "lm_head"], ["embed_tokens", "v_proj"]])
def test_adapters(modules: list[str]) -> None:
    """LoRA on layers, on the head, and on the embedding, whose parameters have no rule."""
    torch.manual_seed(1)
    model = get_peft_model(tiny("Llama"), LoraConfig(r=2, target_modules=modules, init_lora_weights=False))
    measure = check(model, BATCH, 1e-8)
    assert (measure.covered["autograd"] > 0) == ("embed_tokens" in modules)


def test_named_parameters_only() -> None:
    model = tiny("Llama")
    found = GradientProducts(model, r"layers\.1\.mlp")(BATCH)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name)
    expected = brute_force(model, BATCH)
    assert torch.allclose(found.inner, expected.diagonal(4), rtol=1e-8)
    with pytest.raises(ModelError, match="no trained parameter whose name matches 'nothing'"):
        GradientProducts(model, "nothing")


def test_training_state_is_unchanged() -> None:
    """Dropout, activation checkpointing and accumulated gradients."""
    model = tiny("Llama", attention_dropout=0.5)
    model.gradient_checkpointing_enable()
    model.train()
    model(input_ids=BATCH["input_ids"]).logits.sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    first = GradientProducts(model)(BATCH)
    assert model.training and model.is_gradient_checkpointing
    after = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    model.gradient_checkpointing_disable()
    model.eval()
    assert torch.allclose(first.inner, GradientProducts(model)(BATCH).inner)


@pytest.mark.parametrize(("tokens", "scored"), [(1, 1), (60, 12)])
def test_the_size_of_parts_changes_nothing(tokens: int, scored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Llama", tie_word_embeddings=True).double()
    together = GradientProducts(model)(BATCH)
    monkeypatch.setattr("align.entanglement.products.MAX_TOKENS", tokens)
    monkeypatch.setattr("align.entanglement.head_products.TOKENS", scored)
    apart = GradientProducts(model)(BATCH)
    for name in ("chosen_sq", "rejected_sq", "inner", "chosen_logps", "rejected_logps"):
        assert torch.allclose(getattr(apart, name), getattr(together, name), rtol=1e-9, atol=1e-12), name
    assert torch.equal(apart.chosen_length, together.chosen_length)
    assert torch.equal(apart.rejected_length, together.rejected_length)


class Doubled(nn.Linear):
    """A subclass that computes something else: the rule of its base class must not apply."""

    def forward(self, input: Tensor) -> Tensor:
        """Twice the usual."""
        return 2 * super().forward(input)


def test_unknown_layers_fall_back_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("Llama")
    layer = model.model.layers[0].mlp
    made = Doubled(layer.up_proj.in_features, layer.up_proj.out_features, bias=False).double()
    made.weight.data.copy_(layer.up_proj.weight.data)
    layer.up_proj = made
    with caplog.at_level("WARNING", logger="align"):
        measure = check(model, BATCH, 1e-8)
    assert measure.covered["autograd"] == made.weight.numel()
    assert "layers.0.mlp.up_proj" in caplog.text


def test_shared_layers_fall_back() -> None:
    """A module that is called twice, and a matrix that two modules hold."""
    model = tiny("Llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    assert check(model, BATCH, 1e-8).covered["autograd"] > 0


@pytest.mark.parametrize(("tokens", "d_in", "d_out"), [(3, 40, 30), (60, 4, 3), (16, 16, 16)])
def test_both_forms_of_the_linear_rule_agree(tokens: int, d_in: int, d_out: int) -> None:
    """Also where the other form is cheaper."""
    generator = torch.Generator().manual_seed(tokens)
    x, e = (torch.randn(6, tokens, d, generator=generator, dtype=torch.float64) for d in (d_in, d_out))
    call = Call(nn.Linear(1, 1), "weight", Input(x), e)
    assert LINEAR.products is not None
    assert torch.allclose(LINEAR.products(call), products_of_grads(LINEAR.sample_grads(call)))
    assert RULES.find(Doubled(2, 2), "weight") is None


def test_plain_text_needs_a_token_that_ends_it() -> None:
    """A tokenizer that can pad but not end a response, as an encoder's; messages end as their template says."""
    endless = tokenizer(eos=False)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        tokenize_pairs(Dataset.from_list(rows(2)), endless)
    made = tokenize_pairs(Dataset.from_list([CHAT | {"id": "a"}]), endless)
    assert made[0]["chosen_ids"] and made[0]["rejected_ids"]


def test_batch_is_what_the_trainer_sees(tiny_policy: Path, tmp_path: Path) -> None:
    pairs = Dataset.from_list(rows(6))
    trainer = ours(tiny_policy, tmp_path, pairs=pairs)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    made = tokenize_pairs(pairs, tokenizer, max_length=64)
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert made[column] == trainer.train_dataset[column]
    batch = collate(made, tokenizer.pad_token_id, max_length=64)
    theirs = trainer.data_collator(list(trainer.train_dataset))
    assert all(torch.equal(batch[name], theirs[name]) for name in ("input_ids", "attention_mask", "completion_mask"))
    with pytest.raises(DataError, match="pairs p0, p1, p2, p3, p4 and 1 more: no token of a response is left within 3"):
        tokenize_pairs(pairs, tokenizer, max_length=3)


@pytest.mark.slow
@pytest.mark.model
def test_the_real_model(assets: Path) -> None:
    """SmolLM2-135M, all parameters, float32, on real text; the reference sums in float64."""
    model = AutoModelForCausalLM.from_pretrained(assets / "smollm2", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(assets / "smollm2")
    text = [
        {"id": "a", "prompt": "The film was", "chosen": " a delight from start to end.", "rejected": " a bore."},
        {"id": "b", "prompt": "I would", "chosen": " see it again, gladly.", "rejected": " see it again, never."},
    ]
    batch = collate(tokenize_pairs(Dataset.from_list(text), tokenizer), tokenizer.pad_token_id)
    found = GradientProducts(model)(batch)
    parameters = list(model.parameters())
    sums = one_by_one(model, batch)
    for k in range(2):
        chosen, rejected = (torch.autograd.grad(sums[row], parameters, retain_graph=True) for row in (k, k + 2))
        inner = sum((a.double() * b.double()).sum() for a, b in zip(chosen, rejected, strict=True))
        square = sum((a.double() ** 2).sum() for a in chosen)
        assert float(found.chosen_sq[k]) == pytest.approx(float(square), rel=1e-4)
        assert float(found.inner[k]) == pytest.approx(float(inner), rel=1e-4, abs=1e-4 * float(square))
