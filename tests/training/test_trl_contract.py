"""What this program relies on inside trl and transformers, and where.

trl promises none of this, so pyproject.toml allows one minor version of it. Before allowing a new one, run this file
first: each failure names the file that has to be adapted.
"""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl.trainer import base_trainer, dpo_trainer, reward_trainer

from align.training.base.trainer import ReliableTrainer
from tests.helpers.builders import causal

PLACES = {
    "align/training/trainer.py": {
        DPOTrainer: {
            "__init__": (
                "model",
                "ref_model",
                "args",
                "data_collator",
                "train_dataset",
                "eval_dataset",
                "processing_class",
                "compute_metrics",
                "callbacks",
                "optimizers",
                "quantization_config",
                "peft_config",
            ),
            "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
            "training_step": (),
            "log": ("logs", "start_time"),
            "evaluate": ("eval_dataset", "ignore_keys", "metric_key_prefix"),
        },
        Trainer: {
            "training_step": ("model", "inputs", "num_items_in_batch"),
            "save_model": ("output_dir", "_internal_call"),
        },
    },
    "align/training/trained_tables.py": {
        DPOTrainer: {"_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name")},
    },
    "align/training/reference_passes.py": {
        DPOTrainer: {
            "_precompute_ref_logps": ("dataset", "name", "batch_size"),
            "compute_ref_log_probs": ("model", "inputs"),
        },
    },
    "align/training/base/trainer.py": {
        DPOTrainer: {"_set_signature_columns_if_needed": (), "_save_checkpoint": ("model", "trial")},
        RewardTrainer: {"_set_signature_columns_if_needed": (), "_save_checkpoint": ("model", "trial")},
        Trainer: {
            "train": ("resume_from_checkpoint",),
            "_get_grad_norm": ("model", "grad_norm"),
            "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
            "_get_output_dir": ("trial",),
            "_save": ("output_dir", "state_dict"),
        },
    },
    "align/training/base/async_checkpoints.py": {
        Trainer: {"_save_optimizer_and_scheduler": ("output_dir",), "_load_best_model": ()},
    },
    "align/training/base/resume.py": {
        Trainer: {
            "_save_rng_state": ("output_dir",),
            "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
            "_get_train_sampler": ("train_dataset",),
            "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
        },
    },
    "align/training/base/epochs.py": {
        Trainer: {
            "get_train_dataloader": (),
            "_get_train_sampler": ("train_dataset",),
            "_get_num_items_in_batch": ("batch_samples", "device"),
        },
    },
    "reward_models/trainer.py": {
        RewardTrainer: {
            "__init__": ("model", "args", "train_dataset", "processing_class", "peft_config"),
            "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
        },
    },
}
"""File of this program -> class -> method that it overrides or calls -> parameters that it names or is given."""

FIELDS = {
    DPOConfig: ("beta", "loss_type", "loss_weights", "ld_alpha", "use_weighting", "f_divergence_type", "max_length",
                "truncation_mode", "pad_to_multiple_of", "precompute_ref_log_probs", "model_init_kwargs",
                "trust_remote_code", "gradient_checkpointing_kwargs"),
    RewardConfig: ("max_length", "center_rewards_coefficient", "length_column_name", "train_sampling_strategy",
                   "trust_remote_code", "accelerator_config", "dataloader_drop_last"),
}  # fmt: skip

TEXTS = {
    "align/training/reference.py: the columns of the reference, read from the batch": (
        DPOTrainer._set_signature_columns_if_needed,
        ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"),
    ),
    "align/training/trainer.py: attributes set by DPOTrainer.__init__": (
        DPOTrainer.__init__,
        ("self.precompute_ref_logps", "self.ref_model", "self._metrics", "self._total_train_tokens",
         "self.train_dataset"),
    ),
    "align/training/trainer.py: metrics are lists by mode, averaged and cleared by log": (
        DPOTrainer.log, ('self._metrics[mode]', "clear()"),
    ),
    "reward_models/trainer.py: the metrics of RewardTrainer, logged for any objective": (
        RewardTrainer.compute_loss, ("self._metrics[mode]", "accuracy", "margin", "center_rewards_coefficient"),
    ),
    "align/training/base/checkpoints.py: the trainer's state is the last file of a checkpoint": (
        Trainer._save_checkpoint, ("TRAINER_STATE_NAME",),
    ),
}  # fmt: skip


def explained(place: str, what: str) -> str:
    """Message of a broken contract."""
    return (
        f"trl {trl.__version__}, transformers {transformers.__version__}: {what}. {place} relies on it: adapt it, or "
        "keep this version out in pyproject.toml"
    )


@pytest.mark.parametrize(
    ("place", "kind", "method", "parameters"),
    [
        (place, kind, method, parameters)
        for place, kinds in PLACES.items()
        for kind, methods in kinds.items()
        for method, parameters in methods.items()
    ],
)
def test_methods_that_are_overridden_or_called(
    place: str, kind: type, method: str, parameters: tuple[str, ...]
) -> None:
    found = getattr(kind, method, None)
    assert callable(found), explained(place, f"{kind.__name__} has no method {method}")
    known = inspect.signature(found).parameters
    taken = {name for name, parameter in known.items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD}
    missing = [name for name in parameters if name not in taken]
    assert not missing, explained(place, f"{kind.__name__}.{method} takes no {', '.join(missing)}")


@pytest.mark.parametrize("kind", FIELDS)
def test_fields_that_are_set_or_read(kind: type) -> None:
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    missing = [name for name in FIELDS[kind] if name not in known]
    assert not missing, explained("align/training/train.py", f"{kind.__name__} has no {', '.join(missing)}")


@pytest.mark.parametrize("place", TEXTS)
def test_names_inside_methods(place: str) -> None:
    method, names = TEXTS[place]
    source = re.sub(r"\s+", " ", inspect.getsource(method))
    missing = [name for name in names if name not in source]
    assert not missing, explained(place, f"{method.__qualname__} no longer says {', '.join(missing)}")


def test_the_table_of_overridden_methods_is_complete() -> None:
    """ReliableTrainer's docstring lists every method of Trainer that it or a mixin overrides, in calling order."""
    rows = re.findall(r"\| `(\w+)` \| ([\w, ]+) \|", str(ReliableTrainer.__doc__))
    classes = [kind for kind in ReliableTrainer.__mro__ if kind.__module__.startswith("align.")]
    methods = {name for kind in classes for name in vars(kind) if name in vars(Trainer) and not name.startswith("__")}
    assert dict(rows) == {name: ", ".join(kind.__name__ for kind in classes if name in vars(kind)) for name in methods}


def test_the_loss_of_the_trainer_is_reached_through_compute_loss() -> None:
    """Overriding compute_loss replaces trl's loss: nothing else calls _compute_loss."""
    source = inspect.getsource(DPOTrainer)
    calls = [line.strip() for line in source.splitlines() if "self._compute_loss(" in line]
    place = "align/training/trainer.py"
    assert calls == ["return self._compute_loss(model, inputs, return_outputs)"], explained(place, f"found {calls}")
    override = set(DPOTrainer.__dict__) & {"_get_num_items_in_batch", "get_train_dataloader", "_get_train_sampler"}
    assert not override, explained("align/training/base/epochs.py", f"DPOTrainer now has its own {override}")


def test_the_loss_is_taken_as_the_step_s_share() -> None:
    """trl passes ``loss_is_scaled_for_ga`` to transformers, so a loss is not divided by the number of micro-batches."""
    place = "align/training/trainer.py, reward_models/trainer.py"
    for kind in (DPOTrainer, RewardTrainer):
        assert hasattr(kind, "loss_is_scaled_for_ga"), explained(place, f"{kind.__name__} has no loss_is_scaled_for_ga")
    asked = inspect.getsource(Trainer.training_step)
    older = "loss_is_scaled_for_ga" in inspect.getsource(base_trainer._BaseTrainer.__init__)
    assert "self.loss_is_scaled_for_ga" in asked or older, explained(place, "nothing asks for loss_is_scaled_for_ga")


def test_accelerate_does_not_divide_the_loss(tmp_path: Path) -> None:
    """transformers before 5.6 lets accelerate divide it by the micro-batches, even if it is scaled already."""
    args = TrainingArguments(output_dir=str(tmp_path), gradient_accumulation_steps=4, use_cpu=True, report_to="none")
    divisor = Trainer(model=torch.nn.Linear(1, 1), args=args).accelerator.gradient_accumulation_steps
    place = "align/training/trainer.py, reward_models/trainer.py"
    assert divisor == 1, explained(place, f"accelerate divides each loss by {divisor}")


def collated(collator: Any, examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the batch of a collator as a dict."""
    return dict(collator(examples))


def test_the_policy_s_batch() -> None:
    """Row k of the first half is the chosen, row B + k the rejected response of pair k; right-padded; masks."""
    place = "align/models/collator.py"
    examples = [
        {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]},
        {"prompt_ids": [5], "chosen_ids": [7, 7, 1], "rejected_ids": [9]},
    ]
    batch = collated(dpo_trainer.DataCollatorForPreference(pad_token_id=0), examples)
    expected = {
        "input_ids": [[5, 6, 7, 0], [5, 7, 7, 1], [5, 6, 8, 9], [5, 9, 0, 0]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]],
        "completion_mask": [[0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 0]],
    }
    for name, rows in expected.items():
        assert name in batch, explained(place, f"a batch has no {name}")
        assert batch[name].tolist() == rows, explained(place, f"{name} of a batch is laid out in another way")


def test_the_reward_model_s_batch() -> None:
    """Chosen rows first, then rejected ones."""
    examples = [{"chosen_ids": [5, 6], "rejected_ids": [7]}, {"chosen_ids": [8], "rejected_ids": [9, 9]}]
    batch = collated(reward_trainer.DataCollatorForPreference(pad_token_id=0), examples)
    assert batch["input_ids"].tolist() == [[5, 6], [8, 0], [7, 0], [9, 9]], explained(
        "reward_models/trainer.py", "rows of a batch are laid out in another way"
    )


def test_helpers_of_trl(tmp_path: Path) -> None:
    """Functions that are imported by name, with the parameters that they are called with."""
    from trl.data_utils import extract_prompt
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.utils import use_adapter

    found = extract_prompt({"chosen": "a film is good", "rejected": "a film is bad"})
    assert found["prompt"] == "a film is", explained("align/data/implicit_prompt.py", f"extract_prompt gives {found}")
    model = AutoModelForCausalLM.from_pretrained(causal(tmp_path))
    model.gradient_checkpointing_enable()
    with disable_gradient_checkpointing(model, None):
        assert not model.is_gradient_checkpointing, explained("align/training/reference.py", "checkpointing stays on")
    assert model.is_gradient_checkpointing
    taken = list(inspect.signature(use_adapter).parameters)
    assert taken[:2] == ["model", "adapter_name"], explained(
        "align/training/reference.py", f"use_adapter takes {taken}"
    )
