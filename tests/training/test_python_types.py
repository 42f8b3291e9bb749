"""Arguments of another type than a trainer takes, and tables that it evaluates and predicts after it is made."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

from align import PreferenceConfig, PreferenceTrainer
from align.errors import AlignError, ConfigError
from reward_models import RewardConfig, RewardTrainer
from tests.helpers.builders import llama_reward, rows
from tests.training.test_python_trainer import BASE

PAIRS = Dataset.from_list(rows(8))
CHAT: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "Is it good?"}],
    "chosen": [{"role": "assistant", "content": "good film"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}
FIELDS = [
    ("learning_rate", "fast", "expected a number"),
    ("max_steps", "3", "expected a whole number"),
    ("max_length", 2.5, "expected a whole number or None"),
    ("seed", None, "expected a whole number"),
    ("gradient_checkpointing", "no", "expected True or False"),
    ("gradient_accumulation_steps", 0, "expected a whole number of at least 1"),
    ("train_sampling_strategy", "group_by_lenght", "expected one of random, sequential, group_by_length"),
    ("log_level", "loud", "expected one of detail, debug"),
    ("per_device_train_batch_size", 0, "expected a whole number of at least 1"),
    ("eval_strategy", "sometimes", "expected one of no, steps, epoch"),
    ("optim", "adamw_x", "expected one of adamw_torch, "),
    ("report_to", 3, "expected text or a list or None"),
]


@pytest.mark.parametrize(("name", "value", "expected"), FIELDS)
@pytest.mark.parametrize("config", [PreferenceConfig, RewardConfig])
def test_fields_of_another_type(tmp_path: Path, config: Any, name: str, value: Any, expected: str) -> None:
    """The error names the class, the field, what it holds and what it may hold."""
    with pytest.raises(ConfigError) as found:
        config(str(tmp_path), **(BASE | {name: value}))
    assert found.value.code == "trainer-key"
    assert found.value.message.startswith(f"{config.__name__}.{name}: found {value!r}, {expected}"), found.value


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reference_cache": 3, "precompute_ref_log_probs": True}, "reference_cache: found 3, expected text or a path"),
        ({"precompute_ref_log_probs": "no"}, "PreferenceConfig.precompute_ref_log_probs: found 'no', expected True or"),
        ({"truncation_mode": "middle"}, "PreferenceConfig.truncation_mode: found 'middle', expected one of keep_start"),
        ({"loss_type": 3}, "PreferenceConfig.loss_type: found 3, expected text or a list"),
        ({"loss_type": []}, "PreferenceConfig.loss_type: found [], expected the name of a loss"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": 0.5}, "PreferenceConfig.loss_weights: found 0.5, expected"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "Got 1 weights for 2 loss types"),
        ({"model_init_kwargs": 3}, "PreferenceConfig.model_init_kwargs: found 3, expected a dict"),
        ({"loss": []}, "PreferenceConfig.loss: found [], expected a name in align.LOSSES"),
    ],
)  # fmt: skip
def test_fields_of_the_policy_s_config(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as found:
        PreferenceConfig(str(tmp_path), **(BASE | fields))
    assert words in found.value.message


def test_values_that_only_look_like_another_type(tmp_path: Path) -> None:
    """A whole number is a number, numpy's numbers and paths are taken, and so is a name of transformers' enum."""
    made = PreferenceConfig(
        tmp_path, **BASE | {"learning_rate": 1, "max_steps": np.int64(3), "max_grad_norm": np.float32(0.5)},
        lr_scheduler_type="cosine", num_train_epochs=2, warmup_steps=0.1, precompute_ref_log_probs=True,
        reference_cache=tmp_path, loss_type="ipo",
    )  # fmt: skip
    assert made.max_steps == 3 and made.loss_type in ("ipo", ["ipo"])


ARGUMENTS = [
    ({"callbacks": 3}, "callbacks: found 3, expected a list of TrainerCallback"),
    ({"callbacks": [print]}, "callbacks[0]: found <built-in function print>, expected a TrainerCallback"),
    ({"callbacks": [int]}, "callbacks[0]: found the class int, expected a TrainerCallback"),
    ({"optimizers": (None,)}, "optimizers: found (None,), expected (optimizer, schedule)"),
    ({"optimizers": (torch.optim.SGD, None)}, "optimizers[0]: found the class SGD, expected an optimizer"),
    ({"optimizers": (None, 3)}, "optimizers[1]: found 3, expected a schedule"),
    ({"compute_metrics": "accuracy"}, "compute_metrics: found 'accuracy', expected a function"),
    ({"processing_class": 3}, "processing_class: found int, expected a tokenizer"),
    ({"peft_config": 3}, "peft_config: found int, expected a peft.PeftConfig"),
]


@pytest.mark.parametrize(("more", "words"), ARGUMENTS)
@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_arguments_of_another_type(
    tiny_policy: Path, tmp_path: Path, kind: str, more: dict[str, Any], words: str
) -> None:
    """Both trainers refuse them before any model is loaded."""
    with pytest.raises(ConfigError) as found:
        if kind == "policy":
            PreferenceTrainer("no/such", args=PreferenceConfig(str(tmp_path), **BASE), train_dataset=PAIRS, **more)
        else:
            RewardTrainer("no/such", args=RewardConfig(str(tmp_path), **BASE), train_dataset=PAIRS, **more)
    assert words in found.value.message


@pytest.mark.parametrize(
    ("cell", "column", "expected"),
    [
        ("{", "chat_template_kwargs", "an object of arguments"),
        ("[1]", "chat_template_kwargs", "an object of arguments"),
        (3, "chat_template_kwargs", "an object of arguments"),
        ("x", "tools", "a list of tools"),
        ('{"a": 1}', "tools", "a list of tools"),
    ],
)
def test_cells_of_the_chat_template(tmp_path: Path, cell: Any, column: str, expected: str) -> None:
    table = [CHAT, {**CHAT, column: cell}]
    with pytest.raises(AlignError) as found:
        PreferenceTrainer("no/such", args=PreferenceConfig(str(tmp_path), **BASE), train_dataset=table)
    assert found.value.code == "pair-type"
    assert f"train_dataset: {column} of row 1: found {cell!r}, expected {expected}" in found.value.message


def test_a_checkpoint_of_another_type(tiny_policy: Path, tmp_path: Path) -> None:
    trainer = PreferenceTrainer(str(tiny_policy), args=PreferenceConfig(str(tmp_path), **BASE), train_dataset=PAIRS)
    with pytest.raises(ConfigError, match="resume_from_checkpoint: found 3, expected a folder"):
        trainer.train(resume_from_checkpoint=3)
    with pytest.raises(ConfigError, match="resume_from_checkpoint: found True, and no checkpoint in"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("precomputed", [False, True])
def test_tables_of_any_kind_are_evaluated_and_predicted(tiny_policy: Path, tmp_path: Path, precomputed: bool) -> None:
    """However the same pairs are given, their loss is the same; before any step it is log 2."""
    args = PreferenceConfig(str(tmp_path), **BASE, precompute_ref_log_probs=precomputed)
    trainer = PreferenceTrainer(str(tiny_policy), args=args, train_dataset=PAIRS, eval_dataset={"held": PAIRS})
    assert trainer.predict(PAIRS).metrics["test_loss"] == pytest.approx(np.log(2), abs=1e-6)
    trainer.args.precompute_ref_log_probs = False
    if not precomputed:
        trainer.train()
    losses = [
        trainer.evaluate("held")["eval_loss"], trainer.evaluate(PAIRS)["eval_loss"],
        *(trainer.predict(table).metrics["test_loss"] for table in (PAIRS, rows(8), pd.DataFrame(rows(8)))),
        trainer.predict(trainer.eval_dataset["held"]).metrics["test_loss"],
    ]  # fmt: skip
    assert losses == pytest.approx([losses[0]] * len(losses))
    assert precomputed or losses[0] < 0.69
    with pytest.raises(ConfigError, match="eval_dataset: found 'hold', expected one of held"):
        trainer.evaluate("hold")


def test_new_tables_when_the_reference_is_gone(tiny_policy: Path, tmp_path: Path) -> None:
    args = PreferenceConfig(str(tmp_path), **BASE, precompute_ref_log_probs=True)
    trainer = PreferenceTrainer(str(tiny_policy), args=args, train_dataset=PAIRS, eval_dataset=PAIRS)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == trainer.predict(trainer.eval_dataset).metrics["test_loss"]
    for call, name in ((trainer.evaluate, "eval_dataset"), (trainer.predict, "test_dataset")):
        with pytest.raises(ConfigError, match=f"{name}: found a new table after 3 steps"):
            call(PAIRS)


def test_a_reward_model_evaluates_a_new_table_as_its_own(tmp_path: Path) -> None:
    """The column ``margin``, which the objective does not name, is not read, and texts are truncated as in training.

    trl's way would subtract the margin from the difference of the rewards.
    """
    args = RewardConfig(str(tmp_path / "out"), **BASE | {"max_length": 6})
    model = str(llama_reward(tmp_path / "model"))
    trainer = RewardTrainer(model, args=args, train_dataset=PAIRS, eval_dataset={"held": PAIRS})
    assert "margin" in PAIRS.column_names
    expected = trainer.evaluate("held")["eval_loss"]
    assert trainer.evaluate(PAIRS)["eval_loss"] == pytest.approx(expected)
    assert trainer.evaluate({"new": rows(8)})["eval_new_loss"] == pytest.approx(expected)
    assert trainer.predict(pd.DataFrame(rows(8))).metrics["test_loss"] == pytest.approx(expected)
    with pytest.raises(ConfigError, match="eval_dataset: found 'hold', expected one of held"):
        trainer.evaluate("hold")
