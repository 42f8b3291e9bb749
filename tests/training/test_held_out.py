"""Evaluation while a policy trains: exact numbers, the same training, resume, the kept checkpoint, early stopping."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from align.config import KeepSection, LossSection, TrainSection
from align.data.splits import clusters_of
from align.errors import DataError, ModelError
from align.io.files import read_json
from align.losses.pairwise import PairLogps
from align.losses.registry import resolve
from align.models.loading import load_policy, load_tokenizer
from align.training.held_out import HeldOut, pair_metrics
from align.training.held_out_choice import OVER_LIMIT, UNDEFINED, EarlyStopping, keep_score, kept_step
from align.training.held_out_pass import HeldOutPass
from align.training.held_out_settings import chooses
from align.training.held_out_trainer import HeldOutTrainer, Watch
from align.training.train import make_trainer, policy_args, train_policy
from tests.helpers.builders import causal, rows
from tests.helpers.interrupted import largest_difference
from tests.training.test_trainer import FIELDS

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5}
TRAINED, HELD_OUT = rows(24)[:16], rows(24)[16:]


def section(model: Path, loss: str = "dpo", **options: Any) -> TrainSection:
    fields = FIELDS | {"max_steps": 6, "eval_steps": 2} | options.pop("trainer", {})
    options = {"eval_pairs": {"share": 0.3}} | options
    return TrainSection(model=str(model), methods={"m": LossSection(loss=loss)}, trainer=fields, **options)


def watch(config: TrainSection, pairs: list[dict[str, Any]] | None = None) -> Watch:
    table = Dataset.from_list(HELD_OUT if pairs is None else pairs)
    held_out = HeldOut.of(table, seed=0, choose=chooses(config))
    return Watch(held_out, keep=config.keep, early_stopping=config.early_stopping)


def train(config: TrainSection, output: Path) -> dict[str, Any]:
    """Train, and return what the history says about the held-out pairs."""
    train_policy(Dataset.from_list(TRAINED), config, "m", output, seed=0, watch=watch(config))
    found: dict[str, Any] = read_json(output / "history.json")["held_out"]
    return found


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_seconds(item) for name, item in value.items() if name != "seconds"}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


LIVE = {"precompute_ref_log_probs": False}


@pytest.mark.parametrize(("loss", "fields"), [("madpo", {}), ("dpo", LIVE), ("beta_dpo", LIVE), ("sampo", LIVE)])
def test_numbers_are_those_of_each_pair(tiny_policy: Path, tmp_path: Path, loss: str, fields: dict[str, Any]) -> None:
    """Means over 8 pairs, also in batches of 3; for beta_dpo the statistics are those of all of them."""
    found = []
    for size in (3, 8):
        config = section(tiny_policy, loss, trainer=fields | {"per_device_eval_batch_size": size, "max_steps": 2})
        trainer = make_trainer(
            Dataset.from_list(TRAINED), config, "m", tmp_path / str(size), seed=0, watch=watch(config)
        )  # fmt: skip
        trainer.train()
        values = HeldOutPass(trainer, trainer.eval_dataset, tmp_path / str(size) / "held-out")()
        found.append(values)
        logged = next(one for one in trainer.state.log_history if one["step"] == 2 and "eval_loss" in one)
        assert logged["eval_loss"] == pytest.approx(values["loss"].mean())
    assert all(np.allclose(found[0][name], found[1][name], atol=1e-4, equal_nan=True) for name in found[1])
    values = found[0]
    assert (values["kl_chosen"] > 0).all() and (values["chosen"] != values["ref_chosen"]).all()
    if loss == "madpo":  # its weight is a column, the loss is dpo's
        logps = PairLogps(*(torch.from_numpy(values[name]) for name in (
            "chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens")))  # fmt: skip
        weight = np.array(trainer.eval_dataset["weight"])
        assert np.allclose(values["loss"], weight * resolve("dpo", {})(logps).numpy(), atol=1e-5)


def test_metrics_of_given_values() -> None:
    """Means with intervals over clusters; an equal pair counts half for the accuracy; KL per response and per token."""
    values = {
        "loss": np.array([1.0, 2.0, 3.0, 6.0]), "chosen": np.array([-1.0, -2, -3, -4]), "ref_chosen": np.full(4, -2.0),
        "rejected": np.array([-3.0, -2, -1, -3]), "ref_rejected": np.array([-3.0, -2, -1, -3]),
        "kl_chosen": np.array([1.0, np.nan, 3.0, 2.0]), "kl_rejected": np.array([3.0, np.nan, 1.0, 4.0]),
        "chosen_tokens": np.full(4, 2.0), "rejected_tokens": np.full(4, 2.0), "loss/nll": np.zeros(4),
    }  # fmt: skip
    found = pair_metrics(values, np.array([0, 0, 1, 2]), beta=0.5)
    numbers = {name: one["value"] for name, one in found.items()}
    assert numbers["loss"] == 3.0 and found["loss"]["units"] == 3 and numbers["loss/nll"] == 0
    assert numbers["rewards/accuracies"] == (1 + 0.5 + 0 + 0) / 4
    assert numbers["logps/chosen_change"] == -0.5 and numbers["rewards/margins"] == -0.25
    assert numbers["kl"] == pytest.approx((2 + 2 + 3) / 3) and numbers["kl_per_token"] == pytest.approx(14 / 12)
    assert found["kl"]["n"] == 3


@pytest.mark.parametrize("peft", [None, LORA])
def test_an_evaluation_does_not_change_the_training(
    tiny_policy: Path, tmp_path: Path, peft: dict[str, Any] | None
) -> None:
    """Bit for bit, also with dropout; at the start every number is that of no change."""
    found = train(section(tiny_policy, peft=peft), tmp_path / "watched")
    plain = section(tiny_policy, peft=peft, eval_pairs=None)
    plain = plain.model_copy(update={"trainer": FIELDS | {"max_steps": 6}})
    train_policy(Dataset.from_list(TRAINED), plain, "m", tmp_path / "plain", seed=0)
    histories = [read_json(tmp_path / name / "history.json")["history"] for name in ("watched", "plain")]
    assert histories[0] == histories[1]
    assert [one["step"] for one in found["steps"]] == [0, 2, 4, 6] and "kept" not in found
    start, end = found["steps"][0]["pairs"]["all"], found["steps"][-1]["pairs"]["all"]
    for name in ("kl", "logps/chosen_change", "logps/rejected_change", "rewards/margins"):
        assert start[name]["value"] == 0, name  # not even by rounding
    assert start["rewards/accuracies"]["value"] == 0.5
    assert start["loss"]["value"] == pytest.approx(np.log(2), abs=1e-5)
    assert end["loss"]["value"] < start["loss"]["value"] and end["kl"]["value"] > 0
    assert not (tmp_path / "watched" / "held-out" / "reference").exists()


class Killed(BaseException):
    """What a kill is to the program: nothing catches it."""


@pytest.mark.parametrize(
    ("stage", "saving"),
    [("before the record", {}), ("after the record", {"save_strategy": "steps", "save_steps": 3})],
)
def test_kill_and_resume(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, saving: dict[str, Any]
) -> None:
    """The history is that of a training that was not stopped, and no finished evaluation is made again."""
    config = section(
        tiny_policy, keep={"rule": "held_out_loss"}, early_stopping={"patience": 4}, trainer=saving | {"max_steps": 8}
    )
    whole = train(config, tmp_path / "whole")
    measured: list[int] = []
    measure = HeldOutPass.__call__

    def count(self: HeldOutPass) -> dict[str, np.ndarray]:
        step = self.trainer.state.global_step
        if step == 6 and 6 not in measured and stage == "before the record":
            measured.append(6)
            raise Killed
        measured.append(step)
        return measure(self)

    monkeypatch.setattr(HeldOutPass, "__call__", count)
    if stage == "after the record":
        from align.training.held_out_trainer import HeldOutTrainer

        write = HeldOutTrainer._write_record

        def die(self: HeldOutTrainer, file: Path, record: dict[str, Any]) -> None:
            write(self, file, record)
            if record["step"] == 6 and measured.count(6) == 1:
                measured.append(-1)
                raise Killed

        monkeypatch.setattr(HeldOutTrainer, "_write_record", die)
    with pytest.raises(Killed):
        train(config, tmp_path / "killed")
    resumed = train(config, tmp_path / "killed")
    assert without_seconds(resumed) == without_seconds(whole)
    again = [0, 2, 4, 6, 6, 8] if stage == "before the record" else [0, 2, 4, 6, -1, 8]
    assert measured == again
    logs = [read_json(tmp_path / name / "history.json")["history"] for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert largest_difference(tmp_path / "whole" / "model", tmp_path / "killed" / "model") == 0


@pytest.mark.parametrize("peft", [None, LORA])
@pytest.mark.parametrize("limit", [None, 1e-6])
def test_the_kept_checkpoint(
    tiny_policy: Path, tmp_path: Path, peft: dict[str, Any] | None, limit: float | None
) -> None:
    """The saved model is that of the step with the lowest loss, or the smallest KL if none is within the limit."""
    config = section(
        tiny_policy, keep={"rule": "held_out_loss", "kl_at_most": limit}, peft=peft,
        trainer={"learning_rate": 0.05, "max_steps": 8, "lr_scheduler_type": "constant"},
    )  # fmt: skip
    found = train(config, tmp_path / "kept")
    kept, steps = found["kept"], {one["step"]: one["pairs"] for one in found["steps"] if one["step"]}
    key = "loss" if limit is None else "kl"
    best = min(steps, key=lambda step: steps[step]["choosing"][key]["value"])
    assert kept["step"] == best and kept["last"] == 8
    assert all(kept[part]["pairs"] == steps[best][part] for part in ("choosing", "reporting"))
    words = "the lowest held-out loss among 4 evaluated steps" if limit is None else "no step has a KL of at most 1e-06"
    assert kept["why"].startswith(words)
    saving = FIELDS | {"learning_rate": 0.05, "lr_scheduler_type": "constant", "max_steps": best}
    plain = section(tiny_policy, peft=peft, eval_pairs=None).model_copy(update={"trainer": saving})
    train_policy(Dataset.from_list(TRAINED), plain, "m", tmp_path / "to-best", seed=0)
    name = "model.safetensors" if peft is None else "adapter_model.safetensors"
    weights = [load_file(tmp_path / folder / "model" / name) for folder in ("kept", "to-best")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert not (tmp_path / "kept" / "checkpoints").exists()


def test_halves_share_no_prompt() -> None:
    """They choose and report; where nothing is chosen there is one part, and one prompt cannot be divided."""
    table = Dataset.from_list([row | {"prompt": f"question {k % 5}"} for k, row in enumerate(rows(20))])
    held_out = HeldOut.of(table, seed=3, choose=True)
    parts = held_out.parts()
    prompts = np.array(table["prompt"])
    assert not {*prompts[parts["choosing"]]} & {*prompts[parts["reporting"]]}
    assert (parts["choosing"] ^ parts["reporting"]).all() and parts["all"].all()
    assert [*HeldOut.of(table, seed=3, choose=False).parts()] == ["all"]
    one = Dataset.from_list([row | {"prompt": "q"} for row in rows(2)])
    assert len(set(clusters_of(one))) == 1
    with pytest.raises(DataError, match=r"found 2 pairs that share their prompts or responses, expected at least two"):
        HeldOut.of(one, seed=0, choose=True)


def score(loss: float | None, kl: float, limit: float | None) -> float | None:
    pairs = {"choosing": {"loss": None if loss is None else {"value": loss}, "kl": {"value": kl}}}
    return keep_score({"step": 2, "pairs": pairs}, KeepSection(rule="held_out_loss", kl_at_most=limit))


def test_the_order_of_steps() -> None:
    """Within the limit by the loss, then undefined ones, beyond it by the KL; not measured not at all."""
    order = [score(0.2, 3.0, 4.0), score(1e6, 1.0, 4.0), score(None, 1, 4), score(0.1, 5.0, 4.0), score(0.05, 5.1, 4.0)]
    assert order == sorted(order, key=lambda one: one if one is not None else np.nan)
    assert len({*order}) == 5 and order[2] == UNDEFINED - 2 and order[3] == OVER_LIMIT * 6
    later = {"step": 4, "pairs": {"choosing": {"loss": None, "kl": {"value": 1.0}}}}
    assert keep_score(later, KeepSection(rule="held_out_loss", kl_at_most=4.0)) == UNDEFINED - 4
    assert keep_score({"step": 2, "pairs": {}}, KeepSection(rule="win_rate")) is None
    win = {"step": 2, "samples": {"choosing": {"win_rate": {"value": 0.75}, "kl": {"value": 1.0}}}}
    assert keep_score(win, KeepSection(rule="win_rate", kl_at_most=2.0)) == -0.75
    unmeasured = kept_step([{"step": 0}, {"step": 2}], KeepSection(rule="win_rate"), None, 2)
    assert unmeasured["step"] == 2 and "no step after the start was measured" in unmeasured["why"]


def test_a_start_that_is_not_worse_is_named() -> None:
    records = [
        {"step": step, "pairs": {part: {"loss": {"value": loss}} for part in ("choosing", "reporting")}}
        for step, loss in ((0, 0.69), (2, 0.8), (4, 0.9))
    ]
    kept = kept_step(records, KeepSection(rule="held_out_loss"), 2, 4)
    assert kept["why"] == "the lowest held-out loss among 2 evaluated steps, though the start is not worse"


def test_early_stopping(tiny_policy: Path, tmp_path: Path) -> None:
    """It ends after so many evaluations without improvement; the metric may be any that is measured."""
    fields = {"learning_rate": 0.5, "max_steps": 40, "metric_for_best_model": "kl", "greater_is_better": False}
    found = train(section(tiny_policy, early_stopping={"patience": 2}, trainer=fields), tmp_path)
    stopped = found["early_stopping"]
    assert stopped["stopped"] and stopped["of"] == 40
    values = [one["pairs"]["choosing"]["kl"]["value"] for one in found["steps"] if one["step"]]
    best, bad = np.inf, 0
    for k, value in enumerate(values):
        bad = 0 if value < best else bad + 1
        best = min(best, value)
        assert (bad == 2) == (k == len(values) - 1)
    assert stopped["step"] == 2 * len(values)


def test_transformers_own_choice(tiny_policy: Path, tmp_path: Path) -> None:
    """load_best_model_at_end reads the choosing half; the history reports the other."""
    fields = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2, "greater_is_better": True,
              "metric_for_best_model": "rewards/margins"}  # fmt: skip
    found = train(section(tiny_policy, trainer=fields), tmp_path)
    steps = {one["step"]: one["pairs"] for one in found["steps"] if one["step"]}
    best = max(steps, key=lambda step: steps[step]["choosing"]["rewards/margins"]["value"])
    assert found["kept"]["step"] == best and found["kept"]["reporting"]["pairs"] == steps[best]["reporting"]
    assert json.loads((tmp_path / "held-out" / f"step-{best}.json").read_text())["pairs"] == steps[best]


@pytest.mark.parametrize("losses", [[0.5, 0.4, 0.45, 0.39, 0.5], [0.5, 0.6], []])
def test_early_stopping_counts_again_after_a_resume(tmp_path: Path, losses: list[float]) -> None:
    """Over the evaluations in the log, as in a training that was not stopped; the start does not count."""
    args = TrainingArguments(
        str(tmp_path), metric_for_best_model="loss", greater_is_better=False, eval_strategy="steps", report_to="none",
        use_cpu=True,
    )  # fmt: skip
    live, state, control = EarlyStopping(9), TrainerState(), TrainerControl()
    live.on_evaluate(args, state, control, {"eval_loss": 0.1})
    for step, loss in enumerate(losses, 1):
        state.global_step = step
        live.on_evaluate(args, state, control, {"eval_loss": loss})
        live.on_evaluate(args, state, control, {"eval_samples/reward": 0.0})  # has not the metric
        state.best_metric = loss if state.best_metric is None else min(loss, state.best_metric)
    resumed = EarlyStopping(9)
    state.log_history = [{"step": 0, "eval_loss": 0.1}, {"step": 1, "loss": 0.3}]
    state.log_history += [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses, 1)]
    resumed.on_train_begin(args, state, control)
    assert resumed.early_stopping_patience_counter == live.early_stopping_patience_counter
    assert live.early_stopping_patience_counter == (1 if losses else 0)


class Referring:
    """In the place of a sampler: takes the reference of the samples at every second step."""

    every = 2

    def __call__(self, trainer: HeldOutTrainer, step: int, state: str, folder: Path) -> dict[str, Any]:
        with trainer.sampling_reference() as reference:
            weight = reference.get_input_embeddings().weight.detach().clone()
        return {"all": {"weight": {"value": float(weight.abs().sum(dtype=torch.float64))}}}


def referring(model: Any, folder: Path, output: Path) -> HeldOutTrainer:
    """A full training of two steps with its reference log-probs precomputed."""
    config, loss = section(folder, trainer={"max_steps": 2}), resolve("dpo", {})
    held_out = Watch(watch(config).pairs, sampler=Referring())
    return HeldOutTrainer(
        model, args=policy_args(config, "m", loss, {"output_dir": str(output), "seed": 0}), loss=loss, folder=output,
        train_dataset=Dataset.from_list(TRAINED), processing_class=load_tokenizer(str(folder)), watch=held_out,
    )  # fmt: skip


def test_samples_are_compared_with_the_model_that_the_training_started_from(tmp_path: Path) -> None:
    """It is loaded again from its folder; a folder or a model in memory that was changed is refused."""
    folder = causal(tmp_path / "policy")
    trainer = referring(str(folder), folder, tmp_path / "same")
    trainer.train()
    first, last = (one["samples"]["all"]["weight"]["value"] for one in trainer.records)
    assert first == last
    changed = load_policy(str(folder), dtype="float32")
    with torch.no_grad():
        changed.lm_head.weight[3, 4] += 1e-3
    with pytest.raises(ModelError, match=r"\[train-reference\].*other weights than .*lm_head.weight, 1 of"):
        referring(changed, folder, tmp_path / "memory").train()
    trainer = referring(str(folder), folder, tmp_path / "folder")
    causal(folder, seed=3)
    with pytest.raises(ModelError, match="leave the folder as it is while a run trains"):
        trainer.train()
