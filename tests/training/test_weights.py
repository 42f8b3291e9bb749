"""Weights, trust and shrunken margins in a training: columns of the table, and the loss of a step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from align.config import LossSection, TiltSection, TrainSection, WeightsSection
from align.errors import ConfigError, DataError
from align.io.files import read_json
from align.losses.margin_weights import madpo_weight, trust_of_each
from align.losses.pair_weights import moderate, shrink_by_distance, tilt
from align.losses.pairwise import PairLogps
from align.training.columns import add_trust, adjust_margins, normalize_weights
from align.training.loss_choice import bind
from align.training.train import make_trainer, train_policy
from tests.helpers.builders import causal, rows


def pairs(count: int = 12) -> Dataset:
    table = Dataset.from_list(rows(count))
    spread = [0.1 + 0.3 * (k % 4) for k in range(count)]
    return table.add_column("margin_std", spread).add_column("ood", [float(k) for k in range(count)])


def test_margins_are_adjusted_before_the_weight_is_made() -> None:
    weights = WeightsSection(spread=True, ood={"limit": 4, "softness": 2}, normalise=True)  # type: ignore[arg-type]
    table = pairs()
    margin, std, ood = (torch.tensor(table[name], dtype=torch.float64) for name in ("margin", "margin_std", "ood"))
    expected = shrink_by_distance(moderate(margin, std), ood, limit=4, softness=2)
    adjusted = adjust_margins(table, weights)
    assert torch.allclose(torch.tensor(adjusted["margin"], dtype=torch.float64), expected)
    assert float((expected - margin).abs().max()) > 0.1
    assert adjust_margins(table, WeightsSection(normalise=True)) is table
    weighted = table.add_column("weight", [1.0, 3.0] * 6)
    assert normalize_weights(weighted, weights)["weight"] == [0.5, 1.5] * 6
    with pytest.raises(DataError, match=r"weights-column.*margin_std: found no value.*\n.*reward.ensemble"):
        adjust_margins(table.remove_columns("margin_std"), weights)


@pytest.mark.parametrize(
    ("loss", "weights", "message"),
    [
        ("dpo", {"spread": True}, "ood and spread shrink the margin, and dpo reads none"),
        ("madpo", {"trust_by_spread": True}, "trust_by_spread: madpo has no trust"),
        ("beta_dpo", {"tilt": {"kind": "up"}}, "beta_dpo has no loss for a single pair"),
    ],
)
def test_weights_that_do_not_fit_the_loss_are_refused(loss: str, weights: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bind("m", LossSection(loss=loss, weights=WeightsSection.model_validate(weights)))


SMALL = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 3, "use_cpu": True, "max_length": 64,
    "gradient_checkpointing": False,
}  # fmt: skip


def test_trust_of_each_pair_is_trained_with(tmp_path: Path) -> None:
    """The loss of a step is the mean over its pairs of their losses, each at the trust of its pair."""
    parameters: dict[str, float | bool] = {"slope": 1.0, "trust": 0.5, "strength": 1.0}
    config = LossSection(loss="trust", parameters=parameters, weights=WeightsSection(trust_by_spread=True))
    table, loss = pairs(4), bind("m", config)
    trusted = add_trust(table, config.weights, loss)
    each = trust_of_each(torch.tensor(table["margin_std"], dtype=torch.float64), 0.5)
    assert trusted["trust"] == pytest.approx(each.tolist()) and float(each.std()) > 0.05
    policy, losses = str(causal(tmp_path / "policy")), []
    for method in (config.model_copy(update={"weights": None}), config):
        train = TrainSection(model=policy, methods={"m": method}, trainer=SMALL)
        trainer = make_trainer(table, train, "m", tmp_path / "a", seed=0)
        batch = trainer.data_collator([trainer.train_dataset[k] for k in range(4)])
        with torch.no_grad():
            losses.append(float(trainer.compute_loss(trainer.model, batch)))
    zero = PairLogps(*(torch.zeros(4, dtype=torch.float64) for _ in range(4)), *(torch.ones(4) for _ in range(2)))
    margin = torch.tensor(table["margin"], dtype=torch.float64)
    for value, trust in zip(losses, (None, each), strict=True):
        assert value == pytest.approx(float(loss(zero, margin, trust).mean()), rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3
    with pytest.raises(DataError, match=r"weights-column.*margin_std: found no value.*trust_by_spread"):
        add_trust(table.remove_columns("margin_std"), config.weights, loss)


def test_the_tilt_multiplies_the_weight_of_a_policy_step(tmp_path: Path) -> None:
    policy = causal(tmp_path / "policy")
    section = WeightsSection(tilt=TiltSection(kind="down", temperature=0.05))
    method = LossSection(loss="dpo", weights=section)
    config = TrainSection(model=str(policy), methods={"m": method}, trainer=SMALL)
    table = pairs(4).add_column("weight", [0.5, 1.0, 2.0, 1.0])
    trainer = make_trainer(table, config, "m", tmp_path / "a", seed=0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(4)])
    loss = float(trainer.compute_loss(trainer.model.train(), batch).detach())
    trainer.tilt = None
    losses = []
    for k in range(4):
        single = trainer.data_collator([trainer.train_dataset[k]])
        losses.append(trainer.compute_loss(trainer.model, single).detach() / table[k]["weight"])
    each = torch.stack(losses)
    tilted = tilt(each, sign=-1, temperature=0.05)
    assert float(tilted.max()) > 1.05
    assert loss == pytest.approx(float((torch.tensor(table["weight"]) * tilted * each).mean()), rel=1e-4)


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
