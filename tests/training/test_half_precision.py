"""bfloat16 next to trl: the gradient is no further from that in float64; cut pairs give trl's losses step by step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from align import PreferenceConfig, PreferenceTrainer
from tests.helpers.builders import causal, rows

SEEDS = range(4)
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


class Keep(TrainerCallback):
    """Keeps the gradient of the last step, in float64."""

    gradient: Gradient

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.gradient = {name: p.grad.double() for name, p in named if p.grad is not None}


def first_step(trainer: type[DPOTrainer], args: DPOConfig, policy: nn.Module, model: Path, data: Dataset) -> Any:
    """The gradient of a training's first step, which is in bfloat16 only within ``train``, and its batch."""
    kept, reference = Keep(), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = trainer(policy, reference, args=args, train_dataset=data, callbacks=[kept])
    batch = next(iter(made.get_train_dataloader()))
    made.train()
    return kept.gradient, batch


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


def test_the_gradient_in_bfloat16_is_no_further_from_the_truth_than_trls(tmp_path: Path) -> None:
    away: dict[str, list[float]] = {"trl": [], "concatenated": [], "shared_prefix": []}
    once: dict[str, Any] = {"bf16": True, "max_steps": 1, "optim": "sgd", "max_grad_norm": 1e9}
    for seed in SEEDS:
        model, data = causal(tmp_path / str(seed), seed), pairs(4 * seed)
        args = arguments(DPOConfig, tmp_path / "trl", **once)
        found, batch = first_step(DPOTrainer, args, moved(model, seed), model, data)
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        truth = exact(moved(model, seed, torch.float64), reference, batch)
        away["trl"].append(distance(found, truth))
        for layout in ("concatenated", "shared_prefix"):
            args = arguments(PreferenceConfig, tmp_path / "ours", **once, layout=layout)
            away[layout].append(
                distance(first_step(PreferenceTrainer, args, moved(model, seed), model, data)[0], truth)
            )
    mean = {name: sum(found) / len(found) for name, found in away.items()}
    assert 0.01 < mean["trl"] < 0.2, "16 bits are rounded"
    assert away["concatenated"] != away["shared_prefix"] != away["trl"], "each in its own way"
    assert mean["concatenated"] < 1.1 * mean["trl"] and mean["shared_prefix"] < 1.1 * mean["trl"]


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
