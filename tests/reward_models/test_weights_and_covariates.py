"""Weights of pairs and covariates in the training of a reward model: equal to repeated pairs, a planted cause."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.special import expit
from transformers import AutoTokenizer

from align.config import ObjectiveSection, RewardSection
from align.errors import AlignError
from align.io.files import read_json
from reward_models import RewardConfig, RewardTrainer
from reward_models.covariates import FILE, Coefficients, covariate_values
from reward_models.linear_heads import PENALTIES, Moments, fit_linear, fit_logistic
from reward_models.pair_weights import pair_weights
from reward_models.registry import resolve_objective
from reward_models.step_loss import StepLoss
from reward_models.train import train_reward_model
from tests.helpers.builders import llama_reward, rows
from tests.reward_models.test_heads import gaussian, logistic

PLAIN = {"per_device_train_batch_size": 6, "max_steps": 1, "learning_rate": 0.0, "bf16": False, "use_cpu": True}


def same(local: torch.Tensor) -> torch.Tensor:
    return local


def test_a_weight_is_the_pair_as_often_in_a_head() -> None:
    chosen, rejected, _ = gaussian(40, 3)
    weights = np.arange(40) % 3 * 1.0
    again = np.repeat(np.arange(40), weights.astype(int))
    scale = np.sqrt(((chosen - rejected) ** 2).mean(axis=0))
    repeated = np.sqrt(((chosen - rejected)[again] ** 2).mean(axis=0))
    head = fit_linear(chosen / scale, rejected / scale, logistic, {}, penalty=1e-6, weights=weights)
    other = fit_linear(chosen[again] / repeated, rejected[again] / repeated, logistic, {}, penalty=1e-6)
    assert head / scale == pytest.approx(other / repeated, abs=1e-3)
    difference = chosen - rejected
    assert Moments.of(difference, weights).naive_bayes() == pytest.approx(Moments.of(difference[again]).naive_bayes())


def test_the_penalty_of_a_head_is_that_of_all_pairs() -> None:
    """Of labels 40% of which are flipped, the half that agrees with a head alone would choose the smallest penalty."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 10))
    truth = rng.normal(size=10) * 0.6
    x[(rng.random(400) > expit(x @ truth)) ^ (rng.random(400) < 0.4)] *= -1
    fold, zero = np.arange(400) % 5, np.zeros_like(x)
    head, penalty = fit_logistic(x, zero, fold)
    kept = x @ head > np.median(x @ head)
    _, selected = fit_logistic(x[kept], zero[kept], fold[kept])
    weighted, chosen = fit_logistic(x, zero, fold, kept.astype(float))
    assert selected == PENALTIES[-1] < penalty == chosen
    scale = np.sqrt((x**2).mean(axis=0)) / np.sqrt((x[kept] ** 2).mean(axis=0))
    half = fit_linear(x[kept], zero[kept], logistic, {}, penalty=penalty / 2)
    assert weighted == pytest.approx(half, rel=0.3)
    assert scale == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("flips", [0.2, 0.4])
def test_a_known_cause_is_left_out_of_a_head(flips: float) -> None:
    """Labels follow length where the chosen text is the shorter one; accuracy on labels of the truth."""
    rng = np.random.default_rng(1)
    truth = rng.normal(size=6)
    quality, length = rng.normal(size=(1500, 6)), rng.normal(size=1500)
    quality[:, 0] = 0.7 * quality[:, 0] + 0.7 * length  # a text feature that knows the length
    right = np.where(rng.random(1500) < expit(quality @ truth), 1.0, -1.0)
    right[(right * length < 0) & (rng.random(1500) < 2 * flips)] *= -1
    x, z = quality * right[:, None], (length * right)[:, None]
    fold, zero = np.arange(1500) % 5, np.zeros_like(x)
    plain, _ = fit_logistic(x, zero, fold)
    with_length, _ = fit_logistic(np.hstack([x, z]), np.hstack([zero, 0 * z]), fold, free=1)
    accuracy = [
        float((np.sign(quality @ head) == np.sign(quality @ truth)).mean()) for head in (plain, with_length[:6])
    ]
    assert accuracy[1] > accuracy[0] + 0.03
    assert with_length[6] > 0.3


def test_the_loss_of_a_step_is_weighted_in_training_alone(tmp_path: Path) -> None:
    """A weight of 0 or 2 leaves the mean over the number of pairs; the evaluation counts every pair once."""
    model = str(llama_reward(tmp_path / "base"))
    table = rows(6)
    weights = [0.0, 2.0, 1.0, 0.5, 3.0, 1.0]

    def trained(pairs: list[dict[str, Any]], name: str) -> RewardTrainer:
        args = RewardConfig(str(tmp_path / name), **PLAIN, logging_steps=1, report_to="none")
        return RewardTrainer(model, args, train_dataset=pairs, eval_dataset=table)

    weighted = trained([row | {"weight": w} for row, w in zip(table, weights, strict=True)], "a")
    weighted.train()
    plain = trained(table, "b")
    plain.train()
    single = [trained([row], "c").evaluate([row])["eval_loss"] for row in table]
    assert weighted.state.log_history[0]["loss"] == pytest.approx(np.dot(weights, single) / 6, abs=2e-3)
    assert plain.state.log_history[0]["loss"] == pytest.approx(np.mean(single), abs=2e-3)
    assert weighted.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-6)


def test_coefficients_find_the_cause() -> None:
    """Margins of 0 and labels drawn from a covariate: the coefficient that a logistic regression has."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=4000)
    z[rng.random(4000) > expit(1.2 * z)] *= -1
    z /= np.sqrt((z**2).mean())
    values = torch.from_numpy(z).float()[:, None]
    coefficients = Coefficients(("length",), same)
    loss = StepLoss(
        resolve_objective(ObjectiveSection()), tilt=None, centering=None, gather=same, rank=0, processes=1,
        covariates=coefficients,
    )  # fmt: skip
    zeros = torch.zeros(4000, requires_grad=True)
    for step in range(200):
        loss(zeros, torch.zeros(4000), {}, step=step, z=values)
    wanted = fit_linear(z[:, None], 0 * z[:, None], logistic, {}, penalty=1e-9)[0]
    assert coefficients.state["values"][0] == pytest.approx(wanted, abs=0.02)
    evaluated, _ = loss(zeros, torch.zeros(4000), {}, z=values)
    assert float(evaluated) == pytest.approx(np.log(2))


def test_a_step_with_covariates_has_the_gradient_of_the_formula() -> None:
    """-log sigmoid(r_w - r_l + a z), by autograd; the centering does not see a z."""
    coefficients = Coefficients(("length",), same)
    coefficients.state["values"] = [0.7]
    loss_of = StepLoss(
        resolve_objective(ObjectiveSection()), tilt=None, centering=0.1, gather=same, rank=0, processes=1,
        covariates=coefficients,
    )  # fmt: skip
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen.requires_grad_()
    z = torch.arange(5.0, dtype=torch.float64)[:, None] - 2
    weights = torch.tensor([0.0, 1.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    found, _ = loss_of(chosen, rejected, {}, step=0, z=z, weights=weights)
    margin = chosen - rejected + 0.7 * z[:, 0]
    wanted = (weights * -torch.nn.functional.logsigmoid(margin)).mean() + 0.1 * ((chosen + rejected) ** 2).mean()
    assert torch.allclose(found, wanted)
    assert torch.allclose(*(torch.autograd.grad(value, chosen)[0] for value in (found, wanted)))
    slope = (weights * -torch.sigmoid(-margin) * z[:, 0]).sum()
    assert coefficients.pending["gradient"][0] == pytest.approx(float(slope))


@pytest.mark.parametrize("head", ["full", "logistic"])
def test_a_training_with_covariates_and_weights_runs(head: str, tmp_path: Path) -> None:
    table = [row | {"weight": 1.0 + k % 2, "answers": float(k % 5 - 2)} for k, row in enumerate(rows(12))]
    trainer = {key: PLAIN[key] for key in ("max_steps", "bf16", "use_cpu")} | {
        "learning_rate": 1e-3,
        "report_to": "none",
    }
    config = RewardSection(
        model=str(llama_reward(tmp_path / "base")), head=head, covariates=["length", "answers"],
        trainer=trainer | {"max_steps": 3, "per_device_train_batch_size": 4} if head == "full" else {},
    )  # fmt: skip
    train_reward_model(Dataset.from_list(table), config, tmp_path / "model", seed=0)
    AutoTokenizer.from_pretrained(tmp_path / "model")
    if head == "full":
        found = read_json(tmp_path / "model" / FILE)["coefficients"]
        assert sorted(found) == ["answers", "length"] and all(found.values())


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        ({}, ["words"], r"\[reward-covariate\] covariate words: found no such column"),
        ({"words": None}, ["words"], r"covariate words: found no finite number in pairs p0, p1, p2"),
        ({"words": "many"}, ["words"], r"found no finite number"),
        ({"words": 0.0}, ["words"], r"covariate words: found 0 for each of 4 pairs"),
        ({"chosen": " a b", "rejected": " c d"}, ["length"], r"covariate length: found 0 for each"),
    ],
)
def test_covariates_that_explain_nothing_are_named(change: dict[str, Any], names: list[str], message: str) -> None:
    table = Dataset.from_list([row | change for row in rows(4)])
    with pytest.raises(AlignError, match=message):
        covariate_values(table, names)


def test_objectives_without_labels_of_single_pairs_refuse_covariates(tmp_path: Path) -> None:
    args = RewardConfig(str(tmp_path / "out"), covariates=["length"], report_to="none", bf16=False, use_cpu=True)
    with pytest.raises(AlignError, match=r"\[reward-covariate\] covariates: found length with the objective auc"):
        RewardTrainer(str(llama_reward(tmp_path / "base")), args, train_dataset=rows(6), objective="auc")


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0, None], "found nan in pair p1,"), ([1.0, -1.0], "found -1 in pair p1,"), ([0.0, 0.0], "p0 and all others")],
)
def test_weights_that_cannot_be_are_named(weights: list[Any], message: str) -> None:
    table = Dataset.from_list([row | {"weight": w} for row, w in zip(rows(2), weights, strict=True)])
    with pytest.raises(AlignError, match=message):
        pair_weights(table)
    assert pair_weights(Dataset.from_list([row | {"weight": 1.0} for row in rows(2)])) is None


def test_the_configuration_refuses_covariates_of_naive_bayes() -> None:
    for values in ({"head": "naive-bayes", "covariates": ["length"]}, {"covariates": ["length", "length"]}):
        with pytest.raises(ValueError, match="covariates"):
            RewardSection(model="m", **json.loads(json.dumps(values)))
