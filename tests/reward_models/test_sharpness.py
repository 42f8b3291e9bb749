"""The penalty on sharpness: a Hessian-vector product, a multiplier that is never negative, unchanged parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn

from align.config import RewardSection, SharpnessSection
from align.errors import ConfigError
from reward_models.sharpness import SharpnessPenalty
from reward_models.train import train_reward_model
from tests.helpers.builders import bert_reward, rows

INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 1)]
    return nn.Sequential(*layers).double()


def mean_margin(model: nn.Module) -> Any:
    def mean() -> Tensor:
        return (model(INPUTS[:3]) - model(INPUTS[3:])).mean()

    return mean


def penalty(model: nn.Module, **fields: Any) -> SharpnessPenalty:
    return SharpnessPenalty(SharpnessSection(**fields), model, lambda tensor: tensor)


def exact(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """|grad G| and its gradient by autograd, without dropout."""
    model.eval()
    parameters = list(model.parameters())
    first = torch.autograd.grad(mean_margin(model)(), parameters, create_graph=True, allow_unused=True)
    norm = torch.cat([g.flatten() for g in first if g is not None]).norm()
    second = torch.autograd.grad(norm, parameters, allow_unused=True)
    model.train()
    return norm.detach(), [torch.zeros_like(p) if g is None else g for g, p in zip(second, parameters, strict=True)]


def test_the_difference_tends_to_the_derivative_of_the_norm() -> None:
    model = network()
    norm, expected = exact(model)
    errors = []
    for step in (1e-2, 1e-3, 1e-4):
        model.zero_grad()
        found = penalty(model, step=step, start=2.0, radius=0.3).add(mean_margin(model), scale=0.5)
        assert found == pytest.approx(float(norm))
        grads = [p.grad for p in model.parameters()]
        errors.append(max(float((g - 0.5 * 2.0 * 0.3 * e).abs().max()) for g, e in zip(grads, expected, strict=True)))
        assert model.training
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2) and errors[2] < 1e-4 * max(
        float(e.abs().max()) for e in expected
    )


def test_parameters_keep_every_bit_and_gradients_are_added() -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    alone = penalty(model, start=1.0)
    alone.add(mean_margin(model))
    added = [p.grad.clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    penalty(model, start=1.0).add(mean_margin(model))
    for parameter, value, more in zip(model.parameters(), before, added, strict=True):
        assert torch.equal(parameter, value) and torch.equal(parameter.grad, more + 1)


def test_the_penalty_of_a_linear_model_has_no_gradient() -> None:
    model = nn.Linear(4, 1).double()
    found = penalty(model, start=5.0)
    found.add(mean_margin(model))
    assert all(float(p.grad.abs().max()) < 1e-12 for p in model.parameters())


@pytest.mark.parametrize(("threshold", "rises"), [(1e-6, True), (1e6, False)])
def test_the_multiplier_rises_above_the_threshold_alone_and_is_never_negative(threshold: float, rises: bool) -> None:
    model = network()
    found = penalty(model, threshold=threshold, start=0.5, rate=0.1)
    seen = [found.multiplier]
    for _ in range(3):
        found.add(mean_margin(model))
        seen.append(found.multiplier)
    assert seen == sorted(seen, reverse=not rises) and (seen[-1] > 0.5) is rises and min(seen) >= 0
    again = penalty(model, start=0.0)
    again.load_state_dict(found.state_dict())
    assert again.multiplier == found.multiplier


def test_only_the_named_parameters() -> None:
    model = network()
    penalty(model, parameters=r"^3\.", start=1.0).add(mean_margin(model))
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False]
    with pytest.raises(ConfigError, match="'nothing' matches no trained parameter") as caught:
        penalty(model, parameters="nothing")
    assert caught.value.code == "reward-sharpness"


def trained(
    folder: Path, model: Path, *, table: list[dict[str, object]] | None = None, **fields: Any
) -> dict[str, Tensor]:
    trainer = {"max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False,
               "learning_rate": 1e-3, "report_to": "none", **fields.pop("trainer", {})}  # fmt: skip
    config = RewardSection(model=str(model), max_length=32, trainer=trainer, **fields)
    train_reward_model(Dataset.from_list(rows(12) if table is None else table), config, folder, seed=0)
    return load_file(folder / "model.safetensors")


def test_training_with_a_zero_penalty_is_training_without(tmp_path: Path) -> None:
    model = bert_reward(tmp_path / "base")
    plain = trained(tmp_path / "plain", model)
    nothing = trained(tmp_path / "nothing", model, sharpness=SharpnessSection(start=0.0, rate=0.0))
    strong = trained(tmp_path / "strong", model, sharpness=SharpnessSection(start=10.0))
    assert all(torch.equal(plain[name], nothing[name]) for name in plain)
    assert any(not torch.equal(plain[name], strong[name]) for name in plain)


def test_two_equal_micro_batches_act_as_one(tmp_path: Path) -> None:
    model = bert_reward(tmp_path / "base")
    same = [{**rows(1)[0], "id": str(k)} for k in range(4)]
    penalized = {"sharpness": SharpnessSection(start=10.0, rate=0.0)}
    once = {"per_device_train_batch_size": 2, "max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "warmup_steps": 0}
    twice = once | {"gradient_accumulation_steps": 2}
    one, two = (
        trained(tmp_path / name, model, table=same, trainer=trainer, **penalized)
        for name, trainer in (("once", once), ("twice", twice))
    )
    plain = trained(tmp_path / "plain", model, table=same, trainer=once)
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-6)
    assert max(float((value - plain[name]).abs().max()) for name, value in one.items()) > 1e-4
