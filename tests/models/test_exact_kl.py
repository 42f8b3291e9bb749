"""The exact KL to a reference: against full logits in float64, in both layouts, for pairs and for completions."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from align.models import exact_kl as module
from align.models.completion_logps import completion_kl, completion_logps
from align.models.exact_kl import ReferenceStates, exact_kl, frozen_head
from align.models.layout import choose_layout
from align.models.lm_head import LogitForm
from align.models.logps import Layout, pair_logps, pair_states
from tests.models.test_logps import make_batch, tiny


def moved(model: nn.Module) -> nn.Module:
    """A copy with other weights, the head's among them."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double() * 0.05)
    return other


def token_kl(policy: nn.Module, reference: nn.Module, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of the next token after each prefix of one row, [T], from full logits."""
    with torch.no_grad():
        p = (policy(input_ids=ids[None]).logits[0].double() / temperature).log_softmax(dim=-1)
        q = reference(input_ids=ids[None]).logits[0].double().log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Granite"])
@pytest.mark.parametrize("layout", ["concatenated", "shared_prefix"])
def test_kl_of_pairs(family: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed over the tokens of each response; a token that both responses begin with counts in both."""
    monkeypatch.setattr(module, "FEWEST_ROWS", 3)
    monkeypatch.setitem(module.TILE_LOGITS, "cpu", 61)
    plain, batch = tiny(family), make_batch([(4, 3, 5), (6, 2, 2)], same_start=1)
    reference, policy = plain, moved(plain)
    for model in (reference, policy):
        choose_layout(model, batch, layout)
    with torch.no_grad():
        states = pair_states(reference, batch, layout)
        said = ReferenceStates(states, reference.get_output_embeddings(), LogitForm.of(reference.config))
        found = pair_logps(policy, batch, layout, reference=said, metrics=False)
        with_metrics = pair_logps(policy, batch, layout, reference=said)
        itself = pair_logps(reference, batch, layout, reference=said)
    assert found.kl is not None and itself.kl is not None
    for row in range(4):
        length = int(batch["attention_mask"][row].sum())
        scored = batch["completion_mask"][row, 1:length].bool()
        expected = token_kl(policy, reference, batch["input_ids"][row, :length])[:-1][scored].sum()
        assert found.kl[row].item() == pytest.approx(expected.item(), rel=1e-9) and expected > 1e-4
    assert itself.kl.tolist() == [0.0] * 4
    for name in ("chosen", "rejected", "kl"):
        assert torch.allclose(getattr(found, name), getattr(with_metrics, name), rtol=1e-9)


def test_kl_of_completions_with_a_switched_adapter() -> None:
    """At another temperature; the head has an adapter, so the reference's head is the one below it."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    base = tiny("Llama")
    policy = get_peft_model(copy.deepcopy(base), lora).double().eval()

    @contextmanager
    def reference() -> Iterator[nn.Module]:
        with policy.disable_adapter():
            yield policy

    prompts, completions = [[3, 4, 5], [6], [7, 8]], [[9, 10], [11, 12, 13, 14], []]
    found = completion_kl(
        policy, reference, prompts, completions, batch_tokens=8, pad_token_id=0, temperature=0.7
    )  # fmt: skip
    for k, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = torch.tensor([*prompt, *completion])
        kl = token_kl(policy, base, ids, 0.7)[len(prompt) - 1 : len(ids) - 1]
        assert found[k] == pytest.approx(kl.sum().item(), rel=1e-9)
    assert found[2] == 0 < found[0]


def test_its_mean_is_that_of_the_log_ratios() -> None:
    """Over all completions of one token, weighted by the policy's probabilities, both are KL(policy || reference)."""
    reference = tiny("Llama")
    policy = moved(reference)
    every = [[token] for token in range(61)]
    numbers = {"batch_tokens": 200, "pad_token_id": 0}
    p = completion_logps(policy, [[5, 6]] * 61, every, **numbers)  # type: ignore[arg-type]
    q = completion_logps(reference, [[5, 6]] * 61, every, **numbers)  # type: ignore[arg-type]

    @contextmanager
    def block() -> Iterator[nn.Module]:
        yield reference

    exact = completion_kl(policy, block, [[5, 6]], [[9]], **numbers)  # type: ignore[arg-type]
    assert exact[0] == pytest.approx(float((torch.from_numpy(p).exp().numpy() * (p - q)).sum()), rel=1e-9)


def test_a_frozen_head_and_a_padded_vocabulary() -> None:
    """It is a copy; rows that only pad one of the two vocabularies are left out."""
    torch.manual_seed(0)
    head, states = nn.Linear(8, 16, bias=True), torch.randn(5, 8)
    wrapped = nn.Sequential(head, nn.Identity())
    for given in (head, wrapped):
        frozen = frozen_head(given, 8)
        assert torch.allclose(frozen(states), head(states), atol=1e-6)
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
    frozen = frozen_head(head, 8)
    with torch.no_grad():
        before = frozen(states)
        head.weight.add_(1.0)
    assert torch.equal(frozen(states), before)
    wide = nn.Linear(8, 20)
    with torch.no_grad():
        wide.weight[:16], wide.bias[:16] = head.weight, head.bias
    targets = torch.tensor([0, 3, 15, 2, 1])
    for policy, reference in ((head, wide), (wide, head)):
        logps, kl = exact_kl(states, policy, targets, LogitForm(), ReferenceStates(states, reference, LogitForm()))
        assert torch.allclose(kl, torch.zeros(5), atol=1e-6) and module.head_rows(wide) == 20
        expected = policy(states).log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
        assert torch.allclose(logps, expected, atol=1e-6)
