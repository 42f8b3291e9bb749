"""Settings of a training: obeyed, or refused by name before anything is loaded."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, RewardConfig

from align.config import EntanglementSection, LossSection, TrainSection
from align.errors import ConfigError, DataError
from align.io.files import read_json
from align.losses.registry import resolve
from align.models.loading import load_policy, load_tokenizer
from align.run.checks import check_train
from align.training.base.arguments import build_trainer_args
from align.training.columns import prepare_pairs, told_apart, trained_pairs
from align.training.preference_config import PreferenceConfig
from align.training.train import CHECKPOINTS, train_policy
from align.training.trainer import PreferenceTrainer
from tests.helpers.builders import causal, rows, trained_adapter
from tests.training.test_trainer import BASE, FIELDS, compare_with_trl, ours

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def section(model: object = "m", loss: str = "dpo", mask: bool = False, **options: Any) -> TrainSection:
    method = LossSection(loss=loss, token_mask={} if mask else None)  # type: ignore[arg-type]
    trainer = {"use_cpu": True} | options.pop("trainer", {})
    return TrainSection(model=str(model), methods={"m": method}, trainer=trainer, **options)


def checked(tmp_path: Path, **options: Any) -> None:
    check_train(section(**options), {"output_dir": str(tmp_path)})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("load_best_model_at_end", True, "has no effect here: a training here holds no pairs back"),
        ("save_strategy", "best", "found 'best', expected no, steps or epoch"),
        ("eval_strategy", "steps", "has no effect here: a training here holds no pairs back"),
        ("metric_for_best_model", "loss", "has no effect here"),
        ("eval_steps", 5, "has no effect here"),
        ("eval_on_start", True, "has no effect here"),
        ("do_eval", True, "has no effect here"),
        ("per_device_eval_batch_size", 2, "has no effect here"),
        ("label_smoothing_factor", 0.3, "it smooths the labels of a language model's own loss"),
        ("resume_from_checkpoint", "/nonexistent", "resumes from the last checkpoint in its own folder"),
        ("ignore_data_skip", True, "goes on with the pairs that are left"),
        ("save_only_model", True, "could not resume from such a checkpoint"),
        ("num_train_epochs", 0, "found 0, expected more than 0: no step would be made"),
        ("use_liger_kernel", True, "expected the package liger-kernel to be installed"),
        ("optim", "lomo", "lomo: You need to install `lomo_optim`"),
        ("optim", "adamw_bnb_8bit", "You need to install `bitsandbytes`"),
        ("lr_scheduler_type", "cosine_with_min_lr", "lr_scheduler_kwargs: found None: One of min_lr"),
        ("push_to_hub", True, "a run uploads nothing; `align push FOLDER"),
        ("train_sampling_strategy", "group_by_lenght", "expected one of random, .*did you mean `group_by_length`"),
        ("log_level", "loud", "expected one of detail, debug"),
        ("dataloader_multiprocessing_context", "thread", "expected one of fork, spawn, forkserver"),
        ("adam_beta1", 1.5, "found 1.5, expected a number below 1"),
        ("adam_epsilon", -1e-8, "expected at least 0"),
        ("optim_args", "momentum=0.9", "momentum=0.9, which has no effect here: adamw_torch"),
        ("optim_target_modules", ["q_proj"], "which adamw_torch.* does not read"),
        ("gradient_checkpointing_kwargs", {"reentrant": True}, "expected a mapping with keys of use_reentrant"),
        ("gradient_checkpointing_kwargs", "x", "expected a mapping with keys of use_reentrant"),
        ("dataloader_persistent_workers", True, "expected dataloader_num_workers of at least 1"),
        ("save_total_limit", 0, "expected at least 1"),
        ("auto_find_batch_size", True, "it would go on with fewer pairs in a step"),
        ("torch_compile_mode", "fast", "expected one of default"),
        ("include_num_input_tokens_seen", "some", "expected all, non_padding, no"),
        ("bf16_full_eval", True, "computes as the training does"),
        ("pad_to_multiple_of", 0, "expected at least 1"),
        ("neftune_noise_alpha", -1.0, "expected at least 0"),
        ("dataset_num_proc", 0, "expected at least 1"),
        ("seed", -1, "expected at least 0"),
    ],
)
@pytest.mark.parametrize("kind", [DPOConfig, RewardConfig])
def test_fields_that_cannot_be_obeyed(kind: type, field: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)\[trainer-key\].*{message}"):
        build_trainer_args(kind, {field: value}, path="x.trainer", forced={"output_dir": str(tmp_path)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"optim": "sgd", "optim_args": "alpha=0.9"},
            "found alpha=0.9, which has no effect here: sgd does not read it",
        ),
        ({"optim": "rmsprop", "optim_args": "alpha=0.9,beta=1"}, "found beta=1, which has no effect here: rmsprop"),
        ({"optim": "rmsprop", "optim_args": "alpha=-2"}, "optim: rmsprop: Invalid alpha value"),
        ({"save_strategy": "steps", "save_steps": 0}, "no checkpoint would be written"),
        ({"ref_model_mixup_alpha": 0.9}, "which has no effect here: sync_ref_model is false"),
        ({"truncation_mode": "keep_strat"}, "expected one of keep_end, keep_start.*did you mean `keep_start`"),
        ({"model_init_kwargs": {"dtype": "bfloat"}}, "model_init_kwargs.dtype: found 'bfloat', expected a dtype"),
    ],
)
def test_values_that_the_libraries_pass_over_or_find_late(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    """They trained as if the field were not there, or ended in a traceback in the first step."""
    with pytest.raises(ConfigError, match=rf"(?s)\[trainer-key\].*{message}"):
        build_trainer_args(DPOConfig, fields, path="x.trainer", forced={"output_dir": str(tmp_path)})


@pytest.mark.parametrize(
    "fields",
    [
        {"optim": "rmsprop", "optim_args": "alpha=0.9"},
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"sync_ref_model": True, "precompute_ref_log_probs": False, "ref_model_mixup_alpha": 0.9},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"include_num_input_tokens_seen": True, "model_init_kwargs": {"dtype": "bfloat16"}, "adam_beta1": 0.0},
    ],
)
def test_values_that_are_obeyed_pass(fields: dict[str, Any], tmp_path: Path) -> None:
    build_trainer_args(DPOConfig, fields, path="x.trainer", forced={"output_dir": str(tmp_path)})


def test_rewards_are_not_pushed_away_from_zero(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"center_rewards_coefficient: found -0.5, expected at least 0"):
        build_trainer_args(
            RewardConfig, {"center_rewards_coefficient": -0.5}, path="x.trainer", forced={"output_dir": str(tmp_path)}
        )


def test_fields_at_their_defaults_pass(tmp_path: Path) -> None:
    neutral = {"do_eval": False, "include_for_metrics": [], "label_smoothing_factor": 0.0, "save_only_model": False}
    args = build_trainer_args(DPOConfig, neutral, path="x.trainer", forced={"output_dir": str(tmp_path)})
    assert {name: getattr(args, name) for name in neutral} == neutral


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer": {"use_weighting": True}}, "use_weighting: True has no meaning"),
        ({"trainer": {"ld_alpha": 0.5}}, "ld_alpha: 0.5 has no meaning"),
        ({"trainer": {"f_divergence_type": "js_divergence"}}, "f_divergence_type: 'js_divergence' has no meaning"),
        ({"trainer": {"f_alpha_divergence_coef": 0.3}}, "f_alpha_divergence_coef: 0.3 has no meaning"),
        ({"trainer": {"padding_free": True}}, "packs the pairs"),
        ({"trainer": {"learning_rate": 0}}, "learning_rate: found 0, expected more than 0: no weight would move"),
        ({"trainer": {"sync_ref_model": True}}, "sync_ref_model: found true together with reference log-probs"),
        (
            {"trainer": {"sync_ref_model": True, "precompute_ref_log_probs": False}, "peft": LORA},
            "sync_ref_model: found true, expected false: an adapter has no reference",
        ),
        ({"trainer": {"precompute_ref_log_probs": True}, "mask": True}, "found true together with a token_mask"),
        ({"trainer": {"neftune_noise_alpha": 5}, "layout": "shared_prefix"}, "together with neftune_noise_alpha"),
        ({"peft": LORA | {"init_lora_weights": "olora"}}, "init_lora_weights: 'olora' subtracts"),
        ({"peft": LORA | {"inference_mode": True}}, "inference_mode: found true"),
        ({"loss": "beta_dpo", "entanglement": EntanglementSection()}, "entanglement: needs one process"),
        ({"trainer": {"model_init_kwargs": {"revision": "v1"}}}, r"model_init_kwargs.revision: found 'v1'"),
        ({"trainer": {"model_init_kwargs": {"subfolder": "x"}}}, r"model_init_kwargs.subfolder: found 'x'"),
        ({"trainer": {"model_init_kwargs": {"torch_dtype": "bfloat16"}}}, "expected dtype in its place"),
        (
            {"trainer": {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}},
            "expected the package bitsandbytes",
        ),
    ],
)
def test_settings_are_refused_when_the_run_is_checked(tmp_path: Path, options: Any, message: str) -> None:
    """No model is loaded: there is none of this name."""
    with pytest.raises(ConfigError, match=message):
        checked(tmp_path, **options)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("fsdp", True, "fsdp: found True and one process, expected a launcher"),
        ("fsdp_config", {"fsdp_version": 2}, "fsdp_config: found .*, which has no effect without fsdp"),
    ],
)
def test_sharding_needs_processes(
    tmp_path: Path, field: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.setenv(name, "")  # transformers sets some, which would outlive this test
    with pytest.raises(ConfigError, match=message):
        checked(tmp_path, trainer={field: value})
    monkeypatch.setattr("align.training.base.settings.world_size", lambda: 2)
    checked(tmp_path, trainer={field: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("activation_offloading", True, "expected a GPU"),
        ("fp16", True, "fp16: found true, expected a GPU"),
        ("model_init_kwargs", {"attn_implementation": "spda"}, "found 'spda', expected one of eager, sdpa"),
        ("model_init_kwargs", {"attn_implementation": "flex_attention"}, "expected sdpa or eager: there is no GPU"),
    ],
)
def test_what_needs_a_gpu(tmp_path: Path, field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(tmp_path, trainer={field: value})


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_settings_that_a_launcher_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """DeepSpeed steps after each backward pass; neither writes the reference into its checkpoints."""
    moving = section(trainer={"sync_ref_model": True, "precompute_ref_log_probs": False})
    split = section(max_tokens_per_device=64)
    forced = {"output_dir": str(tmp_path)}
    check_train(moving, forced)
    check_train(split, forced)
    monkeypatch.setattr("align.training.settings.launched", lambda name: name == kind)
    with pytest.raises(ConfigError, match="checkpoints do not hold the reference"):
        check_train(moving, forced)
    if kind == "DEEPSPEED":
        with pytest.raises(ConfigError, match="max_tokens_per_device: DeepSpeed makes an optimizer step after each"):
            check_train(split, forced)


def test_weights_are_float32_whatever_else_is_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As trl's own default is: a 16-bit checkpoint at a small learning rate would hardly move."""
    folder = causal(tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    logging.getLogger("trl").propagate = True
    trainer = ours(folder, tmp_path, model_init_kwargs={"attn_implementation": "eager"})
    assert trainer.model.dtype == torch.float32 and "eager" in trainer.model.config._attn_implementation
    assert "model_init_kwargs` will be ignored" not in caplog.text
    assert ours(folder, tmp_path, model_init_kwargs={"dtype": "bfloat16"}).model.dtype == torch.bfloat16


@pytest.mark.parametrize("fields", [{"neftune_noise_alpha": 5.0}, {"disable_dropout": False}])
def test_noise_is_drawn_row_by_row_as_trl_draws_it(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = causal(tmp_path / "m")
    if "disable_dropout" in fields:
        config = AutoModelForCausalLM.from_pretrained(folder).config
        config.attention_dropout = 0.2
        config.save_pretrained(folder)
    compare_with_trl(folder, tmp_path, "dpo", "sigmoid", rows(8), max_steps=2, **fields)
    assert ours(folder, tmp_path, **fields).layout == "concatenated"


class Stop(TrainerCallback):
    """Ends a training as a kill between two steps does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_moving_reference_survives_a_stop(tiny_policy: Path, tmp_path: Path) -> None:
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    fields = moving | {"precompute_ref_log_probs": False, "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    whole = ours(tiny_policy, tmp_path / "whole", **fields)
    whole.train()
    stopped = ours(tiny_policy, tmp_path / "stopped", **fields)
    stopped.add_callback(Stop(3))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = ours(tiny_policy, tmp_path / "stopped", **fields)
    with resumed.trained("test"):
        pass
    for one, other in ((whole.model, resumed.model), (whole.ref_model, resumed.ref_model)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    checkpoint = tmp_path / "stopped" / CHECKPOINTS / "checkpoint-2"
    (checkpoint / "reference.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no reference model, which train.trainer.sync_ref_model has moved"):
        ours(tiny_policy, tmp_path / "stopped", **fields).train(resume_from_checkpoint=str(checkpoint))


def test_checkpoints_that_are_kept_hold_no_reference(tiny_policy: Path, tmp_path: Path) -> None:
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "precompute_ref_log_probs": False}
    config = section(tiny_policy, trainer=FIELDS | moving | {"save_strategy": "steps", "save_steps": 2})
    train_policy(Dataset.from_list(rows(8)), config, "m", tmp_path, seed=0)
    kept = {file.name for file in (tmp_path / CHECKPOINTS / "checkpoint-2").iterdir()}
    assert "model.safetensors" in kept and "reference.safetensors" not in kept


def test_the_cache_is_that_of_the_given_reference(tiny_policy: Path, tmp_path: Path) -> None:
    """Python API: a reference of one's own, under one cache with the policy's own."""
    other = causal(tmp_path / "other", seed=5)
    adapter = trained_adapter(tiny_policy, tmp_path / "adapter", 3)

    def columns(reference: Path | None, cache: Path) -> list[float]:
        arguments = {} if reference is None else {"ref_model": load_policy(str(reference), dtype="float32")}
        trainer = PreferenceTrainer(
            model=load_policy(str(tiny_policy), dtype="float32"),
            args=PreferenceConfig(
                str(tmp_path / "out"), precompute_ref_log_probs=True, reference_cache=str(cache), **BASE
            ),
            train_dataset=Dataset.from_list(rows(4)), processing_class=load_tokenizer(str(tiny_policy)), **arguments,
        )  # fmt: skip
        found: list[float] = trainer.train_dataset["ref_chosen_logps"][:]
        return found

    shared, seen = tmp_path / "cache", []
    for k, reference in enumerate((None, other, adapter)):
        found = columns(reference, shared)
        assert found == columns(reference, tmp_path / f"cache{k}") and found not in seen
        seen.append(found)


def test_the_reference_runs_at_most_the_pairs_that_are_asked_for(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    run = PreferenceTrainer._reference_of_examples

    def recorded(self: PreferenceTrainer, examples: list[dict[str, Any]]) -> torch.Tensor:
        sizes.append(len(examples))
        return run(self, examples)

    monkeypatch.setattr(PreferenceTrainer, "_reference_of_examples", recorded)
    few = ours(tiny_policy, tmp_path / "a", precompute_ref_batch_size=3)
    assert max(sizes) <= 3 and sum(sizes) == 16
    sizes.clear()
    many = ours(tiny_policy, tmp_path / "b")
    assert max(sizes) > 3
    assert np.allclose(few.train_dataset["ref_chosen_logps"], many.train_dataset["ref_chosen_logps"], atol=1e-4)


def test_an_epoch_without_a_batch_is_refused(tiny_policy: Path, tmp_path: Path) -> None:
    drop = {"dataloader_drop_last": True, "max_steps": -1, "num_train_epochs": 1}
    with pytest.raises(ConfigError, match="found true and 3 pairs, expected at least the 4 of a batch"):
        ours(tiny_policy, tmp_path, pairs=Dataset.from_list(rows(3)), **drop).train()


def test_weights_of_zero_are_refused() -> None:
    table = Dataset.from_list([row | {"weight": 0.0} for row in rows(4)])
    for loss in ("dpo", "madpo"):
        with pytest.raises(DataError, match="weight: found 0 for each of 4 pairs"):
            prepare_pairs(table, None, resolve(loss, {}))
    one = Dataset.from_list([row | {"weight": float(row["id"] == "p2")} for row in rows(4)])
    assert len(prepare_pairs(one, None, resolve("dpo", {}))[0]) == 4


@pytest.mark.parametrize(("truncation", "expected"), [("keep_start", [0, 3]), ("keep_end", [0, 1, 3])])
def test_responses_that_are_cut_to_the_same_tokens(
    truncation: str, expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Row 1 differs in its fourth token only, row 2 nowhere, row 3 in its length."""
    ids = {
        "prompt_ids": [[1, 2], [1, 2], [3], [4]],
        "chosen_ids": [[5, 6], [5, 6, 7, 8], [5], [5]],
        "rejected_ids": [[6, 6], [5, 6, 7, 9], [5], [5, 6]],
    }
    table = Dataset.from_dict(ids)
    assert told_apart(table, [], 5, truncation) == expected
    assert f"{4 - len(expected)} of 4 pairs are left out: their two responses are the same tokens" in caplog.text
    assert told_apart(table, [], None, truncation) == [0, 1, 3]


def test_pairs_that_become_the_same_tokens_are_left_out(
    tiny_policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Spaces that the tokenizer drops, words it does not know, an end that max_length cuts off."""
    table = rows(6)
    table[1] |= {"rejected": f" {table[1]['chosen']} "}
    table[4] |= {"chosen": " wunderbar", "rejected": " scheusslich"}
    trainer = ours(tiny_policy, tmp_path, pairs=Dataset.from_list(table))
    assert [row["id"] for row in trainer.train_dataset] == ["p0", "p2", "p3", "p5"]
    assert "2 of 6 pairs are left out: their two responses are the same tokens" in caplog.text
    assert "after the chat template and the tokenizer: p1, p4" in caplog.text
    same = [row | {"rejected": f"{row['chosen']} "} for row in rows(3)]
    with pytest.raises(DataError, match=r"\[same-responses\] none of 3 pairs can be trained on.*p0, p1, p2"):
        ours(tiny_policy, tmp_path, pairs=Dataset.from_list(same))


@pytest.mark.parametrize("fields", [{"max_length": 8}, {"max_length": 8, "truncation_mode": "keep_end"}, {}])
def test_trust_reads_the_pairs_that_are_trained_on(tiny_policy: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    """One prompt fills max_length, one pair is the same words, one differs within the limit only."""
    table = rows(6)
    table[0] |= {"prompt": "the film was " * 4}
    table[2] |= {"rejected": f"{table[2]['chosen']} "}
    table[3] |= {"chosen": " good film is very good", "rejected": " good film is very bad"}
    trained = ours(tiny_policy, tmp_path, pairs=Dataset.from_list(table), **fields).train_dataset
    limit, truncation = (FIELDS | fields)["max_length"], fields.get("truncation_mode", "keep_start")
    read = trained_pairs(Dataset.from_list(table), load_tokenizer(str(tiny_policy)), limit, truncation)
    assert list(read["id"]) == list(trained["id"]) and 3 <= len(read) <= 5


def test_a_finished_training_moved_its_weights(tiny_policy: Path, tmp_path: Path) -> None:
    """Fewer pairs than an accumulated step are still one step."""
    config = section(tiny_policy, trainer=FIELDS | {"gradient_accumulation_steps": 16, "max_steps": -1})
    train_policy(Dataset.from_list(rows(3)), config, "m", tmp_path, seed=0)
    assert len(read_json(tmp_path / "history.json")["history"]) == 3
    trained, start = load_file(tmp_path / "model" / "model.safetensors"), load_file(tiny_policy / "model.safetensors")
    assert any(not torch.equal(value, trained[name]) for name, value in start.items())
