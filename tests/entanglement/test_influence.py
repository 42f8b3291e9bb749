"""Influence of each pair on a held-out loss, against autograd and against real optimizer steps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.entanglement.influence import (
    AdamState,
    HeldOut,
    InfluenceMeasurement,
    directions_of,
    held_out,
    held_out_losses,
    with_whole,
)
from align.entanglement.influence_check import check_influence
from align.entanglement.measure_pairs import PairMeasurement
from align.entanglement.products import GradientProducts
from align.errors import DataError
from align.losses.registry import resolve
from align.models.loading import load_policy
from align.models.tokenization import tokenize_pairs
from tests.helpers.builders import rows, trained_adapter

GROUPS = ["a", "b", "a", "b", "a"]


def prepared(folder: Path, training: str, target: str, **fields: Any) -> tuple[PairMeasurement, PairMeasurement]:
    model = load_policy(str(folder), trainable=True, dtype="float32").eval()
    products = GradientProducts(model)
    return tuple(PairMeasurement(products, resolve(name, {}), 0, **fields) for name in (training, target))  # type: ignore[return-value]


def tokens(folder: Path, count: int, first: int = 0) -> Dataset:
    table = Dataset.from_list(rows(first + count)).select(range(first, first + count))
    return tokenize_pairs(table, AutoTokenizer.from_pretrained(folder))


def dpo_losses(model: nn.Module, reference: nn.Module, pair: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """-log sigmoid(0.1 h) of a pair and its two log-probs, by plain forward passes over the tokens."""
    logps, base = [], []
    for name in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([pair["prompt_ids"] + pair[name]])
        start = len(pair["prompt_ids"])
        for one, found in ((model, logps), (reference, base)):
            scores = one(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            found.append(scores[start - 1 :].sum())
    h = logps[0] - logps[1] - (base[0] - base[1]).detach()
    return -torch.nn.functional.logsigmoid(0.1 * h), logps


def gradient(model: nn.Module, value: Tensor) -> Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten().double() for grad in grads])


@pytest.mark.parametrize("adapter", [False, True])
def test_against_inner_products_by_autograd(adapter: bool, tiny_policy: Path, tmp_path: Path) -> None:
    """The whole, each group, and the parts of the two responses, from gradients written out here."""
    folder = trained_adapter(tiny_policy, tmp_path / "adapter", 1) if adapter else tiny_policy
    training, _ = prepared(folder, "dpo", "dpo")
    model = training.products.model
    base = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype="float32").eval()
    pairs, held = tokens(tiny_policy, 4), tokens(tiny_policy, 5, first=4)
    groups = held_out(training, held, GROUPS)
    table = InfluenceMeasurement(training, directions_of(groups, None))(pairs)
    table = with_whole(table, {group.name: group.pairs for group in groups})
    each = [gradient(model, dpo_losses(model, base, pair)[0]) for pair in held]
    u = {"": torch.stack(each).mean(0), "@a": torch.stack(each[::2]).mean(0), "@b": torch.stack(each[1::2]).mean(0)}
    for k, pair in enumerate(pairs):
        loss, logps = dpo_losses(model, base, pair)
        weights = torch.autograd.grad(loss, logps, retain_graph=True)
        parts = [-float(weight) * gradient(model, logp) for weight, logp in zip(weights, logps, strict=True)]
        for ending, direction in u.items():
            size = float(direction.norm() * gradient(model, loss).norm())
            for name, step in (("_chosen", parts[0]), ("_rejected", parts[1]), ("", parts[0] + parts[1])):
                expected = pytest.approx(float(direction @ step), rel=1e-3, abs=1e-4 * size)
                assert table[f"influence{name}{ending}"][k] == expected, (k, name, ending)
        whole = table["influence_chosen"][k] + table["influence_rejected"][k]
        assert table["influence"][k] == pytest.approx(whole, rel=1e-9)


def test_order_and_batches_change_nothing(tiny_policy: Path) -> None:
    pairs, held = tokens(tiny_policy, 7), tokens(tiny_policy, 5, first=7)
    found = []
    for order, budget in ((range(7), 2048), ((4, 0, 6, 2, 5, 1, 3), 40)):
        training, target = prepared(tiny_policy, "dpo", "nll", batch_tokens=budget)
        groups = held_out(target, held.select([3, 1, 4, 0, 2]), ["g"] * 5)
        table = InfluenceMeasurement(training, directions_of(groups, None))(pairs.select(order))
        values = dict(zip(table["id"], table["influence@g"], strict=True))
        found.append([values[name] for name in pairs["id"]])
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-4 * float(np.abs(found[0]).max()))


def test_the_model_stays_as_it_is(tiny_policy: Path) -> None:
    training, target = prepared(tiny_policy, "dpo", "nll")
    model = training.products.model.train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    check_influence(training, target, tokens(tiny_policy, 3), tokens(tiny_policy, 2, first=3), None)
    for value, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(value, parameter) and parameter.grad is None and parameter.requires_grad
    assert model.training


@pytest.mark.parametrize("target", ["dpo", "nll"])
def test_real_steps_do_what_was_predicted(target: str, tiny_policy: Path) -> None:
    """Pearson and signs at small steps; a step 256 times as long is predicted worse than the best one."""
    found = check_influence(
        *prepared(tiny_policy, "dpo", target), tokens(tiny_policy, 7), tokens(tiny_policy, 3, first=7), None
    )
    for name in ("sgd", "adamw"):
        steps = found[name]["steps"]
        for step in steps[:2]:
            assert step["pearson"] >= 0.99 and step["sign_agreement"] == 1.0 and step["signs_compared"] >= 6, name
            assert step["rms_error_of_rms"] < 0.05
        assert steps[-1]["rms_error_of_rms"] > min(step["rms_error_of_rms"] for step in steps)


def test_preconditioning_is_that_of_adam() -> None:
    """u / (sqrt(v / (1 - b2^t)) + eps), no coordinate raised above 1 / 0.03 of the typical one, none without moment."""
    second = {"w": torch.tensor([0.04, 0.04, 0.0]), "never": torch.zeros(2)}
    state = AdamState({}, second, 10.0, (0.9, 0.999), 1e-8)
    found = state.precondition({"w": torch.tensor([1.0, -2.0, 1.0]), "never": torch.ones(2)})
    root = (0.04 / (1 - 0.999**10)) ** 0.5
    least = 0.03 * root * (2 / 3) ** 0.5
    assert found["w"].tolist() == pytest.approx([1 / root, -2 / root, 1 / least], rel=1e-5)
    assert found["never"].tolist() == [0.0, 0.0]
    assert state.first_share == pytest.approx(0.1 / (1 - 0.9**11))


def test_groups_add_up_by_their_sizes() -> None:
    table = Dataset.from_dict({f"influence{part}@{g}": [v] for part in ("", "_chosen", "_rejected")
                               for g, v in (("a", 1.0), ("b", 5.0))})  # fmt: skip
    assert with_whole(table, {"a": 3, "b": 1})["influence"] == [2.0]


def test_few_pairs_are_not_checked(tiny_policy: Path) -> None:
    both = prepared(tiny_policy, "dpo", "dpo")
    with pytest.raises(DataError, match=r"influence-pairs.*found 2, expected at least 3"):
        check_influence(*both, tokens(tiny_policy, 2), tokens(tiny_policy, 2, first=2), None)


def test_the_held_out_loss_is_the_mean_of_its_pairs(tiny_policy: Path) -> None:
    training, _ = prepared(tiny_policy, "dpo", "nll")
    held = tokens(tiny_policy, 3)
    groups: list[HeldOut] = held_out(training, held, ["a", "a", "b"])
    assert [(group.name, group.pairs) for group in groups] == [("a", 2), ("b", 1)]
    _, batch, margin = next(training.batches(held.select([2])))
    assert groups[1].loss == pytest.approx(float(held_out_losses(training, batch, margin).detach()), rel=1e-5)
    assert groups[0].loss == pytest.approx(float(np.log(2)), rel=1e-5)  # the model is its own reference
