"""Remedies against their definitions on drawn gradients, and inside a training against real steps."""

import math
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.config import LossSection, RemedySection, TokenMaskSection, TrainSection
from align.entanglement.conditions import changes
from align.entanglement.remedies import BandState, calibrate, hold_batch, hold_chosen, normalise
from align.errors import ConfigError
from align.training.loss_choice import bind
from align.training.train import make_trainer
from align.training.trainer import PreferenceTrainer
from tests.entanglement.test_conditions import vectors
from tests.helpers.builders import rows
from tests.training.test_trainer import BASE

POSITIVE = st.floats(0.05, 20)
SEED = st.integers(0, 10**6)


def products(gw: Tensor, gl: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (gw * gw).sum(1), (gl * gl).sum(1), (gw * gl).sum(1)


@given(SEED, st.floats(-5, 20), st.floats(-5, 20), st.floats(0, 0.9))
def test_hold_chosen_takes_the_largest_factor_that_holds(seed: int, d_w: float, d_l: float, keep: float) -> None:
    gw, gl = vectors(seed, 6)
    chosen_sq, rejected_sq, inner = products(gw, gl)
    w, r = torch.full((6,), d_w, dtype=torch.float64), torch.full((6,), d_l, dtype=torch.float64)
    a_w, a_l = hold_chosen(chosen_sq, inner, w, r, keep=keep)
    before = changes(chosen_sq, rejected_sq, inner, w, r, noise=1e-9).chosen
    after = changes(chosen_sq, rejected_sq, inner, a_w * w, a_l * r, noise=1e-9).chosen
    wanted = keep * w * chosen_sq
    fine = (before >= wanted) | (w <= 0)
    assert torch.equal(a_w, torch.ones_like(a_w)) and torch.equal(a_l[fine], torch.ones_like(a_l[fine]))
    assert torch.allclose(after[~fine], wanted[~fine], atol=1e-9) and ((a_l[~fine] >= 0) & (a_l[~fine] < 1)).all()


@given(SEED, st.lists(st.floats(0.05, 3), min_size=3, max_size=3), st.floats(0, 0.9))
def test_hold_batch_holds_every_chosen_response(seed: int, weights: list[float], keep: float) -> None:
    """In the step on the mean loss, by explicit gradients; raising any factor alone would break the bound."""
    gw, gl = vectors(seed, 3)
    d = torch.tensor(weights, dtype=torch.float64)
    stacked = torch.cat([gw, gl])
    a_w, a_l = hold_batch(stacked @ stacked.T, d, d, keep=keep)
    of_chosen = gw @ (d @ gw)
    wanted = torch.where(of_chosen > 0, keep * of_chosen, of_chosen)
    change = gw @ (d @ gw - (a_l * d) @ gl)
    assert torch.equal(a_w, torch.ones_like(a_w)) and ((a_l >= 0) & (a_l <= 1)).all()
    assert (change >= wanted - 1e-6 * (1 + of_chosen.abs())).all()
    for k in range(3):
        raised = a_l.clone()
        raised[k] = min(1.0, float(a_l[k]) + 1e-3)
        more = gw @ (d @ gw - (raised * d) @ gl)
        assert a_l[k] > 1 - 1e-6 or (more < wanted + 1e-6).any()


def test_hold_batch_does_not_change_a_batch_in_which_nothing_falls() -> None:
    gram = torch.eye(4, dtype=torch.float64)
    d = torch.tensor([0.05, 0.5], dtype=torch.float64)
    assert all(torch.equal(factor, torch.ones(2, dtype=torch.float64)) for factor in hold_batch(gram, d, d, keep=0.0))


def test_hold_batch_includes_the_pull_of_other_pairs() -> None:
    """The second pair's rejected gradient lies along the first pair's chosen one."""
    gw, gl = torch.eye(2, 4, dtype=torch.float64), torch.tensor([[0.0, 0, 1, 0], [3.0, 0, 0, 1]], dtype=torch.float64)
    d = torch.ones(2, dtype=torch.float64)
    alone = hold_chosen(*products(gw, gl)[::2], d, d, keep=0.0)[1]
    assert torch.equal(alone, torch.ones_like(alone))
    stacked = torch.cat([gw, gl])
    together = hold_batch(stacked @ stacked.T, d, d, keep=0.0)[1]
    assert together.tolist() == pytest.approx([1.0, 1 / 3])


def test_hold_batch_leaves_out_rejected_gradients_where_no_factors_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear program that fails must not let every rejected gradient through."""
    monkeypatch.setattr("align.entanglement.remedies.linprog", lambda *args, **options: SimpleNamespace(success=False))
    gw, gl = torch.eye(2, 4, dtype=torch.float64), torch.tensor([[0.0, 0, 1, 0], [3.0, 0, 0, 1]], dtype=torch.float64)
    d, stacked = torch.ones(2, dtype=torch.float64), torch.cat([gw, gl])
    a_w, a_l = hold_batch(stacked @ stacked.T, d, d, keep=0.0)
    assert a_w.tolist() == [1.0, 1.0] and a_l.tolist() == [0.0, 0.0]


@given(SEED, POSITIVE, POSITIVE)
def test_normalise_separates_and_keeps_the_product(seed: int, d_w: float, d_l: float) -> None:
    gw, gl = vectors(seed, 5)
    measured = products(gw, gl)
    w, r = torch.full((5,), d_w, dtype=torch.float64), torch.full((5,), d_l, dtype=torch.float64)
    a_w, a_l = normalise(*measured[:2], w, r)
    assert torch.allclose(a_w * a_l, torch.ones_like(a_w))
    verdicts = changes(*measured, a_w * w, a_l * r, noise=1e-5).verdicts()
    assert set(verdicts) <= {"separated", "undecided"}
    step = (a_w * w)[:, None] * gw - (a_l * r)[:, None] * gl
    size = math.sqrt(d_w * d_l) * (measured[0] * measured[1]) ** 0.25
    unit = gw / measured[0].sqrt()[:, None] - gl / measured[1].sqrt()[:, None]
    assert torch.allclose(step, size[:, None] * unit)


def test_normalise_skips_pairs_without_a_ratio() -> None:
    """A weight that is not positive, or a zero gradient."""
    values = torch.tensor([[1.0, 4.0, -0.5, 1.0], [1.0, 4.0, 0.5, 0.0], [0.0, 4.0, 0.5, 0.5]], dtype=torch.float64)
    a_w, a_l = normalise(*values.T)
    assert torch.equal(a_w, torch.ones_like(a_w)) and torch.equal(a_l, torch.ones_like(a_l))


@given(SEED, POSITIVE, POSITIVE, st.floats(0, 0.99))
def test_calibrate_against_its_definition(seed: int, d_w: float, d_l: float, decay: float) -> None:
    """Gradients of mean log-probs, running averages of four logarithms, half the difference of the ratios."""
    state, logs = None, None
    w, r = torch.full((4,), d_w, dtype=torch.float64), torch.full((4,), d_l, dtype=torch.float64)
    for turn in range(3):
        gw, gl = vectors(seed + turn, 4)
        stacked = torch.cat([gw, gl])
        a_w, a_l, state = calibrate(stacked @ stacked.T, w, r, state, decay=decay, mean=lambda values: values)
        new = [math.log(v) for v in (d_w, d_l, float(gw.mean(0).norm()), float(gl.mean(0).norm()))]
        logs = new if logs is None else [decay * a + (1 - decay) * b for a, b in zip(logs, new, strict=True)]
        assert astuple(state) == pytest.approx(logs)
        expected = math.exp(((logs[3] - logs[2]) - (logs[0] - logs[1])) / 2)
        assert torch.allclose(a_w, torch.full_like(a_w, expected)) and torch.allclose(a_l, 1 / a_w)
    if decay == 0:
        assert float(a_w[0] * d_w / (a_l[0] * d_l)) == pytest.approx(float(gl.mean(0).norm() / gw.mean(0).norm()))


def test_calibrate_skips_weights_that_are_not_positive() -> None:
    before = BandState(0.1, 0.2, 0.3, 0.9)
    d = torch.tensor([0.5, -0.7], dtype=torch.float64)
    a_w, _, after = calibrate(torch.eye(4, dtype=torch.float64), d, d, before, decay=0.5, mean=lambda values: values)
    assert after == before and float(a_w[0]) == pytest.approx(math.exp((0.6 + 0.1) / 2))


LONG = "good bad good bad good bad good bad"
FALLING = [
    {"id": "a", "prompt": "the film is", "chosen": " good", "rejected": f" good {LONG}"},
    {"id": "b", "prompt": "a plot is", "chosen": " fine", "rejected": " dull"},
]


def one_step(policy: Path, output: Path, pairs: list[dict[str, Any]], remedy: RemedySection | None) -> dict[str, float]:
    """Metrics that are logged after one step of gradient descent, with the change of the log-probs."""
    fields = {name: value for name, value in BASE.items() if name != "disable_tqdm"} | {
        "optim": "sgd", "learning_rate": 1e-3, "max_steps": 2, "per_device_train_batch_size": len(pairs),
        "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
    }  # fmt: skip
    config = TrainSection(model=str(policy), methods={"m": LossSection(loss="dpo", remedy=remedy)}, trainer=fields)
    trainer = make_trainer(Dataset.from_list(pairs), config, "m", output, seed=0)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry][-1]


def test_a_pair_that_falls_is_held(tiny_policy: Path, tmp_path: Path) -> None:
    """A chosen response that a plain step lowers does not move under hold_chosen and rises under normalise."""
    change = {
        name: one_step(tiny_policy, tmp_path / name, FALLING[:1], remedy)
        for name, remedy in (
            ("plain", None),
            ("hold", RemedySection(kind="hold_chosen")),
            ("half", RemedySection(kind="hold_chosen", keep=0.5)),
            ("normalise", RemedySection(kind="normalise")),
        )
    }
    moved = {name: float(entry["logps/chosen_change"]) for name, entry in change.items()}
    assert moved["plain"] < -1e-4
    assert abs(moved["hold"]) < 0.1 * abs(moved["plain"])
    assert moved["half"] > 1e-4 and moved["normalise"] > 1e-4
    assert float(change["hold"]["remedy/rejected"]) < 1 and float(change["hold"]["remedy/touched"]) == 1.0
    assert "remedy/rejected" not in change["plain"]
    assert all(float(entry["logps/rejected_change"]) < 0 for entry in change.values())


def test_a_pair_that_needs_no_remedy_is_unchanged(tiny_policy: Path, tmp_path: Path) -> None:
    """The training is bitwise that without a remedy."""
    plain = one_step(tiny_policy, tmp_path / "plain", FALLING[1:], None)
    held = one_step(tiny_policy, tmp_path / "held", FALLING[1:], RemedySection(kind="hold_chosen"))
    assert float(held["remedy/touched"]) == 0.0
    assert all(held[name] == plain[name] for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"))


def test_calibration_resumes_with_its_averages(tiny_policy: Path, tmp_path: Path) -> None:
    def trainer(output: Path, steps: int) -> PreferenceTrainer:
        fields = {name: value for name, value in BASE.items() if name != "disable_tqdm"}
        fields |= {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        remedy = RemedySection(kind="calibrate", decay=0.5)
        loss = LossSection(loss="dpo", remedy=remedy)
        config = TrainSection(model=str(tiny_policy), methods={"m": loss}, trainer=fields)
        return make_trainer(Dataset.from_list(rows(16)), config, "m", output, seed=0)

    whole = trainer(tmp_path / "whole", 4)
    whole.train()
    trainer(tmp_path / "stopped", 2).train()
    second = trainer(tmp_path / "stopped", 4)
    second.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoints" / "checkpoint-2"))
    assert whole.remedy is not None and second.remedy is not None
    assert whole.remedy.band is not None and whole.remedy.band == second.remedy.band
    assert all(torch.equal(value, second.model.state_dict()[name]) for name, value in whole.model.state_dict().items())


def test_beta_dpo_has_no_remedy() -> None:
    with pytest.raises(ConfigError, match=r"train.methods.m: beta_dpo compares pairs or reads tokens"):
        bind("m", LossSection(loss="beta_dpo", remedy=RemedySection(kind="normalise")))
    with pytest.raises(ConfigError, match=r"found `remedy` and `token_mask`, expected at most one"):
        bind("m", LossSection(loss="dpo", remedy=RemedySection(kind="normalise"), token_mask=TokenMaskSection()))
