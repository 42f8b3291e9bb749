"""Products from a training step's own passes are those of passes of their own, whatever loss and adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from align.config import EntanglementSection, LossSection, RemedySection, TrainSection
from align.entanglement.fused import GRADIENT_INPUTS, StepProducts, joined
from align.entanglement.pair_products import PairProducts
from align.entanglement.products import GradientProducts
from align.io.files import read_json
from align.models.collator import ROW
from align.reports.run_page import _entanglement
from align.training.train import attach_probe, make_trainer, train_policy
from align.training.trainer import PreferenceTrainer
from tests.helpers.builders import causal, llama_config, rows, tokenizer
from tests.training.test_trainer import FIELDS

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


def table(count: int) -> Dataset:
    """Pairs of unequal lengths with margins and weights, among them 0."""
    made = [dict(row, weight=[0.5, 0.0, 2.0, 0.0][k % 4], margin=float(k - 3)) for k, row in enumerate(rows(count))]
    return Dataset.from_list(made)


def trainer_of(model: Path, output: Path, loss: str | LossSection = "dpo", **fields: Any) -> PreferenceTrainer:
    """A trainer whose rows are kept apart; ``fields`` of the section, of its trainer if trl has them."""
    own = {name: fields.pop(name) for name in ("peft", "max_tokens_per_device") if name in fields}
    section = LossSection(loss=loss) if isinstance(loss, str) else loss
    config = TrainSection(
        model=str(model), methods={"m": section}, layout="concatenated", trainer=FIELDS | fields, **own
    )
    return make_trainer(table(12), config, "m", output, seed=0)


def one_step(
    trainer: PreferenceTrainer,
) -> tuple[list[tuple[dict[str, torch.Tensor], PairProducts]], list[PairProducts]]:
    """The (micro-)batches of a step with what its own passes measured, and what passes of their own measure."""
    products = GradientProducts(trainer.model)
    step = StepProducts(products, lambda: trainer.latest_inputs)
    trainer.create_optimizer_and_scheduler(4)
    step.begin()
    trainer.model.train()
    batches = iter(trainer.get_train_dataloader())
    for _ in range(trainer.args.gradient_accumulation_steps):
        inputs = trainer._prepare_inputs(next(batches))
        trainer.training_step(trainer.model, inputs, len(inputs["input_ids"]) // 2)
    parts = step.end()
    trainer.model.eval()
    return parts, [products({name: batch[name] for name in GRADIENT_INPUTS}) for batch, _ in parts]


def assert_same(parts: list[tuple[dict[str, torch.Tensor], PairProducts]], expected: list[PairProducts]) -> None:
    for (_, found), own in zip(parts, expected, strict=True):
        for name in ("chosen_sq", "rejected_sq", "chosen_logps", "rejected_logps"):
            torch.testing.assert_close(getattr(found, name), getattr(own, name), rtol=2e-5, atol=1e-6)
        scale = (own.chosen_sq * own.rejected_sq).sqrt()
        assert ((found.inner - own.inner).abs() <= 2e-5 * scale + 1e-9).all()
        assert torch.equal(found.chosen_length, own.chosen_length)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "madpo", "simpo", "hinge", "orpo"])
@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_products_of_a_step_are_those_of_a_pass_of_its_own(loss: str, peft: Any, tmp_path: Path) -> None:
    """Weights of 0 leave a pair without gradient in the step: it is measured apart, like a saturated hinge."""
    trainer = trainer_of(causal(tmp_path / "model"), tmp_path / "out", loss, peft=peft)
    parts, expected = one_step(trainer)
    assert len(parts) == 1 and len(parts[0][1].inner) == FIELDS["per_device_train_batch_size"]
    assert 0 < (trainer.latest_inputs["weight"] == 0).sum() < len(parts[0][1].inner)
    assert_same(parts, expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loss", ["dpo", "nca_pair"])
def test_tied_and_untied_heads(tied: bool, loss: str, tmp_path: Path) -> None:
    config = llama_config()
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    model = tmp_path / "model"
    assert_same(*one_step(trainer_of(model, tmp_path / "out", loss)))


def test_micro_batches_and_accumulation(tmp_path: Path) -> None:
    """Each forward pass of a step is a part; together they are the pairs of the step, each with its own products."""
    model = causal(tmp_path / "model")
    trainer = trainer_of(model, tmp_path / "out", max_tokens_per_device=40, gradient_accumulation_steps=2)
    parts, expected = one_step(trainer)
    assert len(parts) > 2
    seen = torch.cat([batch[ROW] for batch, _ in parts]).tolist()
    assert len(seen) == len(set(seen)) == 2 * FIELDS["per_device_train_batch_size"]
    assert_same(parts, expected)
    assert len(joined(parts).inner) == len(seen)


def test_a_remedys_own_passes_are_not_taken_for_the_steps(tmp_path: Path) -> None:
    section = LossSection(loss="dpo", remedy=RemedySection(kind="hold_chosen"))
    trainer = trainer_of(causal(tmp_path / "model"), tmp_path / "out", section, max_tokens_per_device=40)
    parts, expected = one_step(trainer)
    assert len(parts) > 1
    assert_same(parts, expected)


def test_watching_changes_no_gradient_and_leaves_nothing_behind(tmp_path: Path) -> None:
    grads = []
    for watched in (False, True):
        trainer = trainer_of(causal(tmp_path / "model"), tmp_path / f"{watched}")
        forward = trainer.model.forward
        products = GradientProducts(trainer.model)
        step = StepProducts(products, lambda trainer=trainer: trainer.latest_inputs)  # type: ignore[misc]
        trainer.create_optimizer_and_scheduler(4)
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        if watched:
            step.begin()
        trainer.training_step(trainer.model, inputs, 4)
        assert len(step.end()) == watched
        assert trainer.model.forward == forward and step.end() == []
        assert not any(module._forward_hooks for module in products.sites)
        grads.append([parameter.grad for parameter in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def records(model: Path, output: Path, probes: int, **more: Any) -> tuple[list[dict[str, Any]], TrainSection]:
    fields = FIELDS | {"max_steps": 3, "learning_rate": 1e-3}
    config = TrainSection(
        model=str(model), methods={"m": LossSection(loss="dpo")},
        trainer=fields | more.pop("trainer", {}), entanglement=EntanglementSection(every=1, probes=probes), **more,
    )  # fmt: skip
    train_policy(table(12), config, "m", output, seed=0)
    found: list[dict[str, Any]] = read_json(output / "history.json")["entanglement"]
    return found, config


def test_every_step_without_probes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every step measures its batch; `layout: auto` keeps rows apart; the numbers are those of passes apart."""
    model = causal(tmp_path / "model")
    found, config = records(model, tmp_path / "out", 0)
    assert [record["step"] for record in found] == [1, 2, 3] and "pass" not in caplog.text
    assert set(found[0]) >= {"batch_cosine", "batch_entangled", "seconds"} and "cosine" not in found[0]
    trainer = make_trainer(table(12), config, "m", tmp_path / "again", seed=0)
    assert trainer.layout == "concatenated"
    expected = one_step(trainer)[1]
    assert found[0]["batch_cosine"] == pytest.approx(float(expected[0].cosine.median()), rel=1e-4)
    assert found[0]["batch_norm_ratio"] == pytest.approx(float(expected[0].norm_ratio.median()), rel=1e-4)
    assert found[0]["batch_chosen_change"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"layout": "shared_prefix"}, "rows share their prefixes"),
        ({"trainer": {"gradient_checkpointing": True}}, "gradient checkpointing is on"),
        ({"trainer": {"bf16": True, "use_cpu": True}}, "it computes in bf16"),
        ({"peft": LORA | {"lora_dropout": 0.1}, "trainer": {"disable_dropout": False}}, "dropout is on"),
    ],
)
def test_what_a_step_cannot_measure_is_measured_apart_and_told(
    more: dict[str, Any], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, config = records(causal(tmp_path / "model"), tmp_path / "out", 0, **more)
    assert words in caplog.text and "measured by one more forward and backward pass" in caplog.text
    assert [record["step"] for record in found] == [1, 2, 3] and found[0]["batch_norm_ratio"] > 0
    assert (
        attach_probe(make_trainer(table(12), config, "m", tmp_path / "x", seed=0), config, tmp_path / "f").step is None
    )  # type: ignore[union-attr]


def test_the_page_shows_the_batch_alone(tmp_path: Path) -> None:
    """Curves of the batch without probes; a run with probes keeps those of the probes."""
    found, _ = records(causal(tmp_path / "model"), tmp_path / "out", 0)
    titles = [title for title, _ in _entanglement({"m": {"entanglement": found}})]
    assert titles == ["entangled pairs of the batch"]
    both, _ = records(causal(tmp_path / "model"), tmp_path / "both", 2)
    assert len(_entanglement({"m": {"entanglement": both}})) == 6
