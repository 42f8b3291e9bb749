"""PreferenceTrainer: equal to trl's DPOTrainer under dpo; weights, margins, reference cache, exact resume."""

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from packaging import version
from peft import PromptTuningConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from align.config import EntanglementSection, LossSection, TrainSection
from align.errors import ConfigError, DataError
from align.io.files import read_json, write_json
from align.losses.margin_weights import madpo_weight
from align.losses.registry import resolve
from align.models.layout import LayoutChoice
from align.models.loading import load_policy, load_tokenizer
from align.models.logps import pair_logps
from align.training.base.stopping import stoppable
from align.training.columns import add_weight
from align.training.train import make_trainer, train_policy
from align.training.trainer import PreferenceTrainer
from tests.helpers.builders import rows, tokenizer, trained_adapter

BASE: dict[str, Any] = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1, "bf16": False,
    "use_cpu": True, "gradient_checkpointing": False, "max_length": 64, "report_to": "none", "save_strategy": "no",
    "disable_tqdm": True,
}  # fmt: skip


ROUNDING = 1e-5 if version.parse(torch.__version__).release >= (2, 9) else 2e-5
"""Gradients of up to 0.14 after steps of AdamW; with the kernels of torch 2.8 the largest difference was 1.3e-5."""


class Gradients(TrainerCallback):
    """Keeps every parameter's gradient at each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

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
    **fields: Any,
) -> PreferenceTrainer:
    fields = {name: value for name, value in (BASE | fields).items() if name != "disable_tqdm"}
    config = TrainSection(
        model=str(policy),
        methods={"m": LossSection(loss=loss)},
        trainer=fields,
        layout=layout,
        max_tokens_per_device=budget,
    )
    table = Dataset.from_list(rows(16)) if pairs is None else pairs
    table, bound = add_weight(table, resolve(loss, {}))
    return make_trainer(table, config, bound, output, seed=0, tau=2.0, reference_cache=output / "cache")


def compare_with_trl(
    policy: Path,
    tmp_path: Path,
    loss: str,
    trl_loss: str,
    table: list[dict[str, Any]],
    metrics_rtol: float = 1e-5,
    **fields: Any,
) -> None:
    theirs = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        args=DPOConfig(output_dir=str(tmp_path / "trl"), seed=0, beta=0.1, loss_type=trl_loss, **(BASE | fields)),
        train_dataset=Dataset.from_list(table).remove_columns(["id", "margin"]),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    mine = ours(policy, tmp_path / "ours", loss, Dataset.from_list(table), **fields)
    found = []
    for trainer in (theirs, mine):
        kept = Gradients()
        trainer.add_callback(kept)
        trainer.train()
        log = trainer.state.log_history
        found.append(([entry["loss"] for entry in log if "loss" in entry], kept.steps, log))
    (their_losses, their_gradients, their_log), (my_losses, my_gradients, my_log) = found
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
    """SmolLM2-135M, all parameters, at a rate at which it learns; the logged entropy is a float32 sum over 49,152."""
    compare_with_trl(assets / "smollm2", tmp_path, "dpo", "sigmoid", rows(16), metrics_rtol=2e-4, learning_rate=1e-6)


def test_madpo_is_a_weight_column_times_dpo(tiny_policy: Path, tmp_path: Path) -> None:
    pairs = Dataset.from_list(rows(16)).add_column("weight", [0.5] * 16)
    table, bound = add_weight(pairs, resolve("madpo", {}))
    assert bound.spec.name == "dpo"
    assert np.allclose(table["weight"], 0.5 * madpo_weight(torch.tensor(pairs["margin"], dtype=torch.float64)).numpy())
    trainer = ours(tiny_policy, tmp_path, "madpo", pairs)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.training_step(trainer.model, batch)
    assert float(loss) == pytest.approx(float((batch["weight"] * np.log(2)).mean()), abs=1e-5)
    assert trainer._metrics["train"]["weight/mean"] == [pytest.approx(float(batch["weight"].mean()))]


@pytest.mark.parametrize("loss", ["soft_madpo", "mmpo", "beta_dpo", "simpo", "dpop"])
def test_neighbours_train_and_log(tiny_policy: Path, tmp_path: Path, loss: str) -> None:
    trainer = ours(tiny_policy, tmp_path, loss)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4 and all(np.isfinite(float(entry["loss"])) for entry in logged)
    shares = [value for name, value in logged[0].items() if name.startswith("margin/share")]
    assert sum(float(share) for share in shares) == pytest.approx(1.0)
    assert float(logged[0]["logps/chosen_change"]) == pytest.approx(0.0, abs=1e-4) or loss == "simpo"


@pytest.mark.parametrize(("loss", "order"), [("madpo", "random"), ("beta_dpo", "random"), ("madpo", "group_by_length")])
def test_resumed_equals_uninterrupted(tiny_policy: Path, tmp_path: Path, loss: str, order: str) -> None:
    """Bitwise, from the checkpoint of any step: in the first epoch, at its end, in a later one, and after the last."""
    saving = {"max_steps": 11, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 11,
              "lr_scheduler_type": "constant", "train_sampling_strategy": order}  # fmt: skip
    whole = ours(tiny_policy, tmp_path, loss, **saving)
    whole.train()
    steps = [entry for entry in whole.state.log_history if "loss" in entry]
    assert len(steps) == 11 and len(whole.get_train_dataloader()) == 4
    for step in range(1, 12):
        resumed = ours(tiny_policy, tmp_path, loss, **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / f"checkpoint-{step}"))
        assert resumed.state.global_step == 11
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), (step, name)
        assert whole.beta_state == resumed.beta_state
        assert [entry for entry in resumed.state.log_history if "loss" in entry] == steps


class Saves(TrainerCallback):
    """Asks for a stop after the second step, and counts checkpoints."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


def test_a_checkpoint_is_written_once(tiny_policy: Path, tmp_path: Path) -> None:
    """Not again at the end of an epoch that a stop cuts short, nor where nothing is left to do."""
    saving = {"max_steps": 3, "save_strategy": "epoch"}
    stopped = ours(tiny_policy, tmp_path, **saving)
    saves = Saves()
    stopped.add_callback(saves)
    with pytest.raises(SystemExit), stoppable(stopped):
        stopped.train()
    assert saves.steps == [2]
    ours(tiny_policy, tmp_path, **saving).train(resume_from_checkpoint=True)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-3"
    before = {file: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    ours(tiny_policy, tmp_path, **saving).train(resume_from_checkpoint=str(checkpoint))
    assert {file: file.stat().st_mtime_ns for file in checkpoint.iterdir()} == before


class Signals(TrainerCallback):
    """Sends two notices at once in a step, or one after the last."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step == state.max_steps:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_notice_that_comes_twice_or_late(tiny_policy: Path, tmp_path: Path, step: int) -> None:
    """In the last step: a checkpoint of it; after it what follows is done before the end."""
    made = ours(tiny_policy, tmp_path, max_steps=3)
    made.add_callback(Signals(step))
    followed = []
    with pytest.raises(SystemExit) as left, stoppable(made) as notice:
        made.train()
        notice.check()
        followed.append("saved")
    assert left.value.code == 128 + signal.SIGTERM and followed == (["saved"] if step == 3 else [])
    kept = [folder.name for folder in (tmp_path / "checkpoints").glob("checkpoint-*")]
    assert kept == ([] if step == 3 else [f"checkpoint-{step + 1}"])
    if step == 2:
        again = ours(tiny_policy, tmp_path, max_steps=3)
        again.train(resume_from_checkpoint=True)
        assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in made.model.state_dict().items())


@pytest.mark.parametrize("layout", ["concatenated", "shared_prefix"])
@pytest.mark.parametrize("loss", ["madpo", "ipo"])
def test_same_gradients_for_any_split(tiny_policy: Path, tmp_path: Path, loss: str, layout: LayoutChoice) -> None:
    """P11: token budgets, accumulation with an uneven last step, and the layout leave every gradient as it is."""
    table = Dataset.from_list(rows(14))
    found = []
    for name, (fields, budget) in {
        "whole": ({"per_device_train_batch_size": 8}, None),
        "budget": ({"per_device_train_batch_size": 8}, 60),
        "one pair": ({"per_device_train_batch_size": 8}, 1),
        "accumulated": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, None),
        "both": ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 50),
    }.items():
        trainer = ours(tiny_policy, tmp_path / name, loss, table, layout, budget, max_steps=4, **fields)
        kept = Gradients()
        trainer.add_callback(kept)
        trainer.train()
        found.append((kept.steps, [entry for entry in trainer.state.log_history if "loss" in entry]))
    (expected, log), *others = found
    assert len(expected) == 4
    for steps, other in others:
        for a, b in zip(expected, steps, strict=True):
            assert all(torch.allclose(a[name], b[name], atol=2e-5) for name in a)
        for name in ("loss", "weight/mean", "logps/chosen", "rewards/margins", "entropy"):
            assert np.allclose([e[name] for e in log], [e[name] for e in other], atol=1e-3), name


def test_stopped_reference_log_probs_go_on(tiny_policy: Path, tmp_path: Path) -> None:
    """What a stopped run left is not computed again, and a finished file is only read."""
    first = ours(tiny_policy, tmp_path, budget=40)
    (file,) = (tmp_path / "cache").iterdir()
    whole = np.load(file)
    assert whole.shape == (16, 2) and np.isfinite(whole).all()
    left = whole.copy()
    left[[3, 9]] = np.nan
    left[0] = 7.0
    np.save(file.with_suffix(".partial.npy"), left)
    file.unlink()
    again = ours(tiny_policy, tmp_path, budget=40)
    (file,) = (tmp_path / "cache").iterdir()
    found = np.load(file)
    assert np.allclose(found[1:], whole[1:], atol=1e-5)
    assert found[0, 0] == 7.0 or np.allclose(found[0], whole[0])
    assert again.train_dataset["ref_rejected_logps"] == found[:, 1].tolist()
    assert first.train_dataset["ref_rejected_logps"] == whole[:, 1].tolist()


def test_layout_that_is_not_exact_is_refused(tmp_path: Path, tiny_policy: Path) -> None:
    fields = {name: value for name, value in BASE.items() if name != "disable_tqdm"}
    prompt_tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    arguments: dict[str, Any] = {
        "loss": resolve("dpo", {}), "tau": 1.0, "model": load_policy(str(tiny_policy)), "peft_config": prompt_tuning,
        "args": DPOConfig(output_dir=str(tmp_path), precompute_ref_log_probs=True, **fields),
        "train_dataset": Dataset.from_list(rows(4)), "processing_class": load_tokenizer(str(tiny_policy)),
    }  # fmt: skip
    with pytest.raises(ConfigError, match="prompt-learning adapter"):
        PreferenceTrainer(layout="shared_prefix", **arguments)


def test_reference_log_probs_are_kept_and_keyed(tiny_policy: Path, tmp_path: Path) -> None:
    first = ours(tiny_policy, tmp_path)
    (file,) = (tmp_path / "cache").iterdir()
    stamp = file.stat().st_mtime_ns
    again = ours(tiny_policy, tmp_path, "mmpo")
    assert file.stat().st_mtime_ns == stamp and len(list((tmp_path / "cache").iterdir())) == 1
    assert again.train_dataset["ref_chosen_logps"] == first.train_dataset["ref_chosen_logps"]
    ours(tiny_policy, tmp_path, pairs=Dataset.from_list(rows(15)))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_saved_policy_and_history(tiny_policy: Path, tmp_path: Path) -> None:
    fields = {name: value for name, value in BASE.items() if name != "disable_tqdm"}
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    config = TrainSection(model=str(tiny_policy), methods={"x": LossSection(loss="madpo")}, trainer=fields, peft=lora)
    train_policy(Dataset.from_list(rows(8)), config, "x", tmp_path, seed=0)
    adapter = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert any("lora_B" in name and value.abs().sum() > 0 for name, value in adapter.items())
    history = read_json(tmp_path / "history.json")
    assert [entry["step"] for entry in history["history"]] == [1, 2, 3, 4]
    assert {"rewards/margins", "weight/mean", "weight/ess_share"} <= set(history["history"][0])


def test_what_cannot_be_trained_is_said(tiny_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.trainer.ld_alpha: 0.5 has no meaning"):
        ours(tiny_policy, tmp_path, ld_alpha=0.5)
    with pytest.raises(ConfigError, match=r"train.trainer.learning_rte: not a field of DPOConfig"):
        ours(tiny_policy, tmp_path, learning_rte=1.0)
    with pytest.raises(ConfigError, match="loss madpo needs a `margin` column"):
        ours(tiny_policy, tmp_path, "madpo", Dataset.from_list(rows(4)).remove_columns("margin"))


@pytest.mark.parametrize("fields", [{}, {"precompute_ref_log_probs": False}, {"gradient_checkpointing": True}])
def test_an_adapter_trained_on_learns_under_every_method(
    tiny_policy: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    """Also where the reference log-probs need not be computed, as for all methods but the first."""
    trained_adapter(tiny_policy, tmp_path / "adapter", 1)
    start = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = TrainSection(
        model=str(tmp_path / "adapter"),
        methods={"dpo": LossSection(loss="dpo"), "ipo": LossSection(loss="ipo")},
        trainer={name: value for name, value in BASE.items() if name != "disable_tqdm"} | {"max_steps": 2} | fields,
    )
    for method in config.methods:
        train_policy(
            Dataset.from_list(rows(8)), config, method, tmp_path / method, seed=0, reference_cache=tmp_path / "cache"
        )
        trained = load_file(tmp_path / method / "model" / "adapter_model.safetensors")
        assert trained.keys() == start.keys()
        assert all(not torch.equal(trained[name], value) for name, value in start.items()), method
    made = ours(tmp_path / "adapter", tmp_path)
    learning = [name for name, parameter in made.model.named_parameters() if parameter.requires_grad]
    assert learning and all(".default." in name for name in learning)


def test_a_mixture_of_experts_is_told_that_nothing_balances_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    words = tokenizer()
    config = Qwen3MoeConfig(vocab_size=len(words), bos_token_id=None, **sizes, **heads, **experts)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    words.save_pretrained(tmp_path / "moe")
    ours(tmp_path / "moe", tmp_path)
    assert "load-balancing loss of this model (0.001 in its config) is not added" in caplog.text
    with pytest.raises(ConfigError, match=r"train.trainer.router_aux_loss_coef: found 0.01, expected 0 or none"):
        ours(tmp_path / "moe", tmp_path, router_aux_loss_coef=0.01)
    caplog.clear()
    ours(tmp_path / "moe", tmp_path, router_aux_loss_coef=0.0)
    assert "load-balancing" not in caplog.text


def test_another_config_is_another_reference(tiny_policy: Path, tmp_path: Path) -> None:
    """Weights alone do not say what a model computes."""
    shutil.copytree(tiny_policy, tmp_path / "turned")
    config = read_json(tmp_path / "turned" / "config.json")
    config["rope_parameters"]["rope_theta"] = 10.0
    write_json(tmp_path / "turned" / "config.json", config)
    of_one, again = ours(tiny_policy, tmp_path), ours(tiny_policy, tmp_path, "ipo")
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    of_other = ours(tmp_path / "turned", tmp_path)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    first, second, third = (made.train_dataset["ref_chosen_logps"][:] for made in (of_one, again, of_other))
    assert first == second and not np.allclose(first, third, atol=0.1)


def test_an_adapter_trained_on_is_part_of_the_cached_reference(tiny_policy: Path, tmp_path: Path) -> None:
    """Another adapter in the same folder has other reference log-probs: at the start they are the policy's own."""
    for seed in (1, 2):
        trained_adapter(tiny_policy, tmp_path / "adapter", seed)
        made = ours(tmp_path / "adapter", tmp_path)
        batch = made.data_collator([made.train_dataset[k] for k in range(4)])
        made.model.eval()
        with torch.no_grad():
            found = pair_logps(made.model, batch, made.layout)
        assert torch.allclose(found.chosen, batch["ref_chosen_logps"], atol=1e-4)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


def test_prompts_that_fill_the_length_are_said(
    tiny_policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = [row | {"prompt": "the film was " * (9 if k < 3 else 1)} for k, row in enumerate(rows(8))]
    made = ours(tiny_policy, tmp_path, pairs=Dataset.from_list(table), max_length=20)
    assert len(made.train_dataset) == 5 and "3 of 8 pairs are left out: their prompts fill max_length" in caplog.text
    with pytest.raises(DataError, match="none of 8 pairs has a token of a response within max_length"):
        ours(tiny_policy, tmp_path, pairs=Dataset.from_list(table), max_length=2)


def test_an_adapter_that_changes_its_base_is_refused(tiny_policy: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    config = TrainSection(model=str(tiny_policy), methods={"m": LossSection(loss="dpo")}, trainer=BASE, peft=lora)
    with pytest.raises(
        ConfigError, match="init_lora_weights: 'pissa' takes what the adapter starts with out of the base"
    ):
        make_trainer(
            Dataset.from_list(rows(8)), config, resolve("dpo", {}), tmp_path, seed=0, tau=1.0, reference_cache=None
        )


def test_pairs_without_a_margin_or_weight(tiny_policy: Path, tmp_path: Path) -> None:
    """Where the loss reads margins the pair is named; where it reads none, gaps change nothing."""
    table = rows(8)
    holes = [row | {"margin": None} if row["id"] == "p3" else row for row in table]
    weighted = [row | {"weight": None if row["id"] == "p5" else 1.0} for row in table]
    fields = {name: value for name, value in BASE.items() if name != "disable_tqdm"} | {"max_steps": 2}
    config = TrainSection(
        model=str(tiny_policy),
        methods={"dpo": LossSection(loss="dpo"), "madpo": LossSection(loss="madpo")},
        trainer=fields,
    )
    said = r"\[loss-needs-margin\] margin: 1 of 8 pairs have none, the first 'p3'; expected one for each"
    with pytest.raises(DataError, match=said):
        train_policy(Dataset.from_list(holes), config, "madpo", tmp_path / "madpo", seed=0)
    with pytest.raises(DataError, match=r"\[weights-column\] weight: found no value for some pairs"):
        train_policy(Dataset.from_list(weighted), config, "dpo", tmp_path / "weighted", seed=0)
    train_policy(Dataset.from_list(holes), config, "dpo", tmp_path / "holes", seed=0)
    train_policy(Dataset.from_list(table), config, "dpo", tmp_path / "whole", seed=0)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("holes", "whole")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_entanglement_along_training(tiny_policy: Path, tmp_path: Path) -> None:
    """Measuring changes nothing about the training, and its predictions agree with what the steps did."""
    fields = {name: value for name, value in BASE.items() if name != "disable_tqdm"} | {"learning_rate": 1e-3}
    weights = {}
    for name, probing in (("plain", None), ("measured", EntanglementSection(every=2, probes=6))):
        config = TrainSection(
            model=str(tiny_policy), methods={"m": LossSection(loss="ipo")}, trainer=fields, entanglement=probing
        )
        train_policy(Dataset.from_list(rows(8)), config, "m", tmp_path / name, seed=0)
        weights[name] = load_file(tmp_path / name / "model" / "model.safetensors")
    assert all(torch.equal(weights["plain"][key], value) for key, value in weights["measured"].items())
    records = read_json(tmp_path / "measured" / "history.json")["entanglement"]
    assert [record["step"] for record in records] == [1, 3]
    for record in records:
        for key in ("", "batch_"):
            assert record[f"{key}sign_agreement"] > 0.8
            assert record[f"{key}realised_chosen"] == pytest.approx(record[f"{key}predicted_chosen"], rel=0.3)
            assert 0 <= record[f"{key}fell"] <= 1
        assert 0 <= record["entangled"] <= 1 and record["norm_ratio"] > 0
    assert records[0]["chosen_change"] == pytest.approx(0.0, abs=1e-4)
    with pytest.raises(ConfigError, match=r"train.entanglement: needs one process"):
        beta = config.model_copy(update={"methods": {"m": LossSection(loss="beta_dpo")}})
        train_policy(Dataset.from_list(rows(8)), beta, "m", tmp_path / "beta", seed=0)
