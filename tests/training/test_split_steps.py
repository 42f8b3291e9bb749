"""What a step leaves out changes nothing: pairs of weight 0, dense rows of an embedding, a reference nobody reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from align.config import EntanglementSection, LossSection, TrainSection
from align.losses.registry import LOSSES
from align.models.logps import pair_logps
from align.training import trainer as trainer_module
from align.training.preference_config import PreferenceConfig
from align.training.train import attach_probe, make_trainer
from align.training.trainer import PreferenceTrainer
from tests.helpers.builders import make_base, rows
from tests.training.test_trainer import BASE, FIELDS, Gradients, ours

FREE = [name for name, spec in LOSSES.items() if not spec.reads_reference]
WEIGHTS = [0.0, 1.0, 0.0, 2.0, *[0.0] * 4, 1.0, 1.0, 0.0, 1.5, 0.0, 1.0]
COMPUTED = 2 + 4 + 3 + 1
"""Pairs that are computed in batches of 4: one of which no pair has a weight is computed whole."""


def gradients_of(trainer: PreferenceTrainer) -> list[dict[str, torch.Tensor]]:
    """Train, and return the gradient of each step."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.steps


def assert_same(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]], atol: float) -> None:
    """Compare the gradients of two trainings, parameter by parameter."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert max(float((a[name] - b[name]).abs().max()) for name in a) < atol


def logged(trainer: PreferenceTrainer) -> list[dict[str, Any]]:
    """The logged steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("fields", [
    {}, {"gradient_accumulation_steps": 2, "max_steps": 2}, {"budget": 60}, {"loss": {"terms": {"ipo": 1, "nll": 0.5}}},
])  # fmt: skip
def test_pairs_of_weight_0_are_left_out_and_counted(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    """Loss, gradients, and what the log says of weights, margins and terms are those of a training that computes every
    pair."""
    pairs = Dataset.from_list(rows(14)).add_column("weight", WEIGHTS)
    computed: list[int] = []

    def counting(model: Any, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        computed.append(len(batch["input_ids"]) // 2)
        return pair_logps(model, batch, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "pair_logps", counting)
    options: dict[str, Any] = {"layout": "shared_prefix", "train_sampling_strategy": "sequential"} | fields
    runs = {}
    for leaves_out in (True, False):
        computed.clear()
        trainer = ours(tiny_policy, tmp_path / str(leaves_out), pairs=pairs, **options)
        if not leaves_out:
            monkeypatch.setattr(trainer, "_leaves_out", lambda: False)
        runs[leaves_out] = gradients_of(trainer), logged(trainer), sum(computed)
    (first, log, some), (second, whole, every) = runs[True], runs[False]
    assert_same(first, second, 1e-6)
    assert (some, every) == (COMPUTED, len(WEIGHTS))
    for a, b in zip(log, whole, strict=True):
        for name in b:
            if name in ("loss", "grad_norm", "num_tokens") or name.startswith(("weight/", "margin/", "loss/")):
                assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name


def test_log_probs_in_the_log_are_those_of_the_pairs_that_are_trained(tiny_policy: Path, tmp_path: Path) -> None:
    """The second pair has no weight: the metrics are those of a training on the first alone, the loss is half."""
    found = []
    for name, pairs in (("both", rows(2)), ("one", rows(1))):
        table = Dataset.from_list(pairs).add_column("weight", [1.0, 0.0][: len(pairs)])
        trainer = ours(tiny_policy, tmp_path / name, pairs=table, max_steps=1)
        trainer.train()
        found.append(logged(trainer)[0])
    both, one = found
    for name in ("rewards/accuracies", "logps/chosen", "logps/rejected", "logits/chosen", "entropy"):
        assert both[name] == pytest.approx(one[name], abs=1e-5), name
    assert both["loss"] == pytest.approx(one["loss"] / 2) and both["weight/mean"] == 0.5


@pytest.mark.parametrize(("loss", "fields"), [
    ("beta_dpo", {}), ("dpo", {"layout": "concatenated"}), ("dpo", {"tilt": True}), ("dpo", {"own": True}),
])  # fmt: skip
def test_no_pair_is_left_out_where_others_depend_on_it(
    tiny_policy: Path, tmp_path: Path, loss: str, fields: dict[str, Any]
) -> None:
    """Losses over the pairs of a step, weights from its losses, functions of unknown kind, layouts that draw noise."""
    if fields.pop("tilt", False):
        weights = {"tilt": {"kind": "up"}}
        section = LossSection.model_validate({"loss": loss, "weights": weights})
        config = TrainSection(model=str(tiny_policy), methods={"m": section}, trainer=FIELDS)
        trainer = make_trainer(Dataset.from_list(rows(8)), config, "m", tmp_path, seed=0)
    elif fields.pop("own", False):
        args = PreferenceConfig(str(tmp_path), **BASE)
        trainer = PreferenceTrainer(
            str(tiny_policy), args=args, train_dataset=rows(8), loss=lambda logps: -logps.log_ratio_gap
        )
    else:
        trainer = ours(tiny_policy, tmp_path, loss, **fields)
    assert not trainer._leaves_out()


@pytest.mark.parametrize("repeats", [1, 3])
def test_rows_of_a_tied_embedding_are_added_to_the_gradient_of_the_head(tmp_path: Path, repeats: int) -> None:
    """Gradients as dense as before and equal to rounding, also with accumulation into a gradient that is there."""
    base = make_base(tmp_path / "base", tied=True)
    fields = {"gradient_accumulation_steps": repeats, "max_steps": 2}
    sparse, dense = (ours(base, tmp_path / name, **fields) for name in ("sparse", "dense"))
    assert sparse._tied is sparse.model.get_input_embeddings() and not sparse._tied.sparse
    dense._tied = None
    found = gradients_of(sparse)
    assert all(gradient.layout == torch.strided for step in found for gradient in step.values())
    assert_same(found, gradients_of(dense), 1e-6)
    assert not sparse._tied.sparse


def test_only_one_trained_weight_of_embedding_and_head_gets_its_rows_so(tmp_path: Path) -> None:
    """Not an embedding of its own, not one that an adapter leaves frozen, not one whose gradients a remedy measures."""
    apart, tied = (make_base(tmp_path / str(one), tied=one) for one in (False, True))
    assert ours(apart, tmp_path / "a")._tied is None
    config = TrainSection(
        model=str(tied),
        methods={"m": LossSection(loss="dpo")},
        trainer=FIELDS,
        peft={"r": 2, "target_modules": "all-linear"},
    )
    assert make_trainer(Dataset.from_list(rows(4)), config, "m", tmp_path / "b", seed=0)._tied is None
    remedy = LossSection.model_validate({"loss": "dpo", "remedy": {"kind": "hold_chosen"}})
    held = TrainSection(model=str(tied), methods={"m": remedy}, trainer=FIELDS)
    assert make_trainer(Dataset.from_list(rows(4)), held, "m", tmp_path / "c", seed=0)._tied is None


@pytest.mark.parametrize("precomputed", [True, False])
@pytest.mark.parametrize("loss", FREE)
def test_a_loss_without_a_reference_runs_none(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, precomputed: bool
) -> None:
    """The gradients are those of a training with all passes of the reference, to the bit; rewards are beta log p."""
    passes: list[str] = []
    run = PreferenceTrainer.run_reference

    def counted(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        passes.append(loss)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "run_reference", counted)
    fields = {"precompute_ref_log_probs": precomputed, "max_steps": 2}
    trainer = ours(tiny_policy, tmp_path / "without", loss, **fields)
    first = gradients_of(trainer)
    assert not passes and "ref_chosen_logps" not in trainer.train_dataset.column_names
    log = logged(trainer)[-1]
    assert log["rewards/chosen"] == pytest.approx(trainer.loss.beta * log["logps/chosen"])
    assert not any(name.endswith("_change") for name in log)
    monkeypatch.setattr(trainer_module, "reads_reference", lambda *_: True)
    whole = ours(tiny_policy, tmp_path / "with", loss, **fields)
    assert_same(first, gradients_of(whole), 1e-12)
    assert passes and "logps/chosen_change" in logged(whole)[-1]


def test_measurements_of_entanglement_bring_the_reference_back(tiny_policy: Path, tmp_path: Path) -> None:
    """They report the change since the reference, which is 0 before the first step."""
    config = TrainSection(
        model=str(tiny_policy), methods={"m": LossSection(loss="simpo")}, trainer=FIELDS,
        entanglement=EntanglementSection(every=1, probes=2),
    )  # fmt: skip
    trainer = make_trainer(Dataset.from_list(rows(8)), config, "m", tmp_path, seed=0)
    probe = attach_probe(trainer, config, tmp_path / "file.json")
    assert probe is not None
    trainer.train()
    assert probe.records[0]["chosen_change"] == pytest.approx(0.0, abs=1e-4)
    assert "logps/chosen_change" in logged(trainer)[0]


def test_a_table_is_predicted_after_a_training_without_a_reference(tiny_policy: Path, tmp_path: Path) -> None:
    trainer = ours(tiny_policy, tmp_path, "simpo")
    trainer.train()
    found = trainer.predict(Dataset.from_list(rows(4)))
    assert np.isfinite(found.metrics["test_loss"])
