"""bfloat16 next to trl: the gradient is no further from that in float64; cut pairs give trl's losses step by step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from align import PreferenceConfig, PreferenceTrainer
from tests.helpers.builders import causal, rows

SEEDS = range(6)
BETA = 0.5
Gradient = dict[str, Tensor]


def pairs(start: int, count: int = 4) -> Dataset:
    return Dataset.from_list(
        [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows(start + count)[start:]]
    )


def arguments(kind: type[DPOConfig], folder: Path, **more: Any) -> Any:
    return kind(
        str(folder), per_device_train_batch_size=4, use_cpu=True, report_to="none", gradient_checkpointing=False,
        beta=BETA, disable_tqdm=True, save_strategy="no", logging_steps=1, **more,
    )  # fmt: skip


def moved(model: Path, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A policy near the reference: its weights with a little noise."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.05)
    return policy.to(dtype)


def gradient(trainer: Any) -> Gradient:
    """The gradient of the first batch as the trainer computes it, in float64."""
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return {name: p.grad.double() for name, p in trainer.model.named_parameters() if p.grad is not None}


def exact(policy: nn.Module, reference: nn.Module, batch: dict[str, Tensor]) -> Gradient:
    """The gradient of the DPO loss (arXiv 2305.18290, equation 7) by autograd in float64."""
    ids, mask, completion = batch["input_ids"], batch["attention_mask"], batch["completion_mask"][:, 1:]

    def logps(model: nn.Module) -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        return (logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0] * completion).sum(dim=1)

    with torch.no_grad():
        start = logps(reference)
    chosen, rejected = (logps(policy) - start).chunk(2)
    (-nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()).backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def distance(found: Gradient, truth: Gradient) -> float:
    """Relative distance of two gradients."""
    assert found.keys() == truth.keys()
    away = sum(float(((found[name] - truth[name]) ** 2).sum()) for name in truth)
    return (away / sum(float((one**2).sum()) for one in truth.values())) ** 0.5


@pytest.mark.parametrize("layout", ["concatenated", "shared_prefix"])
def test_the_gradient_in_bfloat16_is_no_further_from_the_truth_than_trls(layout: str, tmp_path: Path) -> None:
    ours, trls = [], []
    for seed in SEEDS:
        model = causal(tmp_path / str(seed), seed)
        data, reference = pairs(4 * seed), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        args = arguments(PreferenceConfig, tmp_path / "ours", bf16=True, layout=layout)
        trainer = PreferenceTrainer(moved(model, seed), reference, args=args, train_dataset=data)
        batch = next(iter(trainer.get_train_dataloader()))
        truth = exact(moved(model, seed, torch.float64), reference.double(), batch)
        ours.append(distance(gradient(trainer), truth))
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        given = arguments(DPOConfig, tmp_path / "trl", bf16=True)
        trls.append(
            distance(gradient(DPOTrainer(moved(model, seed), reference, args=given, train_dataset=data)), truth)
        )
    assert 1e-4 < sum(trls) / len(trls) < 0.1, "16 bits are rounded"
    assert sum(ours) < 1.1 * sum(trls)


def test_cut_pairs_give_the_losses_of_trl(tmp_path: Path) -> None:
    """Five tokens of prompt and response; SGD, as AdamW makes whole steps of what rounding leaves of a gradient."""
    model = causal(tmp_path / "model")
    losses = []
    for trainer, kind in ((DPOTrainer, DPOConfig), (PreferenceTrainer, PreferenceConfig)):
        args = arguments(kind, tmp_path / "out", bf16=False, max_length=5, max_steps=4, optim="sgd", learning_rate=0.1)
        training = trainer(str(model), args=args, train_dataset=pairs(0, 12))
        training.train()
        losses.append([(row["loss"], row["logps/chosen"]) for row in training.state.log_history if "loss" in row])
    assert len(losses[0]) == 4 and losses[0][0][0] != losses[0][3][0]
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, abs=2e-6)
