"""Objectives that read votes: Bradley-Terry without ties, probabilities that sum to one, planted parameters found."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from align.errors import DataError
from reward_models import OBJECTIVES, RewardConfig, RewardTrainer
from reward_models.objectives import bradley_terry
from reward_models.registry import bind_objective
from reward_models.tie_parameter import FILE, TieParameter
from reward_models.vote_objectives import binomial, davidson, rao_kupper
from tests.helpers.builders import llama_reward, rows

WITH_TIES = (rao_kupper, davidson)
GAPS = torch.tensor([-3.0, -0.5, 0.0, 0.7, 4.0], dtype=torch.float64)
ZERO = torch.zeros_like(GAPS)
ONE = torch.ones_like(GAPS)


@pytest.mark.parametrize("objective", [binomial, rao_kupper, davidson])
@pytest.mark.parametrize("count", [1.0, 7.0])
def test_votes_n_of_n_without_ties_are_a_hard_label(objective: Any, count: float) -> None:
    without = {} if objective is binomial else {"tie": 0.0}
    loss = objective(GAPS, ZERO, count * ONE, ZERO, ZERO, **without)
    torch.testing.assert_close(loss, bradley_terry(GAPS, ZERO))
    torch.testing.assert_close(objective(GAPS, ZERO, ZERO, count * ONE, ZERO, **without), bradley_terry(ZERO, GAPS))
    by_votes = objective(GAPS, ZERO, count * ONE, ZERO, ZERO, by_votes=True, **without)
    torch.testing.assert_close(by_votes, count * loss)


@pytest.mark.parametrize("objective", WITH_TIES)
@pytest.mark.parametrize("tie", [1e-3, 0.5, 2.0])
def test_the_three_outcomes_are_probabilities(objective: Any, tie: float) -> None:
    outcomes = [(ONE, ZERO, ZERO), (ZERO, ONE, ZERO), (ZERO, ZERO, ONE)]
    won, lost, tied = (torch.exp(-objective(GAPS, ZERO, *votes, tie=tie)) for votes in outcomes)
    torch.testing.assert_close(won + lost + tied, ONE)
    torch.testing.assert_close(tied.max(), tied[2])
    if objective is davidson:
        torch.testing.assert_close(tied, tie * (won * lost).sqrt())
        assert float(tied[2]) == pytest.approx(tie / (2 + tie))
    else:
        torch.testing.assert_close(tied, math.expm1(2 * tie) * won * lost)
        torch.testing.assert_close(won, torch.sigmoid(GAPS - tie))


@pytest.mark.parametrize("objective", [binomial, *WITH_TIES])
def test_losses_and_gradients_are_finite(objective: Any) -> None:
    gaps = torch.tensor([-1e4, -60.0, 0.0, 60.0, 1e4], requires_grad=True)
    loss = objective(gaps, torch.zeros(5), torch.tensor([1.0, 0, 0, 2, 0]), torch.ones(5), torch.ones(5))
    (gradient,) = torch.autograd.grad(loss.sum(), gaps)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


def test_votes_are_the_mean_of_hard_labels() -> None:
    for objective in (binomial, rao_kupper, davidson):
        tie = {} if objective is binomial else {"tie": 0.3}
        single = [
            objective(GAPS, ZERO, *votes, **tie) for votes in ((ONE, ZERO, ZERO), (ZERO, ONE, ZERO), (ZERO, ZERO, ONE))
        ]
        mixed = objective(GAPS, ZERO, 3 * ONE, 2 * ONE, 1 * ONE, **tie)
        torch.testing.assert_close(mixed, (3 * single[0] + 2 * single[1] + single[2]) / 6)


@pytest.mark.parametrize(("name", "planted"), [("davidson", 0.8), ("rao_kupper", 0.6)])
def test_a_planted_tie_parameter_is_found(name: str, planted: float) -> None:
    """From a start far away, with the rewards known; in two processes and micro-batches as in one batch."""
    rng = np.random.default_rng(0)
    gaps = torch.tensor(rng.normal(size=3000))
    function = OBJECTIVES[name].function
    one, zero = torch.ones_like(gaps), torch.zeros_like(gaps)
    outcomes = [(one, zero, zero), (zero, one, zero), (zero, zero, one)]
    chances = np.stack([torch.exp(-function(gaps, zero, *votes, tie=planted)).numpy() for votes in outcomes], axis=1)
    drawn = np.array([rng.choice(3, p=row / row.sum()) for row in chances])
    columns = dict(zip(("votes_chosen", "votes_rejected", "votes_tie"), torch.tensor(np.eye(3)[drawn].T), strict=True))
    learned = TieParameter(bind_objective(name, {"tie": 5.0}), lambda values: values)
    parts = TieParameter(bind_objective(name, {"tie": 5.0}), lambda values: values)
    for step in range(150):
        learned.bound(step)
        learned.see(gaps, zero, columns, None)
        for half in (slice(0, 1000), slice(1000, 3000)):
            parts.bound(step)
            parts.see(gaps[half], zero[half], {key: values[half] for key, values in columns.items()}, None)
    assert learned.value == pytest.approx(planted, rel=0.1)
    assert parts.value == pytest.approx(learned.value, rel=1e-9)


def voted(count: int) -> Dataset:
    ties = {"votes_chosen": 0.0, "votes_rejected": 0.0, "votes_tie": 2.0}
    wins = {"votes_chosen": 2.0, "votes_rejected": 1.0, "votes_tie": 0.0}
    return Dataset.from_list([row | (ties if k % 3 == 0 else wins) for k, row in enumerate(rows(count))])


def trained(folder: Path, output: Path, steps: int, resume: str | None = None) -> RewardTrainer:
    args = RewardConfig(
        str(output), max_steps=steps, per_device_train_batch_size=4, bf16=False, use_cpu=True, report_to="none",
        save_strategy="steps", save_steps=2, disable_tqdm=True, logging_steps=1, learning_rate=1e-3,
        gradient_checkpointing=False, max_length=64,
    )  # fmt: skip
    made = RewardTrainer(str(folder), args, train_dataset=voted(12), objective="davidson")
    made.train(resume)
    return made


def test_training_learns_the_tie_parameter_and_keeps_it(tmp_path: Path) -> None:
    model = llama_reward(tmp_path / "model")
    whole = trained(model, tmp_path / "whole", 4)
    ties = [entry["tie"] for entry in whole.state.log_history if "tie" in entry]
    assert ties[0] == 0.5 and len(set(ties)) == 4
    whole.save_model(str(tmp_path / "saved"))
    found = json.loads((tmp_path / "saved" / FILE).read_text())
    assert found["objective"] == "davidson" and found["tie"] == pytest.approx(whole.step_loss.ties.value)  # type: ignore[union-attr]
    resumed = trained(model, tmp_path / "whole", 4, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.step_loss.ties.value == whole.step_loss.ties.value  # type: ignore[union-attr]


@pytest.mark.parametrize("objective", ["bradley_terry", "comp_sum", "auc"])
def test_pairs_without_a_majority_are_no_labels(objective: str, tmp_path: Path) -> None:
    args = RewardConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(DataError, match=r"4 of 12 pairs have no majority for chosen, and the objective") as caught:
        RewardTrainer(str(llama_reward(tmp_path / "m")), args, train_dataset=voted(12), objective=objective)
    assert caught.value.code == "votes"


def test_impossible_votes_are_named(tmp_path: Path) -> None:
    table = voted(6).remove_columns("votes_tie").add_column("votes_tie", [0.0] * 6)
    args = RewardConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(DataError, match="found 0 votes for chosen, 0 for rejected and 0 for neither, expected numbers"):
        RewardTrainer(str(llama_reward(tmp_path / "m")), args, train_dataset=table, objective="binomial")
