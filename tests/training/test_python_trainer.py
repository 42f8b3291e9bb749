"""The trainer made in Python: a trl script with two names changed, tables in memory, a run's steps, resuming."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from align import LOSSES, PairLogps, PreferenceConfig, PreferenceTrainer
from align.config import TrainSection
from align.io.files import read_json
from align.losses.margin_weights import madpo_weight, trusted_label
from align.models.loading import load_policy
from align.models.template_arguments import RECORD
from align.training.metrics import WeightTotals
from align.training.train import train_policy
from tests.helpers.builders import rows

BASE: dict[str, Any] = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 3, "logging_steps": 1, "bf16": False,
    "use_cpu": True, "max_length": 64, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "epoch")
OVER_TOKENS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
TEXTS = ("prompt", "chosen", "rejected")


def table(count: int = 12, *columns: str) -> Dataset:
    return Dataset.from_list(rows(count)).select_columns([*TEXTS, *columns])


def chat(count: int = 12) -> Dataset:
    """Conversational pairs without a prompt column, as trl's implicit-prompt format has them."""
    made = []
    for row in rows(count):
        start = [{"role": "user", "content": row["prompt"]}]
        answers = {side: [*start, {"role": "assistant", "content": str(row[side]).strip()}] for side in TEXTS[1:]}
        made.append(answers)
    return Dataset.from_list(made)


def logged(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: float(value) for name, value in entry.items() if name not in TIMES} for entry in steps]


def assert_close(
    first: list[dict[str, float]], second: list[dict[str, float]], *, atol: float = 1e-5, accumulated: bool = False
) -> None:
    """Every metric of ``first`` is there in ``second``, with losses to 1e-5.

    Of accumulated micro-batches, trl averages the means over tokens; here they are means over the tokens of the step.
    """
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=atol)
        for name, value in one.items():
            if accumulated and name in OVER_TOKENS:
                continue
            assert other[name] == pytest.approx(value, rel=2e-4, abs=1e-4), name


@pytest.mark.parametrize(
    ("fields", "more", "data"),
    [
        ({}, {}, table),
        ({}, {"peft_config": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}, table),
        ({}, {}, chat),
        ({"precompute_ref_log_probs": True}, {}, table),
        ({"gradient_accumulation_steps": 2, "beta": 0.3, "per_device_train_batch_size": 2}, {}, table),
        ({"loss_type": "ipo"}, {"data_collator": lambda: DataCollatorForPreference(0, max_length=9)}, table),
        ({"loss_type": ["robust"], "label_smoothing": 0.2}, {}, table),
        ({"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2], "beta": 0.3}, {}, table),
        ({"loss_type": ["sigmoid", "discopop"], "discopop_tau": 0.2}, {}, table),
    ],
)
def test_a_trl_script_runs_unchanged(
    tiny_policy: Path, tmp_path: Path, fields: dict[str, Any], more: dict[str, Any], data: Callable[[], Dataset]
) -> None:
    """The same arguments, positional where trl's are, give the same losses and metrics step by step."""
    runs = []
    for trainer, config in (
        (DPOTrainer, DPOConfig),
        (PreferenceTrainer, DPOConfig),
        (PreferenceTrainer, PreferenceConfig),
    ):
        args = config(str(tmp_path / "out"), **(BASE | fields))
        named = {name: value() for name, value in more.items()}
        runs.append(logged(trainer(str(tiny_policy), None, args, train_dataset=data(), **named)))
    theirs, *mine = runs
    assert theirs[0].keys() - mine[0][0].keys() == set()
    for run in mine:
        assert_close(theirs, run, accumulated="gradient_accumulation_steps" in fields)


def test_models_and_evaluation_as_trl_takes_them(tiny_policy: Path, tmp_path: Path) -> None:
    """A model and a reference of one's own, a tokenizer, evaluation tables by name, ``compute_metrics`` of logits."""
    shapes: list[tuple[int, ...]] = []

    def measure(found: Any) -> dict[str, float]:
        shapes.append(found.predictions.shape)
        return {"mean": float(np.mean(found.predictions))}

    runs = []
    for kind in (DPOTrainer, PreferenceTrainer):
        model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
        reference = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
        args = DPOConfig(str(tmp_path), eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=4, **BASE)
        trainer = kind(
            model, reference, args, None, table(), {"a": table(4), "b": table(8)},
            AutoTokenizer.from_pretrained(tiny_policy), measure,
        )  # fmt: skip
        trainer.train()
        held = [{name: row[name] for name in TEXTS} for row in rows(4)]
        again = trainer.evaluate(Dataset.from_list(held) if kind is DPOTrainer else held, metric_key_prefix="eval_a")
        assert again["eval_a_loss"] == trainer.state.log_history[-1]["eval_a_loss"]
        runs.append([entry for entry in trainer.state.log_history if "eval_a_loss" in entry or "eval_b_loss" in entry])
    assert len(runs[0]) == len(runs[1]) == 3 and shapes[:3] == shapes[3:]
    for one, other in zip(*runs, strict=True):
        same = [name for name in one if name.endswith(("loss", "margins", "chosen", "mean", "accuracies"))]
        assert len(same) > 5
        for name in same:
            assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-4, abs=1e-4), name


def test_the_arguments_stay_the_caller_s(tiny_policy: Path, tmp_path: Path) -> None:
    for args in (DPOConfig(str(tmp_path), **BASE), PreferenceConfig(str(tmp_path), loss="simpo", **BASE)):
        before = {one.name: repr(getattr(args, one.name)) for one in dataclasses.fields(args)}
        trainer = PreferenceTrainer(str(tiny_policy), args=args, train_dataset=table())
        trainer.train()
        assert trainer.args is not args
        assert {one.name: repr(getattr(args, one.name)) for one in dataclasses.fields(args)} == before
    assert trainer.args.beta == trainer.beta == 2.0 and trainer.args.loss_kwargs["gamma_beta_ratio"] == 0.25


def test_a_run_and_python_take_the_same_steps(tiny_policy: Path, tmp_path: Path) -> None:
    """Metric by metric, bit for bit: MADPO with every kind of weight, an adapter and accumulation."""
    fields = {name: value for name, value in BASE.items() if name != "disable_tqdm"}
    fields |= {"precompute_ref_log_probs": True, "lr_scheduler_type": "constant"}
    weights = {"spread": True, "normalise": True, "tilt": {"kind": "up", "temperature": 0.5}}
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    method = {"loss": "madpo", "parameters": {"tau": 1.0, "beta": 0.2}, "weights": weights}
    config = TrainSection.model_validate(
        {"model": str(tiny_policy), "methods": {"m": method}, "peft": lora, "pairs_per_step": 8,
         "trainer": fields}
    )  # fmt: skip
    pairs = table(16, "margin").add_column("margin_std", [0.1 + 0.2 * (k % 3) for k in range(16)])
    pairs = pairs.add_column("weight", [1.0 + k % 2 for k in range(16)])
    train_policy(pairs, config, "m", tmp_path / "run", seed=5)
    run = read_json(tmp_path / "run" / "history.json")["history"]
    args = PreferenceConfig(
        str(tmp_path / "out"), loss="madpo", loss_kwargs={"tau": 1.0}, beta=0.2, pair_weights=weights, seed=5,
        pairs_per_step=8, **fields,
    )  # fmt: skip
    trainer = PreferenceTrainer(
        str(tiny_policy), args=args, train_dataset=pairs, peft_config=LoraConfig(task_type="CAUSAL_LM", **lora)
    )
    trainer.train()
    python = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(run) == 3
    for one, other in zip(run, python, strict=True):
        assert one == dict(sorted(other.items()))
    trainer.save_model(str(tmp_path / "saved"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "run" / "model" / name).read_bytes()


@pytest.mark.parametrize("stream", [False, True])
def test_saved_models_record_template_arguments(tiny_policy: Path, tmp_path: Path, stream: bool) -> None:
    """A model saved in Python has the record that a run's has: the different arguments, none for plain text."""
    off = [json.dumps({"enable_thinking": False}) if k % 2 else "{}" for k in range(12)]
    pairs = chat().add_column("chat_template_kwargs", off)
    given = pairs.to_iterable_dataset() if stream else pairs
    for name, train in (("chat", given), ("text", table())):
        args = PreferenceConfig(str(tmp_path / name), **(BASE | {"max_steps": 1, "save_strategy": "steps"}))
        trainer = PreferenceTrainer(str(tiny_policy), args=args, train_dataset=train)
        trainer.save_model()
        trainer.save_model(str(tmp_path / name / "other"))
    for folder in (tmp_path / "chat", tmp_path / "chat" / "other"):
        assert read_json(folder / RECORD) == [{"enable_thinking": False}, {}]
    assert not list((tmp_path / "text").rglob(RECORD))


@pytest.mark.parametrize("kind", ["list", "frame", "stream"])
def test_tables_in_memory(tiny_policy: Path, tmp_path: Path, kind: str) -> None:
    """The same pairs in the same order in any container; a stream is read as far as the steps reach."""
    taken: list[int] = []

    def stream() -> Any:
        for k, row in enumerate(rows(10_000)):
            taken.append(k)
            yield row | {"prompt": "the film was " * 30} if k == 1 else row

    pairs = rows(17)
    pairs[1] |= {"prompt": "the film was " * 30}
    given: Any = {"list": pairs, "frame": pd.DataFrame(pairs), "stream": IterableDataset.from_generator(stream)}[kind]
    args = PreferenceConfig(
        str(tmp_path), loss="madpo", train_sampling_strategy="sequential", **(BASE | {"max_steps": 4})
    )
    expected = PreferenceTrainer(str(tiny_policy), args=args, train_dataset=Dataset.from_list(pairs))
    trainer = PreferenceTrainer(str(tiny_policy), args=args, train_dataset=given)
    assert trainer.train_dataset["id"] == expected.train_dataset["id"] and len(trainer.train_dataset) == 16
    assert logged(trainer) == logged(expected)
    assert not taken or max(taken) < 600


def test_a_stream_gives_trl_s_losses(tiny_policy: Path, tmp_path: Path) -> None:
    runs = []
    for kind in (DPOTrainer, PreferenceTrainer):
        args = DPOConfig(str(tmp_path), **(BASE | {"max_steps": 4}))
        runs.append(logged(kind(str(tiny_policy), args=args, train_dataset=table(20).to_iterable_dataset())))
    assert_close(*runs)


def test_an_own_loss(tiny_policy: Path, tmp_path: Path) -> None:
    """A function gives what the loss of that formula in the registry gives; without a margin it needs no column."""
    args = PreferenceConfig(str(tmp_path), **BASE)
    odpo = PreferenceConfig(str(tmp_path), loss="odpo", **BASE)

    def own(logps: PairLogps, margin: torch.Tensor) -> torch.Tensor:
        return -F.logsigmoid(0.1 * logps.log_ratio_gap - margin)

    named = logged(PreferenceTrainer(str(tiny_policy), args=odpo, train_dataset=table(12, "margin")))
    trainer = PreferenceTrainer(str(tiny_policy), args=args, train_dataset=table(12, "margin"), loss=own)
    assert_close(named, logged(trainer), atol=1e-6)
    dpo = PreferenceTrainer(
        str(tiny_policy), args=args, train_dataset=table(), loss=lambda logps: -F.logsigmoid(0.1 * logps.log_ratio_gap)
    )
    assert_close(logged(PreferenceTrainer(str(tiny_policy), args=args, train_dataset=table())), logged(dpo))
    terms = {"terms": {"dpo": 1.0, "nll": 0.5}}
    summed = logged(PreferenceTrainer(str(tiny_policy), args=args, train_dataset=table(), loss=terms))[0]
    assert summed["loss"] == pytest.approx(summed["loss/dpo"] + 0.5 * summed["loss/nll"], rel=1e-5)
    by_argument = PreferenceTrainer(str(tiny_policy), args=args, train_dataset=table(12, "margin"), loss="madpo")
    assert by_argument.args.loss == "madpo" and "madpo" in LOSSES


class Stop(TrainerCallback):
    """Ends a training as a kill does."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_auto_resumes_to_the_bit_and_starts_where_nothing_is(tiny_policy: Path, tmp_path: Path) -> None:
    def made(folder: str, **more: Any) -> PreferenceTrainer:
        fields = BASE | {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
        args = PreferenceConfig(str(tmp_path / folder), loss="beta_dpo", **fields)
        return PreferenceTrainer(str(tiny_policy), args=args, train_dataset=table(), **more)

    whole = made("whole")
    whole.train(resume_from_checkpoint="auto")
    with pytest.raises(KeyboardInterrupt):
        made("stopped", callbacks=[Stop()]).train()
    resumed = made("stopped")
    resumed.train(resume_from_checkpoint="auto")
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    resumed.save_model()
    saved = load_policy(str(tmp_path / "stopped"), dtype="float32").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in resumed.model.state_dict().items())


@pytest.mark.parametrize("loss", ["trust", "beta_dpo", "madpo"])
def test_weights_are_those_that_the_loss_used(tiny_policy: Path, tmp_path: Path, loss: str) -> None:
    """At the first step every cross-entropy is log 2, so the mean weight is loss / log 2, whatever gives the weight."""
    args = PreferenceConfig(str(tmp_path), loss=loss, **(BASE | {"max_steps": 1, "per_device_train_batch_size": 12}))
    pairs = table(12, "margin").add_column("weight", [0.5 + k % 3 for k in range(12)])
    step = logged(PreferenceTrainer(str(tiny_policy), args=args, train_dataset=pairs))[0]
    assert step["weight/mean"] == pytest.approx(step["loss"] / math.log(2), rel=1e-4)
    margin, given = (torch.tensor(pairs[name], dtype=torch.float64) for name in ("margin", "weight"))
    shape = {"c_max": 2.0, "c_min": 0.5, "lam": 1.0, "tau": LOSSES[loss].defaults.get("tau", 1.0)}
    own = {
        "madpo": lambda: madpo_weight(margin, **shape),
        "trust": lambda: trusted_label(margin, slope=1.0, trust=0.5, strength=1.0, **shape)[1],
        "beta_dpo": lambda: torch.ones_like(margin),
    }[loss]()
    if loss == "beta_dpo":  # 9 of 12 pairs are kept
        assert step["weight/min"] == 0.0 and step["weight/ess_share"] <= 0.75 + 1e-6
    else:
        weight = own * given
        share = float(weight.sum() ** 2 / (12 * weight.square().sum()))
        assert step["weight/mean"] == pytest.approx(float(weight.mean()), rel=1e-5)
        assert step["weight/max"] == pytest.approx(float(weight.max()), rel=1e-5)
        assert step["weight/ess_share"] == pytest.approx(share, rel=1e-5)


def test_weights_are_logged_over_the_pairs_since_the_last_log(tiny_policy: Path, tmp_path: Path) -> None:
    """With one pair a step, the effective share is that of the six pairs, not 1; normalized weights have mean 1."""
    fields = BASE | {"max_steps": 6, "logging_steps": 6, "per_device_train_batch_size": 1}
    args = PreferenceConfig(str(tmp_path), pair_weights={"normalise": True}, **fields)
    pairs = table(8).add_column("weight", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 100.0, 50.0]).to_list()
    pairs[6] |= {"rejected": f"{pairs[6]['chosen']} "}  # left out: the same tokens
    pairs[7] |= {"prompt": "the film was " * 30}  # left out: fills max_length
    step = logged(PreferenceTrainer(str(tiny_policy), args=args, train_dataset=pairs))[-1]
    assert step["weight/mean"] == pytest.approx(1.0, rel=1e-6)
    assert (step["weight/min"], step["weight/max"]) == pytest.approx((1 / 3.5, 6 / 3.5), rel=1e-6)
    assert step["weight/ess_share"] == pytest.approx(21**2 / (6 * 91), rel=1e-6)
    totals = WeightTotals()
    totals.add(torch.zeros(2))
    assert totals.flush()["weight/ess_share"] == 0.0 and totals.flush() == {}


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_reference_of_a_changed_model_is_the_model_as_it_is(
    tiny_policy: Path, tmp_path: Path, in_memory: bool
) -> None:
    """The first step begins at the reference, also where the weights are no longer those of the folder, or of none."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    if not in_memory:
        model = type(model)(model.config)
        model.config._name_or_path = ""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    args = PreferenceConfig(str(tmp_path), **BASE)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    first, second, *_ = logged(PreferenceTrainer(model, args=args, train_dataset=table(), processing_class=tokenizer))
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0 and abs(first["loss"] - math.log(2)) < 1e-6
    assert second["rewards/chosen"] != 0


def test_a_table_of_tensors_is_trained_as_one_of_lists(tiny_policy: Path, tmp_path: Path) -> None:
    args = PreferenceConfig(str(tmp_path), loss="madpo", **BASE)
    steps = [
        logged(PreferenceTrainer(str(tiny_policy), args=args, train_dataset=table(12, "margin").with_format(kind)))
        for kind in (None, "torch", "numpy")
    ]
    assert steps[0] == steps[1] == steps[2]
