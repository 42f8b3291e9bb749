"""Weights and shrinkages of pairs: limits, bounds, invariances; in both trainers, and over processes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.config import LossSection, ObjectiveSection, RewardSection, TiltSection, TrainSection, WeightsSection
from align.errors import ConfigError, DataError
from align.io.files import read_json
from align.losses.margin_weights import effective_sample_size, madpo_weight, trust_of_each
from align.losses.pair_weights import LossTilt, comp_sum_weight, mean_one, moderate, shaped, shrink_by_distance, tilt
from align.losses.pairwise import PairLogps
from align.losses.registry import resolve
from align.training.columns import add_trust, adjust_margins, normalise_weights
from align.training.train import bind, make_trainer, train_policy
from reward_models.objectives import bradley_terry, comp_sum
from reward_models.train import train_reward_model
from reward_models.trainer import ObjectiveRewardTrainer
from tests.helpers.builders import causal, llama_reward, rows

SHAPES = ("lin_upper", "quadratic", "extremes")
losses_of = st.lists(st.floats(0, 20), min_size=2, max_size=12).map(lambda v: torch.tensor(v, dtype=torch.float64))
temperatures = st.floats(0.3, 5)


@given(losses_of, temperatures, st.sampled_from([1, -1]))
def test_tilt_is_the_derivative_of_the_robust_loss(losses: Tensor, temperature: float, sign: int) -> None:
    free = losses.clone().requires_grad_()
    robust = sign * temperature * (torch.logsumexp(sign * free / temperature, 0) - math.log(len(losses)))
    (gradient,) = torch.autograd.grad(robust, free)
    found = tilt(losses, sign=sign, temperature=temperature)
    assert torch.allclose(found, len(losses) * gradient, atol=1e-10)
    assert float(found.mean()) == pytest.approx(1) and not found.requires_grad
    assert torch.allclose(tilt(losses + 3, sign=sign, temperature=temperature), found)
    assert (sign * (found[losses.argmax()] - found[losses.argmin()])) >= 0
    assert torch.allclose(tilt(losses, sign=sign, temperature=1e9), torch.ones_like(losses), atol=1e-6)


@given(losses_of, temperatures, st.sampled_from(SHAPES), st.floats(0.1, 9), st.floats(-5, 5), st.randoms())
def test_shapes(losses: Tensor, temperature: float, shape: Any, factor: float, shift: float, random: Any) -> None:
    found = shaped(losses, shape=shape, temperature=temperature)
    assert (
        float(found.mean()) == pytest.approx(1) and float(found.max() / found.min()) <= math.exp(1 / temperature) + 1e-9
    )
    order = torch.tensor(random.sample(range(len(losses)), len(losses)))
    assert torch.allclose(shaped(losses[order], shape=shape, temperature=temperature), found[order])
    if float(losses.max() - losses.min()) > 1e-2:
        moved = shaped(factor * losses + shift, shape=shape, temperature=temperature)
        assert torch.allclose(moved, found, atol=1e-6)
    assert torch.allclose(shaped(losses, shape=shape, temperature=1e8), torch.ones_like(losses), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_losses_weigh_alike(shape: Any) -> None:
    assert torch.allclose(shaped(torch.full((5,), 2.0), shape=shape, temperature=0.4), torch.ones(5))


def test_what_the_shapes_favour() -> None:
    losses = torch.linspace(0, 1, 11)
    raised = {s: shaped(losses, shape=s, temperature=0.4, quantiles=(0, 1)) for s in SHAPES}  # type: ignore[arg-type]
    assert torch.allclose(raised["lin_upper"][5:], raised["lin_upper"][5].expand(6)) and raised["lin_upper"][0] < 0.3
    assert raised["quadratic"].argmax() == 5 and raised["extremes"].argmin() == 5
    assert float(raised["quadratic"].max() / raised["quadratic"].min()) == pytest.approx(math.exp(1 / 0.4), rel=1e-5)


def test_quantiles_keep_an_outlier_from_deciding() -> None:
    losses = torch.cat([torch.linspace(0.2, 1.2, 60), torch.tensor([50.0])])
    by_ends = shaped(losses, shape="lin_upper", temperature=0.4, quantiles=(0, 1))
    by_quantiles = shaped(losses, shape="lin_upper", temperature=0.4)
    assert (
        float(by_ends[:-1].max() / by_ends[:-1].min()) < 1.2 < 5 < float(by_quantiles[:-1].max() / by_quantiles.min())
    )
    assert float(by_ends[-1]) > 5 * float(by_quantiles[-1])


@given(st.lists(st.floats(-15, 15), min_size=1, max_size=9), st.floats(1, 3))
def test_comp_sum_weight(gaps: list[float], tau: float) -> None:
    """It turns Bradley-Terry's gradient into comp-sum's, and is a tilt of the losses before normalisation."""
    gap = torch.tensor(gaps, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(gap)
    (plain,) = torch.autograd.grad(bradley_terry(gap, zero).sum(), gap)
    (wanted,) = torch.autograd.grad(comp_sum(gap, zero, tau=tau).sum(), gap)
    weight = comp_sum_weight(gap, tau=tau)
    assert torch.allclose(weight * plain, wanted, atol=1e-12) and (weight <= 1).all() and (weight > 0).all()
    assert not weight.requires_grad
    if tau > 1.01:
        tilted = tilt(bradley_terry(gap, zero), sign=-1, temperature=1 / (tau - 1))
        assert torch.allclose(mean_one(weight), tilted, rtol=1e-9, atol=1e-12)
    assert torch.isfinite(comp_sum_weight(torch.tensor([-1e4, 1e4]), tau=0.0)).all()


@given(st.floats(-9, 9), st.floats(0, 50), st.floats(0, 20), st.floats(0.1, 5))
def test_distance_shrinks_towards_nothing(margin: float, distance: float, limit: float, softness: float) -> None:
    m, d = torch.tensor([margin]), torch.tensor([distance])
    found = float(shrink_by_distance(m, d, limit=limit, softness=softness))
    assert abs(found) <= abs(margin) + 1e-6 and found * margin >= 0
    farther = float(shrink_by_distance(m, d + 1, limit=limit, softness=softness))
    assert abs(farther) <= abs(found)
    if distance <= limit:
        assert found == pytest.approx(margin)


def test_moderation_is_the_mean_of_the_ensemble() -> None:
    """Against E sigmoid(m + s e) by quadrature; MacKay's approximation is good to 0.02."""
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    for m in (-3.0, -0.5, 0.0, 1.0, 4.0):
        for s in (0.0, 0.5, 2.0, 6.0):
            mean = float(torch.trapezoid(torch.sigmoid(m + s * grid) * density, grid))
            found = moderate(torch.tensor(m, dtype=torch.float64), torch.tensor(s, dtype=torch.float64))
            assert float(torch.sigmoid(found)) == pytest.approx(mean, abs=0.02)
    assert float(moderate(torch.tensor(2.0), torch.tensor(0.0))) == 2.0
    large = moderate(torch.tensor(2.0), torch.tensor(1e4))
    assert float(large) == pytest.approx(2.0 / (1e4 * math.sqrt(math.pi / 8)), rel=1e-3)


def test_mean_one_and_effective_size() -> None:
    weight = torch.tensor([0.0, 1.0, 3.0])
    assert float(mean_one(weight).mean()) == pytest.approx(1)
    assert float(effective_sample_size(mean_one(weight))) == pytest.approx(float(effective_sample_size(weight)))
    assert mean_one(torch.zeros(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["up", "down", "lin_upper", "quadratic", "extremes", "comp_sum"])
def test_two_processes_weigh_as_one_does(kind: Any) -> None:
    config = TiltSection(kind=kind, temperature=0.5, warmup=2)
    losses, gap = torch.tensor([0.1, 2.0, 0.7, 0.4]), torch.tensor([2.0, -2.0, 0.0, 1.0])
    whole, share = LossTilt(config, lambda own: own, 0)(losses, gap, 2)
    parts = []
    both = torch.stack([losses, gap], dim=1)
    for rank in (0, 1):
        own = slice(2 * rank, 2 * rank + 2)
        found, same = LossTilt(config, lambda _: both, rank)(losses[own], gap[own], 2)
        parts.append(found)
        assert same == share < 1
    assert torch.equal(torch.cat(parts), whole)
    assert LossTilt(config, lambda own: own, 0)(losses, gap, 1)[0].tolist() == [1, 1, 1, 1]


def pairs(count: int = 12) -> Dataset:
    table = Dataset.from_list(rows(count))
    spread = [0.1 + 0.3 * (k % 4) for k in range(count)]
    return table.add_column("margin_std", spread).add_column("ood", [float(k) for k in range(count)])


def test_margins_are_adjusted_before_the_weight_is_made() -> None:
    weights = WeightsSection(spread=True, ood={"limit": 4, "softness": 2}, normalise=True)  # type: ignore[arg-type]
    table = pairs()
    margin, std, ood = (torch.tensor(table[name], dtype=torch.float64) for name in ("margin", "margin_std", "ood"))
    expected = shrink_by_distance(moderate(margin, std), ood, limit=4, softness=2)
    found = adjust_margins(table, weights)
    assert torch.allclose(torch.tensor(found["margin"], dtype=torch.float64), expected)
    assert float((expected - margin).abs().max()) > 0.1
    assert adjust_margins(table, WeightsSection(normalise=True)) is table
    weighted = table.add_column("weight", [1.0, 3.0] * 6)
    assert normalise_weights(weighted, weights)["weight"] == [0.5, 1.5] * 6
    with pytest.raises(DataError, match=r"weights-column.*margin_std: found no value.*\n.*reward.ensemble"):
        adjust_margins(table.remove_columns("margin_std"), weights)


@pytest.mark.parametrize(
    ("loss", "weights", "message"),
    [
        ("dpo", {"spread": True}, "ood and spread shrink the margin, and dpo reads none"),
        ("madpo", {"trust_by_spread": True}, "trust_by_spread: madpo has no trust"),
        ("beta_dpo", {"tilt": {"kind": "up"}}, "beta_dpo has no loss of a pair alone to weight by"),
    ],
)
def test_weights_that_a_loss_cannot_have(loss: str, weights: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bind("m", LossSection(loss=loss, weights=WeightsSection.model_validate(weights)))


SMALL = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 3, "use_cpu": True, "max_length": 64,
    "gradient_checkpointing": False,
}  # fmt: skip


def test_trust_of_each_pair_is_trained_with(tmp_path: Path) -> None:
    """The loss of a step is the mean over its pairs of each pair's loss at its own trust."""
    parameters: dict[str, float | bool] = {"slope": 1.0, "trust": 0.5, "strength": 1.0}
    config = LossSection(loss="trust", parameters=parameters, weights=WeightsSection(trust_by_spread=True))
    table, loss = pairs(4), bind("m", config)
    trusted = add_trust(table, config.weights, loss)
    each = trust_of_each(torch.tensor(table["margin_std"], dtype=torch.float64), 0.5)
    assert trusted["trust"] == pytest.approx(each.tolist()) and float(each.std()) > 0.05
    train = TrainSection(model=str(causal(tmp_path / "policy")), methods={"m": config}, trainer=SMALL)
    found = []
    for data in (table, trusted):
        trainer = make_trainer(data, train, loss, tmp_path / "a", seed=0, tau=2.0, reference_cache=None)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        with torch.no_grad():
            found.append(float(trainer.compute_loss(trainer.model, dict(batch))))
    zero = PairLogps(*(torch.zeros(4, dtype=torch.float64) for _ in range(4)), *(torch.ones(4) for _ in range(2)))
    margin = torch.tensor(table["margin"], dtype=torch.float64)
    for value, own in zip(found, (None, each), strict=True):
        assert value == pytest.approx(float(loss(zero, margin, own).mean()), rel=1e-5)
    assert abs(found[0] - found[1]) > 1e-3
    with pytest.raises(DataError, match=r"weights-column.*margin_std: found no value.*trust_by_spread"):
        add_trust(table.remove_columns("margin_std"), config.weights, loss)


def test_the_tilt_multiplies_the_weight_of_a_policy_step(tmp_path: Path) -> None:
    policy = causal(tmp_path / "policy")
    config = TrainSection(model=str(policy), methods={"m": LossSection(loss="dpo")}, trainer=SMALL)
    table = pairs(4).add_column("weight", [0.5, 1.0, 2.0, 1.0])
    options = {"seed": 0, "tau": 2.0, "reference_cache": None}
    chosen = TiltSection(kind="down", temperature=0.05)
    trainer = make_trainer(table, config, resolve("dpo", {}), tmp_path / "a", tilt=chosen, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(4)])
    found = float(trainer.compute_loss(trainer.model.train(), batch).detach())
    trainer.tilt = None
    losses = []
    for k in range(4):
        alone = trainer.data_collator([trainer.train_dataset[k]])
        losses.append(trainer.compute_loss(trainer.model, alone).detach() / table[k]["weight"])
    each = torch.stack(losses)
    tilted = tilt(each, sign=-1, temperature=0.05)
    assert float(tilted.max()) > 1.05
    assert found == pytest.approx(float((torch.tensor(table["weight"]) * tilted * each).mean()), rel=1e-4)


def test_madpo_with_all_weights_trains_and_logs_its_effective_size(tmp_path: Path) -> None:
    policy = causal(tmp_path / "policy")
    weights = {"spread": True, "ood": {"limit": 4}, "normalise": True, "tilt": {"kind": "up", "temperature": 0.01}}
    method = {"loss": "madpo", "parameters": {"tau": 1.0, "c_max": 4.0, "c_min": 0.1}, "weights": weights}
    config = TrainSection.model_validate({"model": str(policy), "methods": {"m": method}, "trainer": SMALL})
    train_policy(pairs(), config, "m", tmp_path / "out", seed=0)
    history = read_json(tmp_path / "out" / "history.json")
    shares = [entry["weight/ess_share"] for entry in history["history"]]
    assert history["loss"]["weights"]["spread"] is True and all(0 < share < 1 for share in shares)
    table = adjust_margins(pairs(), config.methods["m"].weights)
    margin = torch.tensor(table["margin"], dtype=torch.float64)
    assert float(madpo_weight(margin, tau=1.0, c_max=4.0, c_min=0.1).std()) > 0.05


def test_the_tilt_of_a_reward_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    original = ObjectiveRewardTrainer.compute_loss

    def spy(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss, outputs = original(self, model, inputs, return_outputs=True)
        each = bradley_terry(*outputs.logits.detach().squeeze(-1).chunk(2))
        seen.append((float(loss.detach()), float((tilt(each, sign=-1, temperature=0.1) * each).mean())))
        return loss

    monkeypatch.setattr(ObjectiveRewardTrainer, "compute_loss", spy)
    config = RewardSection(
        model=str(llama_reward(tmp_path / "m")), tilt=TiltSection(kind="down", temperature=0.1), max_length=64,
        trainer={"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True}, objective=ObjectiveSection(),
    )  # fmt: skip
    train_reward_model(Dataset.from_list(rows(8)), config, tmp_path / "out", seed=0)
    assert len(seen) == 2 and all(loss == pytest.approx(expected, rel=1e-5) for loss, expected in seen)
