"""Single responses with thumbs: KTO equal to trl's step by step, BCO, mixed tables, refusals."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import KTOConfig, KTOTrainer

from align.config import TrainSection
from align.data.thumbs import mismatched, unpaired
from align.errors import ConfigError, DataError
from align.losses.pairwise import PairLogps
from align.losses.registry import resolve
from align.losses.sums import resolve_sum
from align.training.preference_config import PreferenceConfig
from align.training.train import make_trainer
from align.training.trainer import PreferenceTrainer
from reward_models import RewardConfig, RewardTrainer
from reward_models.score import RewardScorer
from tests.helpers.builders import causal, llama_reward, rows
from tests.training.test_trainer import BASE, FIELDS, ROUNDING, Gradients

SEQUENTIAL = {"train_sampling_strategy": "sequential"}


def thumbed(count: int) -> list[dict[str, Any]]:
    """Every third response undesirable."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if k % 3 else "rejected"], "label": bool(k % 3)}
        for k, row in enumerate(rows(count))
    ]


def ours(policy: Path, output: Path, table: Any, loss: str = "kto", **settings: Any) -> tuple[Any, Gradients]:
    """A finished training and the gradient of each of its steps."""
    seen = Gradients()
    args = PreferenceConfig(str(output), loss=loss, **BASE | SEQUENTIAL | settings)
    trainer = PreferenceTrainer(str(policy), args=args, train_dataset=table, callbacks=[seen])
    trainer.train()
    return trainer, seen


def logged(trainer: Any, name: str) -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if "loss" in entry and name in entry]


def largest(first: Gradients, second: Gradients) -> float:
    pairs = zip(first.steps, second.steps, strict=True)
    return max(float((one[name] - other[name]).abs().max()) for one, other in pairs for name in one)


@pytest.mark.parametrize("layout", ["concatenated", "shared_prefix"])
def test_kto_is_trls_step_by_step(layout: str, tmp_path: Path) -> None:
    policy, table = causal(tmp_path / "policy"), thumbed(12)
    theirs = Gradients()
    args = KTOConfig(str(tmp_path / "trl"), undesirable_weight=1.7, **BASE | SEQUENTIAL)
    reference = KTOTrainer(
        str(policy), args=args, train_dataset=Dataset.from_list(table), callbacks=[theirs],
        processing_class=AutoTokenizer.from_pretrained(policy),
    )  # fmt: skip
    reference.train()
    mine, seen = ours(policy, tmp_path / "ours", table, loss_kwargs={"undesirable_weight": 1.7}, layout=layout)
    for name in ("loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
        assert logged(mine, name) == pytest.approx(logged(reference, name), abs=2e-5, rel=1e-5), name
    assert max(logged(mine, "kl")) > 1 and largest(theirs, seen) < ROUNDING


def test_micro_batches_and_accumulation_change_nothing(tmp_path: Path) -> None:
    """The KL is that of the step, however its rows are split; the policy of three steps is the same."""
    policy, table = causal(tmp_path / "policy"), thumbed(12)
    whole, seen = ours(policy, tmp_path / "a", table, max_steps=3)
    for name, settings in {
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "tokens": {"max_tokens_per_device": 32},
        "precomputed": {"precompute_ref_log_probs": True},
    }.items():
        split, parts = ours(policy, tmp_path / name, table, max_steps=3, **settings)
        assert logged(split, "kl") == pytest.approx(logged(whole, "kl"), abs=1e-4), name
        assert logged(split, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5), name
        assert largest(seen, parts) < 2 * ROUNDING, name


def test_a_resumed_training_is_an_uninterrupted_one(tmp_path: Path) -> None:
    policy, table = causal(tmp_path / "policy"), thumbed(12)
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    for loss in ("kto", "bco_unpaired"):
        whole, _ = ours(policy, tmp_path / f"{loss}-whole", table, loss, **settings, max_steps=4)
        ours(policy, tmp_path / f"{loss}-cut", table, loss, **settings, max_steps=2)
        args = PreferenceConfig(str(tmp_path / f"{loss}-cut"), loss=loss, **BASE | SEQUENTIAL | settings)
        again = PreferenceTrainer(str(policy), args=args, train_dataset=table)
        again.train(resume_from_checkpoint=True)
        assert logged(again, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-6), loss


def test_bco_shifts_by_the_mean_reward_so_far() -> None:
    """By hand: thumbs up, down; rewards 0.2, -0.1; the mean of the step is 0.05, of both steps 0.3."""
    zero, ones = torch.zeros(2), torch.ones(2)
    logps = PairLogps(torch.tensor([2.0, -1.0]), zero, zero, zero, ones, ones, torch.tensor([1.0, 0.0]))
    loss = resolve("bco_unpaired", {"desirable_weight": 2.0})
    shift = loss.spec.statistics(loss.parameters, 0)  # type: ignore[misc]
    first, said = shift(shift.columns(logps).double(), 0, update=True)
    assert first.flatten().tolist() == pytest.approx([0.05, 0.05]) and said == pytest.approx({"delta": 0.05})
    expected = [2 * 0.620957, 0.620957]  # -log s(0.15)
    assert loss(logps, statistics={"bco_unpaired": first}).tolist() == pytest.approx(expected, abs=1e-5)
    more = torch.full((2, 1), 0.55, dtype=torch.float64)
    assert shift(more, 1, update=True)[0].flatten().tolist() == pytest.approx([0.3, 0.3])


def test_pairs_and_thumbs_of_one_table_are_trained_on(tmp_path: Path) -> None:
    """A pair is its chosen response with a thumb up and its rejected one with a thumb down, as trl takes pairs."""
    policy, pairs = (
        causal(tmp_path / "policy"),
        [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows(2)],
    )
    apart = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs for side in ("chosen", "rejected")
    ]  # fmt: skip
    mixed, _ = ours(policy, tmp_path / "a", [*pairs, *thumbed(8)[4:]], per_device_train_batch_size=8)
    single, _ = ours(policy, tmp_path / "b", [*apart, *thumbed(8)[4:]], per_device_train_batch_size=8)
    assert logged(mixed, "loss") == logged(single, "loss") and len(mixed.train_dataset) == 8


def test_evaluation_has_trls_numbers(tmp_path: Path) -> None:
    policy, table = causal(tmp_path / "policy"), thumbed(8)
    args = PreferenceConfig(str(tmp_path / "a"), loss="kto", per_device_eval_batch_size=4, **BASE | SEQUENTIAL)
    trainer = PreferenceTrainer(str(policy), args=args, train_dataset=table, eval_dataset=thumbed(4))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.5, abs=1e-6), "the policy is the reference: s(0)"


def test_mismatched_responses_are_those_of_the_step_turned_by_one() -> None:
    table = Dataset.from_list([{"chosen_ids": [k], "rejected_ids": [0], "prompt_ids": [9]} for k in range(7)])
    found = [row[0] for row in mismatched(table, 3)["rejected_ids"]]
    assert found == [2, 0, 1, 6, 3, 4, 5], "the last row, alone in its step, joins the step before"
    assert unpaired(Dataset.from_list(rows(2)))["thumb"] == [1.0, 0.0, 1.0, 0.0]


def test_what_is_refused(tmp_path: Path) -> None:
    policy, table = causal(tmp_path / "policy"), thumbed(4)
    with pytest.raises(DataError, match="for the loss dpo: found 4 single responses with thumbs among 4 rows"):
        ours(policy, tmp_path / "a", table, "dpo")
    for labels in ((1, 2), ("yes", "no"), (True, None), (1.0, 0.5)):
        odd = [row | {"label": label} for row, label in zip(table, labels, strict=False)]
        with pytest.raises(DataError, match=r"train_dataset: label of row \d: found .*, expected true \(desirable\)"):
            ours(policy, tmp_path / "b", odd)
    with pytest.raises(ConfigError, match="found 1 response per optimizer step, expected at least 2"):
        ours(policy, tmp_path / "c", table, per_device_train_batch_size=1)
    with pytest.raises(ConfigError, match="kto: a loss of single responses, and the other terms are losses of pairs"):
        resolve_sum({"kto": 1.0, "nll": 0.1}, {})
    with pytest.raises(ConfigError, match="undesirable_weight"):
        resolve("kto", {"undesirable_weight": -1.0})
    with pytest.raises(ConfigError, match="remedy or a mask needs a"):
        ours(policy, tmp_path / "d", table, gradient_remedy={"kind": "hold_chosen"})
    section = TrainSection.model_validate(
        {"model": str(policy), "methods": {"k": {"loss": "kto"}}, "trainer": FIELDS, "eval_pairs": {"share": 0.2}}
    )
    with pytest.raises(ConfigError, match=r"train.eval_pairs: found it under the loss kto"):
        make_trainer(Dataset.from_list(rows(4)), section, "k", tmp_path / "e", seed=0)


def test_a_reward_trainer_logs_thumbs_and_pairs_by_their_own_side(tmp_path: Path) -> None:
    """trl's accuracy compares two responses, which are the same for a thumb."""
    table = [*thumbed(6), *({name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows(2))]
    args = RewardConfig(str(tmp_path / "out"), **{**BASE, "max_steps": 1, "per_device_train_batch_size": 8})
    model = llama_reward(tmp_path / "rm")
    trainer = RewardTrainer(str(model), args=args, train_dataset=table, objective="thumbs")
    scorer = RewardScorer(model, batch_tokens=256, max_length=64)
    singles = scorer.score_completions(*([row[name] for row in table[:6]] for name in ("prompt", "completion")))
    gaps = [value if row["label"] else -value for row, value in zip(table, singles, strict=False)]
    for row in table[6:]:
        both = scorer.score_completions([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        gaps.append(both[0] - both[1])
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "accuracy" in entry)
    assert first["accuracy"] == pytest.approx(sum(gap > 0 for gap in gaps) / 8)
    assert first["margin"] == pytest.approx(sum(gaps) / 8, abs=1e-4)
    assert first["loss"] == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in gaps) / 8, abs=1e-4)
    with pytest.raises(DataError, match="the objective bradley_terry: found 6 single responses"):
        RewardTrainer(str(model), args=args, train_dataset=table)
