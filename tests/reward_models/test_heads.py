"""Fitted heads, ensembles and calibrated runs: closed forms against scikit-learn, plain model folders, the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from transformers import RobertaConfig, RobertaForSequenceClassification

from align.config import RewardSection
from align.data.pairs import read_pairs
from align.errors import ModelError
from align.io.files import read_json
from reward_models.calibration import MarginMap
from reward_models.crossfit import FOLD, cross_fit
from reward_models.ensemble import members, score_with, train_members
from reward_models.features import head_features
from reward_models.linear_heads import PENALTIES, Moments, fit_linear, fit_logistic
from reward_models.score import RewardScorer
from reward_models.train import train_reward_model
from tests.helpers.builders import bert_reward, llama_reward, rows, tokenizer
from tests.helpers.command_line import align

FAST = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "bf16": False, "use_cpu": True}


def logistic(chosen: torch.Tensor, rejected: torch.Tensor, columns: Any) -> torch.Tensor:
    return torch.nn.functional.softplus(rejected - chosen)


def gaussian(count: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of chosen and rejected whose difference has the mean ``mu``, and mu."""
    rng = np.random.default_rng(seed)
    mu = rng.normal(0, 0.3, size)
    return rng.normal(0, 1, (count, size)) + mu, rng.normal(0, 1, (count, size)), mu


@given(st.integers(0, 1000), st.integers(2, 30), st.integers(1, 29))
def test_streamed_moments_are_those_of_all_pairs(seed: int, count: int, cut: int) -> None:
    differences = np.random.default_rng(seed).normal(1, 2, (count, 3))
    cut = min(cut, count - 1)
    parts = Moments.of(differences[:cut]) + Moments.of(differences[cut:])
    assert parts.naive_bayes() == pytest.approx(Moments.of(differences).naive_bayes())


def test_naive_bayes_is_gaussian_nb_on_both_orders() -> None:
    chosen, rejected, _ = gaussian(200, 4)
    differences = chosen - rejected
    head = Moments.of(differences).naive_bayes()
    model = GaussianNB(var_smoothing=0).fit(np.vstack([differences, -differences]), np.repeat([1, 0], 200))
    other = np.random.default_rng(1).normal(0, 2, (50, 4))
    odds = np.diff(model.predict_log_proba(other), axis=1)[:, 0]
    assert other @ head == pytest.approx(odds)
    assert Moments.of(-differences).naive_bayes() == pytest.approx(-head)
    constant = np.hstack([differences, np.zeros((200, 1))])
    assert np.isfinite(Moments.of(constant).naive_bayes()).all()


def test_linear_head_is_scikit_learns_logistic_regression() -> None:
    chosen, rejected, _ = gaussian(300, 5)
    differences = chosen - rejected
    scale = np.sqrt((differences**2).mean(axis=0))
    model = LogisticRegression(C=1 / 3.0, fit_intercept=False, tol=1e-10, max_iter=2000)
    model.fit(np.vstack([differences, -differences]) / scale, np.repeat([1, 0], 300), np.full(600, 0.5))
    head = fit_linear(chosen, rejected, logistic, {}, penalty=3.0)
    assert head == pytest.approx(model.coef_[0] / scale, abs=2e-4)
    swapped = fit_linear(rejected, chosen, logistic, {}, penalty=3.0)
    assert swapped == pytest.approx(-head, abs=1e-4)
    assert fit_linear(chosen + 5, rejected + 5, logistic, {}, penalty=3.0) == pytest.approx(head, abs=1e-4)


def test_the_penalty_is_chosen_by_held_out_loss() -> None:
    chosen, rejected, _ = gaussian(60, 40)
    _, few = fit_logistic(chosen, rejected, np.arange(60) % 5)
    nothing = np.random.default_rng(3).normal(0, 1, (2, 60, 40))
    _, none = fit_logistic(nothing[0], nothing[1], np.arange(60) % 5)
    assert PENALTIES[0] >= none >= few > PENALTIES[-1]


def test_naive_bayes_wins_with_few_pairs_and_logistic_with_many() -> None:
    """Correlated features: naive Bayes needs fewer pairs and ends up worse (Ng and Jordan, 2001)."""
    size = 24
    rng = np.random.default_rng(4)
    mixing = np.eye(size) + 0.35 * rng.normal(size=(size, size))
    mu = rng.normal(0, 0.5, size)

    def draw(count: int, seed: int) -> np.ndarray:
        return (np.random.default_rng(seed).normal(size=(count, size)) + mu) @ mixing

    test = draw(4000, 99)
    accuracy: dict[int, list[tuple[float, float]]] = {10: [], 3000: []}
    for count, found in accuracy.items():
        for seed in range(20 if count == 10 else 2):
            differences = draw(count, seed)
            zero = np.zeros_like(differences)
            heads = (
                Moments.of(differences).naive_bayes(),
                fit_linear(differences, zero, logistic, {}, penalty=1e-3),
            )
            found.append(tuple(float(np.mean(test @ head > 0)) for head in heads))  # type: ignore[arg-type]
    (few_bayes, few_logistic), (many_bayes, many_logistic) = (np.mean(accuracy[n], axis=0) for n in (10, 3000))
    assert few_bayes > few_logistic + 0.01 and many_logistic > many_bayes + 0.01


@pytest.mark.parametrize("build", [llama_reward, bert_reward])
@pytest.mark.parametrize("head", ["logistic", "naive-bayes"])
def test_a_fitted_head_is_a_plain_model_and_its_margins_are_the_heads(build: Any, head: str, tmp_path: Path) -> None:
    backbone = build(tmp_path / "backbone")
    config = RewardSection(model=str(backbone), max_length=64, head=head)  # type: ignore[arg-type]
    pairs = Dataset.from_list(rows(24))
    train_reward_model(pairs, config, tmp_path / "out", seed=0)
    scorer = RewardScorer(tmp_path / "out", batch_tokens=512, max_length=64)
    margins = np.asarray(scorer.score_pairs(pairs)["margin"])
    assert np.mean(margins > 0) >= 0.9
    texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in rows(24)]
    chosen, rejected = np.split(head_features(RewardScorer(backbone, batch_tokens=512, max_length=64), texts), 2)
    if head == "naive-bayes":
        assert margins == pytest.approx((chosen - rejected) @ Moments.of(chosen - rejected).naive_bayes(), rel=1e-3)
    again = tmp_path / "again"
    train_reward_model(pairs, config, again, seed=0)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_a_fitted_head_needs_one_linear_layer_and_bradley_terry(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=30, num_labels=1, pad_token_id=0, **sizes))
    model.save_pretrained(tmp_path / "m")
    tokenizer(eos=False).save_pretrained(tmp_path / "m")
    config = RewardSection(model=str(tmp_path / "m"), head="logistic", max_length=64)
    with pytest.raises(ModelError, match=r"reward-head.*RobertaClassificationHead, expected one linear layer"):
        train_reward_model(Dataset.from_list(rows(4)), config, tmp_path / "out", seed=0)
    with pytest.raises(ValueError, match="head: naive-bayes fits Bradley-Terry to frozen features"):
        RewardSection.model_validate({"model": "m", "head": "naive-bayes", "objective": {"name": "comp_sum"}})


@pytest.mark.parametrize("head", ["full", "logistic"])
def test_an_ensemble_averages_and_disagrees(head: str, tmp_path: Path) -> None:
    backbone = llama_reward(tmp_path / "backbone")
    config = RewardSection(model=str(backbone), max_length=64, head=head, ensemble=3, trainer=FAST)  # type: ignore[arg-type]
    pairs = Dataset.from_list(rows(12))
    train_members(pairs, config, tmp_path / "out", seed=0)
    models = members(tmp_path / "out")
    assert len(models) == 3 and models[0] == tmp_path / "out"
    alone = np.stack([
        np.asarray(RewardScorer(m, batch_tokens=512, max_length=64).score_pairs(pairs)["margin"]) for m in models
    ])  # fmt: skip
    scored = score_with(models, pairs, tmp_path / "scored", batch_tokens=512, max_length=64)
    assert not (tmp_path / "scored").exists()
    assert np.asarray(scored["margin"]) == pytest.approx(alone.mean(axis=0), abs=1e-5)
    assert np.asarray(scored["margin_std"]) == pytest.approx(alone.std(axis=0, ddof=1), abs=1e-5)
    assert float(np.min(alone.std(axis=0))) > 0
    single = score_with([models[0]], pairs, tmp_path / "scored", batch_tokens=512, max_length=64)
    assert "margin_std" not in single.column_names


def test_cross_fitted_margins_of_an_ensemble_are_calibrated_by_the_other_folds(tmp_path: Path) -> None:
    backbone = llama_reward(tmp_path / "backbone")
    base = {"model": str(backbone), "max_length": 64, "folds": 2, "head": "logistic", "ensemble": 2}
    pairs = Dataset.from_list(rows(16))
    raw = cross_fit(pairs, RewardSection.model_validate(base), tmp_path / "cv", seed=0)
    mapped = cross_fit(
        pairs, RewardSection.model_validate(base | {"calibrate": "temperature"}), tmp_path / "cv", seed=0
    )
    assert raw["id"] == mapped["id"] == pairs["id"] and raw[FOLD] == mapped[FOLD]
    ratio = np.asarray(mapped["margin"]) / np.asarray(raw["margin"])
    fold = np.asarray(raw[FOLD])
    assert [float(np.ptp(ratio[fold == k])) for k in (0, 1)] == pytest.approx([0, 0], abs=1e-9)
    assert abs(ratio[fold == 0][0] - ratio[fold == 1][0]) > 1e-9 and "margin_std" in mapped.column_names


def test_the_command_trains_an_ensemble_of_heads_and_scores_calibrated(workspace: Path) -> None:
    options = [f"--set=reward.{key}" for key in ("ensemble=2", "calibrate=temperature", "length_residual=true")]
    trained = align("reward", "train", "run.yaml", "--head", "logistic", *options, cwd=workspace)
    assert trained.returncode == 0, trained.stderr
    folder = workspace / "runs" / "tiny" / "reward"
    metrics = read_json(folder / "metrics.json")
    assert metrics["ensemble"] == 2 and metrics["calibration"]["kind"] == "temperature"
    assert metrics["heldout_calibrated"]["n"] == metrics["heldout"]["n"] == metrics["length"]["pairs"] == 8
    assert "margin_std" in read_pairs(folder / "heldout").column_names
    tables = {}
    for name, flags in (("raw", []), ("calibrated", ["--calibrated"])):
        command = ["reward", "score", "pairs.jsonl", "--model", str(folder / "model"), "--output", name, *flags]
        scored = align(*command, cwd=workspace)
        assert scored.returncode == 0, scored.stderr
        tables[name] = read_pairs(workspace / name)
        assert json.loads(scored.stdout)["n"] == 24
    expected = MarginMap.load(folder / "model").apply(tables["raw"])
    assert np.asarray(tables["calibrated"]["margin"]) == pytest.approx(np.asarray(expected["margin"]))
    assert not np.allclose(tables["raw"]["margin"], tables["calibrated"]["margin"])
    refused = align("reward", "train", "run.yaml", "--head", "bayes", cwd=workspace)
    assert refused.returncode == 2 and "reward.head: expected 'full', 'logistic' or 'naive-bayes'" in refused.stderr
