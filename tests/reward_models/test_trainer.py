"""RewardTrainer: learns under every objective, is trl's to the bit under Bradley-Terry; the loss of a step by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl
from datasets import Dataset

from align.config import ObjectiveSection, RewardSection, TiltSection
from align.losses.pair_weights import tilt
from reward_models.objectives import bradley_terry
from reward_models.registry import OBJECTIVES
from reward_models.score import RewardScorer
from reward_models.train import train_reward_model
from reward_models.trainer import RewardTrainer
from tests.helpers.builders import llama_reward, rows
from tests.reward_models.test_objectives import table

FAST = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "bf16": False, "use_cpu": True}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [*((name, {}) for name in OBJECTIVES), ("auc", {"within_group": True, "share": 0.5})],
)
def test_training_under_every_objective_learns(name: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    objective = ObjectiveSection(name=name, parameters=parameters)
    backbone = llama_reward(tmp_path / "backbone")
    config = RewardSection(model=str(backbone), objective=objective, max_length=64, trainer=FAST | {"max_steps": 20})
    train_reward_model(table(), config, tmp_path / "out", seed=0)
    scored = RewardScorer(tmp_path / "out", batch_tokens=512, max_length=64).score_pairs(table())
    assert float(np.mean(np.asarray(scored["margin"]) > 0)) >= 0.9


def test_bradley_terry_is_trl_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = llama_reward(tmp_path / "backbone")
    config = RewardSection(model=str(backbone), max_length=64, trainer=FAST | {"max_steps": 4})
    train_reward_model(table(), config, tmp_path / "ours", seed=0)
    monkeypatch.setattr(RewardTrainer, "compute_loss", trl.RewardTrainer.compute_loss)
    train_reward_model(table(), config, tmp_path / "trl", seed=0)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "trl"))
    assert first == second


def test_the_loss_of_a_step_is_the_mean_of_the_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """margin_mse by hand from the rewards of the step, centering included."""
    losses: list[tuple[float, float]] = []
    original = RewardTrainer.compute_loss

    def spy(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss, outputs = original(self, model, inputs, return_outputs=True)
        chosen, rejected = outputs.logits.detach().double().squeeze(-1).chunk(2)
        expected = ((chosen - rejected - inputs["teacher_margin"]) ** 2).mean() + 0.5 * (
            (chosen + rejected) ** 2
        ).mean()
        losses.append((float(loss.detach()), float(expected)))
        return loss

    monkeypatch.setattr(RewardTrainer, "compute_loss", spy)
    config = RewardSection(
        model=str(llama_reward(tmp_path / "m")), objective=ObjectiveSection(name="margin_mse"), max_length=64,
        trainer=FAST | {"max_steps": 2, "center_rewards_coefficient": 0.5},
    )  # fmt: skip
    train_reward_model(table(), config, tmp_path / "out", seed=0)
    assert len(losses) == 2 and all(loss == pytest.approx(expected, rel=1e-5) for loss, expected in losses)


def test_the_tilt_weights_the_loss_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bradley-Terry by hand from the rewards of the step, times the tilt of those losses."""
    losses: list[tuple[float, float]] = []
    original = RewardTrainer.compute_loss

    def spy(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss, outputs = original(self, model, inputs, return_outputs=True)
        per_pair = bradley_terry(*outputs.logits.detach().squeeze(-1).chunk(2))
        losses.append((float(loss.detach()), float((tilt(per_pair, sign=-1, temperature=0.1) * per_pair).mean())))
        return loss

    monkeypatch.setattr(RewardTrainer, "compute_loss", spy)
    config = RewardSection(
        model=str(llama_reward(tmp_path / "m")), tilt=TiltSection(kind="down", temperature=0.1), max_length=64,
        trainer={"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True}, objective=ObjectiveSection(),
    )  # fmt: skip
    train_reward_model(Dataset.from_list(rows(8)), config, tmp_path / "out", seed=0)
    assert len(losses) == 2 and all(loss == pytest.approx(expected, rel=1e-5) for loss, expected in losses)
