"""Every loss of the registry in a training: equal to trl's step where trl has it, terms of sums, splits of a step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from align.config import LossSection
from align.losses.registry import LOSSES, resolve
from align.losses.spec import BoundLoss
from align.losses.sums import bind_section, resolve_sum
from align.models.collator import REAL, ROW
from align.training.pair_losses import StepStatistics
from align.training.trainer import PreferenceTrainer
from tests.helpers.builders import rows
from tests.losses.inputs import make
from tests.training.test_epochs import PROCESSES, Gather, together
from tests.training.test_trainer import BASE, Gradients, ours

TRL: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("dpo", {}, "sigmoid", {}),
    ("hinge", {"beta": 0.5}, "hinge", {"beta": 0.5}),
    ("ipo", {}, "ipo", {}),
    ("exo_pair", {}, "exo_pair", {"label_smoothing": 1e-3}),
    ("nca_pair", {}, "nca_pair", {}),
    ("robust", {"label_smoothing": 0.2}, "robust", {"label_smoothing": 0.2}),
    ("bco_pair", {}, "bco_pair", {}),
    ("sppo_hard", {}, "sppo_hard", {}),
    ("aot", {"label_smoothing": 0.2}, "aot", {"label_smoothing": 0.2}),
    ("aot_unpaired", {"label_smoothing": 0.2}, "aot_unpaired", {"label_smoothing": 0.2}),
    ("apo_zero", {}, "apo_zero", {}),
    ("apo_down", {}, "apo_down", {}),
    ("discopop", {}, "discopop", {}),
    ("nll", {}, "sft", {}),
    ("ln_dpo", {"beta": 0.5}, "sigmoid_norm", {"beta": 0.5}),
    ("fdpo_forward_kl", {}, "sigmoid", {"f_divergence_type": "forward_kl"}),
    ("fdpo_js", {}, "sigmoid", {"f_divergence_type": "js_divergence"}),
    ("fdpo_alpha", {}, "sigmoid", {"f_divergence_type": "alpha_divergence"}),
    ("ld_dpo", {"ld_alpha": 0.3}, "sigmoid", {"ld_alpha": 0.3}),
    ("wpo", {"clamp": False}, "sigmoid", {"use_weighting": True}),
]
"""A loss, its parameters, trl's loss_type and the fields of trl's trainer that differ from its defaults."""
DEFAULTS: dict[str, Any] = {
    "beta": 0.1, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False,
}  # fmt: skip
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}


@pytest.fixture(scope="module")
def trainers(
    tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[DPOTrainer, PreferenceTrainer, dict[str, Any]]]:
    """trl's trainer and ours with the same policy, which has moved away from their references, and a batch."""
    folder, table = tmp_path_factory.mktemp("losses"), Dataset.from_list(rows(6))
    theirs = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32),
        args=DPOConfig(output_dir=str(folder / "trl"), seed=0, use_weighting=True, **BASE),
        train_dataset=table.remove_columns(["id", "margin"]),
        processing_class=AutoTokenizer.from_pretrained(tiny_policy),
    )
    mine = ours(tiny_policy, folder, pairs=table, layout="concatenated", precompute_ref_log_probs=False)
    for trainer in (theirs, mine):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        trainer.model.train()
    batch = mine.data_collator([mine.train_dataset[k] for k in range(6)])
    yield theirs, mine, batch


def with_loss(trainer: PreferenceTrainer, loss: BoundLoss) -> PreferenceTrainer:
    """The trainer under another loss."""
    trainer.loss = loss
    trainer._add_parts()
    trainer._step_values.clear()
    return trainer


def step(trainer: Any, inputs: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Loss of a batch, and its gradients."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    return float(loss), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def compare(trainers: Any, loss: BoundLoss, batch: dict[str, Any], trl: dict[str, Any]) -> None:
    """The loss of the batch and every gradient are those of trl's trainer with these attributes."""
    theirs, mine, _ = trainers
    for name, value in (DEFAULTS | trl).items():
        setattr(theirs, name, value)
    sides = {name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    (expected, gradients), (found, own) = step(theirs, sides), step(with_loss(mine, loss), batch)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert own.keys() == gradients.keys() and max(float(g.abs().max()) for g in own.values()) > 1e-4
    scale = max(float(g.abs().max()) for g in gradients.values())
    assert all(torch.allclose(own[name], gradients[name], atol=1e-5 * max(scale, 1.0)) for name in own)


@pytest.mark.parametrize(("name", "parameters", "trl_loss", "fields"), TRL, ids=[f"{t[2]}-{t[0]}" for t in TRL])
def test_equal_to_a_step_of_trl(
    trainers: Any, name: str, parameters: dict[str, Any], trl_loss: str, fields: dict[str, Any]
) -> None:
    """trl's sft is the mean over the tokens of the batch: ours with weights by the length of the chosen response."""
    batch = dict(trainers[2])
    if name == "nll":
        length = batch["completion_mask"].sum(dim=1).chunk(2)[0].float()
        batch["weight"] = length / length.mean()
    trl = {"loss_types": [trl_loss], "loss_weights": [1.0], **fields}
    compare(trainers, resolve(name, parameters), batch, trl)


def test_a_loss_type_list_is_trls_sum(trainers: Any) -> None:
    """MPO without sft, whose mean is another where lengths differ, in the form in which trl takes it."""
    mpo = {name: values[:2] for name, values in MPO.items()}
    trl = {"loss_types": mpo["loss_type"], "loss_weights": mpo["loss_weights"]}
    compare(trainers, bind_section(LossSection(**mpo)), trainers[2], trl)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_gives_the_policy_a_gradient(trainers: Any, name: str) -> None:
    _, mine, batch = trainers
    loss, gradients = step(with_loss(mine, resolve(name, {})), batch)
    assert np.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients.values())
    assert max(float(g.abs().max()) for g in gradients.values()) > 0


@pytest.mark.parametrize("weighted", [True, False])
def test_a_sum_is_the_sum_of_its_logged_terms(trainers: Any, weighted: bool) -> None:
    """Loss and gradient are weight * term summed, the logged terms are means over the pairs with the pairs' weights."""
    _, mine, batch = trainers
    batch = batch | ({"weight": torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 3.0])} if weighted else {})
    terms = {"madpo": 1.0, "nll": 0.1, "aot_unpaired": 0.5, "sampo": 2.0, "wpo": 0.25}
    parts = {name: step(with_loss(mine, resolve(name, {})), batch) for name in terms}
    total, gradients = step(with_loss(mine, resolve_sum(terms, {})), batch)
    assert total == pytest.approx(sum(weight * parts[name][0] for name, weight in terms.items()), rel=1e-5)
    for key, gradient in gradients.items():
        expected = sum(weight * parts[name][1][key] for name, weight in terms.items())
        assert torch.allclose(gradient, expected, atol=1e-5)
    mine._log_pairs("train")
    logged = {name: mine._metrics["train"][f"loss/{name}"][-1] for name in terms}
    assert logged == {name: pytest.approx(parts[name][0], rel=1e-5) for name in terms}


SPLIT = {
    "beta_dpo": {"beta_dpo": 1.0},
    "aot_unpaired": {"aot_unpaired": {"weight": 1.0, "parameters": {"beta": 0.5}}},
    "sum": {"alpha_dpo": 1.0, "bco": 0.5, "nll": 0.1},
}


@pytest.mark.parametrize("terms", SPLIT.values(), ids=SPLIT)
def test_same_gradients_for_any_split_of_a_step(tiny_policy: Path, tmp_path: Path, terms: dict[str, Any]) -> None:
    """Statistics are over the whole step: neither accumulation nor a token budget changes a gradient."""
    runs = []
    for name, (fields, budget) in {
        "one batch": ({"per_device_train_batch_size": 6}, None),
        "budget": ({"per_device_train_batch_size": 6}, 60),
        "accumulated": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, None),
    }.items():
        table = Dataset.from_list(rows(10))
        trainer = ours(tiny_policy, tmp_path / name, "dpo", table, "auto", budget, max_steps=2, **fields)
        with_loss(trainer, resolve_sum(terms, {}))
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        runs.append((gradients.steps, [float(entry["loss"]) for entry in logged]))
    (expected, losses), *others = runs
    for steps, other in others:
        assert np.allclose(losses, other, atol=1e-4) and len(steps) == 2
        for a, b in zip(expected, steps, strict=True):
            assert all(torch.allclose(a[name], b[name], atol=5e-5) for name in a)


@pytest.mark.parametrize("name", [name for name, spec in LOSSES.items() if spec.coupled])
def test_statistics_of_two_processes_and_of_parts_are_those_of_one(name: str) -> None:
    """Five pairs, in another order, in two processes with two forward passes each; the sixth only fills the batch."""
    pairs = [(1.0, 0.0), (2.0, 0.5), (-1.0, 0.0), (0.5, -3.0), (9.0, 1.0), (3.0, 2.0)]
    loss = resolve(name, {})
    whole = StepStatistics(loss, gather=lambda local: local, rank=0, seed=3)
    passed = make(pairs[:5]), {ROW: torch.tensor([4, 0, 3, 1, 2])}
    expected = whole.of(passed, 7, training=True)[name]
    places = [[3, 0], [5], [1], [4, 2]]
    row_of = [4, 0, 3, 1, 2, 4]

    def part(indices: list[int]) -> tuple[Any, dict[str, Tensor]]:
        inputs = {ROW: torch.tensor([row_of[k] for k in indices]), REAL: torch.tensor([k < 5 for k in indices])}
        return make([pairs[k] for k in indices]), inputs

    def work(rank: int, gather: Gather) -> tuple[list[Tensor], Any, dict[str, float]]:
        statistics = StepStatistics(loss, gather=gather, rank=rank, seed=3)
        passes = [part(indices) for indices in places[2 * rank : 2 * rank + 2]]
        statistics.gather(passes, 7, update=True)
        values = [statistics.of(each, 7, training=True)[name] for each in passes]
        return values, statistics.state_dict(), statistics.logged

    found = together(work)
    assert len(found) == PROCESSES
    for values, state, logged in found:
        assert state == whole.state_dict() and logged == whole.logged
        assert sum(len(value) for value in values) == 3
    flat = torch.cat([value for values, *_ in found for value in values])
    order = [k for indices in places for k in indices]
    for k, row in zip(order, flat, strict=True):
        assert k == 5 or torch.equal(row, expected[k])


def test_evaluation_leaves_the_statistics_of_the_training_alone() -> None:
    loss = resolve("bco", {})
    statistics = StepStatistics(loss, gather=lambda local: local, rank=0, seed=0)
    passed = make([(1.0, 0.0), (3.0, 2.0)]), {ROW: torch.tensor([0, 1])}
    statistics.of(passed, 0, training=True)
    before = statistics.state_dict()
    statistics.of((make([(9.0, 9.0)]), {}), 1, training=False)
    assert statistics.state_dict() == before


def test_a_resumed_training_has_the_statistics_of_an_uninterrupted_one(tiny_policy: Path, tmp_path: Path) -> None:
    """Of both terms; without the state, the running mean would start again and the last losses would differ."""
    losses = []
    for folder, stops in (("whole", (5,)), ("cut", (3, 5))):
        for stop in stops:
            trainer = ours(
                tiny_policy, tmp_path / folder, save_strategy="steps", save_steps=3, lr_scheduler_type="constant",
                max_steps=stop,
            )  # fmt: skip
            with_loss(trainer, resolve_sum({"alpha_dpo": 1.0, "bco": 1.0}, {}))
            trainer.train(resume_from_checkpoint=stop != stops[0] or None)
        losses.append([float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 5
