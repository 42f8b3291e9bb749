"""A layer rule of the caller's own: compared with autograd, refused by name, never in the place of a rule here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from align.entanglement.layer_rules import BIAS, LINEAR, RULES, Call, Rule
from align.entanglement.products import GradientProducts
from align.errors import AlignError, ConfigError


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Own(nn.Linear):
    pass


def grads_twice(call: Call) -> Tensor:
    return 2 * (call.grad.mT @ call.input.value).flatten(1)


def failing(call: Call) -> Tensor:
    raise KeyError("mine")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(RULES.types)
    yield
    RULES.types.clear()
    RULES.types.update(before)


def products(policy: Path, kind: type[nn.Module]) -> tuple[Tensor, ...]:
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    model.model.layers[0].self_attn.q_proj.__class__ = kind
    ids = torch.randint(3, 12, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    found = GradientProducts(model)({"input_ids": ids, "attention_mask": mask, "completion_mask": mask})
    return found.chosen_sq, found.rejected_sq, found.inner


@pytest.mark.parametrize(("kind", "rule"), [(Own, LINEAR), (Twice, Rule(grads_twice))])
def test_a_right_rule_gives_the_products_of_autograd(tiny_policy: Path, kind: type[nn.Module], rule: Rule) -> None:
    expected = products(tiny_policy, kind)
    RULES.register(kind, weight=rule)
    for found, other in zip(products(tiny_policy, kind), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "rules", "words"),
    [
        (Twice, {"weight": LINEAR}, r"rule of Twice\.weight gives the products .*, autograd"),
        (Own, {"weight": BIAS}, r"rule of Own\.weight gives the products"),
        (Own, {"wieght": LINEAR}, "Own: found a rule for 'wieght', expected one of its parameters bias, weight"),
        (Own, {"weight": Rule(failing)}, r"rule of Own\.weight failed: KeyError: 'mine'"),
        (Own, {"weight": Rule(lambda call: call.grad.flatten(1)[:, :3])}, "gives the products"),
    ],
)
def test_a_wrong_rule_is_refused(tiny_policy: Path, kind: type[nn.Module], rules: dict[str, Rule], words: str) -> None:
    RULES.register(kind, **rules)
    with pytest.raises(AlignError, match=words) as found:
        products(tiny_policy, kind)
    assert found.value.code == "entanglement-rule"


@pytest.mark.parametrize(
    ("kind", "rules", "words"),
    [
        (nn.Linear, {"weight": BIAS}, "Linear has rules already"),
        (nn.Linear(2, 2), {"weight": LINEAR}, "expected a class of layers"),
        (int, {"weight": LINEAR}, "expected a class of layers"),
        (Own, {}, "Own: found no rule"),
        (Own, {"weight": failing}, "expected a Rule, such as LINEAR"),
    ],
)
def test_what_cannot_be_registered(kind: Any, rules: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RULES.register(kind, **rules)
