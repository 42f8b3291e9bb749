"""PreferenceTrainer: equal to trl's DPOTrainer step by step; weights, micro-batches, settings that are refused."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from datasets import Dataset
from packaging import version
from peft import PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from align.config import LossSection, TrainSection
from align.errors import ConfigError, DataError
from align.losses.margin_weights import madpo_weight
from align.losses.registry import resolve
from align.models.layout import LayoutChoice
from align.models.loading import load_policy, load_tokenizer
from align.training.columns import add_weight
from align.training.preference_config import PreferenceConfig
from align.training.train import make_trainer
from align.training.trainer import PreferenceTrainer
from tests.helpers.builders import rows

BASE: dict[str, Any] = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1, "bf16": False,
    "use_cpu": True, "gradient_checkpointing": False, "max_length": 64, "report_to": "none", "save_strategy": "no",
    "disable_tqdm": True,
}  # fmt: skip
FIELDS = {name: value for name, value in BASE.items() if name != "disable_tqdm"}
"""``BASE`` as the ``trainer`` section of a run file."""

ROUNDING = 1e-5 if version.parse(torch.__version__).release >= (2, 9) else 2e-5
"""Gradients of up to 0.14 after steps of AdamW; with the kernels of torch 2.8 the largest difference was 1.3e-5."""


class Gradients(TrainerCallback):
    """Copies the gradient of every parameter at each step, and lets noise depend on the step alone."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seed the noise of the step."""
        torch.manual_seed(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Copy the gradients."""
        named = model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def ours(
    policy: Path,
    output: Path,
    loss: str = "dpo",
    pairs: Dataset | None = None,
    layout: LayoutChoice = "auto",
    budget: int | None = None,
    group_by_prompt: Literal[True] | None = None,
    **fields: Any,
) -> PreferenceTrainer:
    """Return a PreferenceTrainer as ``make_trainer`` builds it, with its reference cache in ``output``."""
    config = TrainSection(
        model=str(policy),
        methods={"m": LossSection(loss=loss)},
        trainer=FIELDS | fields,
        layout=layout,
        max_tokens_per_device=budget,
        group_by_prompt=group_by_prompt,
    )
    table = Dataset.from_list(rows(16)) if pairs is None else pairs
    return make_trainer(table, config, "m", output, seed=0, reference_cache=output / "cache")


def compare_with_trl(
    policy: Path,
    tmp_path: Path,
    loss: str,
    trl_loss: str,
    table: list[dict[str, Any]],
    metrics_rtol: float = 1e-5,
    layout: LayoutChoice = "auto",
    **fields: Any,
) -> None:
    theirs = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        args=DPOConfig(output_dir=str(tmp_path / "trl"), seed=0, beta=0.1, loss_type=trl_loss, **(BASE | fields)),
        train_dataset=Dataset.from_list(table).remove_columns(["id", "margin"]),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    mine = ours(policy, tmp_path / "ours", loss, Dataset.from_list(table), layout, **fields)
    runs = []
    for trainer in (theirs, mine):
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        log = trainer.state.log_history
        runs.append(([entry["loss"] for entry in log if "loss" in entry], gradients.steps, log))
    (their_losses, their_gradients, their_log), (my_losses, my_gradients, my_log) = runs
    assert np.allclose(their_losses, my_losses, atol=1e-5)
    for a, b in zip(their_gradients, my_gradients, strict=True):
        assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=ROUNDING) for name in a)
    for name in ("rewards/chosen", "rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen", "entropy"):
        logged = [[float(entry[name]) for entry in log if name in entry] for log in (their_log, my_log)]
        assert np.allclose(*logged, rtol=metrics_rtol, atol=1e-4), name


@pytest.mark.parametrize(("loss", "trl_loss"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_equal_to_trl_step_by_step(tiny_policy: Path, tmp_path: Path, loss: str, trl_loss: str) -> None:
    """Losses and gradients to 1e-5, over steps that move the weights."""
    compare_with_trl(tiny_policy, tmp_path, loss, trl_loss, rows(16))


@pytest.mark.slow
@pytest.mark.model
def test_equal_to_trl_on_the_real_model(assets: Path, tmp_path: Path) -> None:
    """SmolLM2-135M, all parameters, at a rate at which it learns; logged entropy sums 49,152 float32 terms."""
    compare_with_trl(assets / "smollm2", tmp_path, "dpo", "sigmoid", rows(16), metrics_rtol=2e-4, learning_rate=1e-6)


def test_madpo_is_a_weight_column_times_dpo(tiny_policy: Path, tmp_path: Path) -> None:
    """The loss of the first step, in which the policy is its own reference, is log 2 times the mean weight."""
    pairs = Dataset.from_list(rows(16)).add_column("weight", [0.5] * 16)
    table, bound = add_weight(pairs, resolve("madpo", {}))
    assert bound.spec.name == "dpo"
    assert np.allclose(table["weight"], 0.5 * madpo_weight(torch.tensor(pairs["margin"], dtype=torch.float64)).numpy())
    trainer = ours(tiny_policy, tmp_path, "madpo", pairs, per_device_train_batch_size=16, max_steps=1)
    trainer.train()
    logged, mean = trainer.state.log_history[0], float(np.mean(table["weight"]))
    assert logged["loss"] == pytest.approx(mean * np.log(2), abs=1e-4)
    assert logged["weight/mean"] == pytest.approx(mean)


@pytest.mark.parametrize("loss", ["soft_madpo", "mmpo", "beta_dpo", "simpo", "dpop"])
def test_related_losses_train_and_log(tiny_policy: Path, tmp_path: Path, loss: str) -> None:
    trainer = ours(tiny_policy, tmp_path, loss)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4 and all(np.isfinite(float(entry["loss"])) for entry in logged)
    shares = [value for name, value in logged[0].items() if name.startswith("margin/share")]
    assert sum(float(share) for share in shares) == pytest.approx(1.0)
    if loss != "simpo":  # reads no reference
        assert float(logged[0]["logps/chosen_change"]) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("layout", ["concatenated", "shared_prefix"])
@pytest.mark.parametrize("loss", ["madpo", "ipo"])
def test_same_gradients_for_any_split(tiny_policy: Path, tmp_path: Path, loss: str, layout: LayoutChoice) -> None:
    """P11: neither token budgets, nor accumulation with an uneven last step, nor the layout change a gradient."""
    table = Dataset.from_list(rows(14))
    runs = []
    for name, (fields, budget) in {
        "one batch": ({"per_device_train_batch_size": 8}, None),
        "budget": ({"per_device_train_batch_size": 8}, 60),
        "one pair": ({"per_device_train_batch_size": 8}, 1),
        "accumulated": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, None),
        "both": ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 50),
    }.items():
        trainer = ours(tiny_policy, tmp_path / name, loss, table, layout, budget, max_steps=4, **fields)
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        runs.append((gradients.steps, [entry for entry in trainer.state.log_history if "loss" in entry]))
    (expected, log), *others = runs
    assert len(expected) == 4
    for steps, other in others:
        for a, b in zip(expected, steps, strict=True):
            assert all(torch.allclose(a[name], b[name], atol=2e-5) for name in a)
        for name in ("loss", "weight/mean", "logps/chosen", "rewards/margins", "entropy"):
            assert np.allclose([e[name] for e in log], [e[name] for e in other], atol=1e-3), name


def test_layout_that_is_not_exact_is_refused(tmp_path: Path, tiny_policy: Path) -> None:
    prompt_tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    arguments: dict[str, Any] = {
        "model": load_policy(str(tiny_policy)), "peft_config": prompt_tuning,
        "args": PreferenceConfig(str(tmp_path), precompute_ref_log_probs=True, layout="shared_prefix", **FIELDS),
        "train_dataset": Dataset.from_list(rows(4)), "processing_class": load_tokenizer(str(tiny_policy)),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"PreferenceConfig.layout: shared_prefix .* prompt-learning adapter"):
        PreferenceTrainer(**arguments)


def test_settings_that_cannot_be_trained_are_refused(tiny_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.trainer.ld_alpha: 0.5 has no meaning"):
        ours(tiny_policy, tmp_path, ld_alpha=0.5)
    with pytest.raises(ConfigError, match=r"train.trainer.learning_rte: not a field of DPOConfig"):
        ours(tiny_policy, tmp_path, learning_rte=1.0)
    with pytest.raises(ConfigError, match="loss madpo needs a `margin` column"):
        ours(tiny_policy, tmp_path, "madpo", Dataset.from_list(rows(4)).remove_columns("margin"))


def test_prompts_that_fill_the_length_are_counted(
    tiny_policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = [row | {"prompt": "the film was " * (9 if k < 3 else 1)} for k, row in enumerate(rows(8))]
    trainer = ours(tiny_policy, tmp_path, pairs=Dataset.from_list(table), max_length=20)
    assert len(trainer.train_dataset) == 5 and "3 of 8 pairs are left out: their prompts fill max_length" in caplog.text
    with pytest.raises(DataError, match="none of 8 pairs has a token of a response within max_length"):
        ours(tiny_policy, tmp_path, pairs=Dataset.from_list(table), max_length=2)


def test_an_adapter_that_changes_its_base_is_refused(tiny_policy: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    config = TrainSection(model=str(tiny_policy), methods={"m": LossSection(loss="dpo")}, trainer=BASE, peft=lora)
    with pytest.raises(
        ConfigError, match="init_lora_weights: 'pissa' subtracts the adapter's start from the base weights"
    ):
        make_trainer(Dataset.from_list(rows(8)), config, "m", tmp_path, seed=0)
