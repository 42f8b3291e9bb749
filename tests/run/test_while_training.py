"""Runs that watch their trainings: what is held out, overlaps, samples, a kill in the middle of them, the page."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from align.config import EvalPairsSection, load_config
from align.data.overlap import shares_prompt, trained_on
from align.data.pairs import read_pairs
from align.data.splits import clusters_of
from align.errors import ConfigError, DataError
from align.evaluation import while_training
from align.evaluation.while_training import read_samples, sample_metrics
from align.generation.transformers_engine import TransformersEngine
from align.io.files import read_json
from align.run.pipeline import check, run_pipeline
from align.run.watch import without_trained
from align.training.held_out_trainer import HeldOutTrainer
from tests.helpers.builders import causal, rows
from tests.helpers.command_line import jsonl

WORDS = ("good", "bad", "film", "plot", "dull", "fine")
SAMPLES = {"every": 2, "n": 2, "max_new_tokens": 6}


def write(folder: Path, trainer: dict[str, Any] | None = None, **train: Any) -> Path:
    """A run of one method with a third of its pairs held out, and a judge."""
    if not (folder / "policy").exists():
        causal(folder / "policy")
        jsonl(folder / "pairs.jsonl", [{k: v for k, v in row.items() if k != "margin"} for row in rows(24)])
        jsonl(folder / "prompts.jsonl", [{"prompt": f"a {word} review :"} for word in WORDS])
    fields = {"bf16": False, "gradient_checkpointing": False, "max_steps": 4, "learning_rate": 3e-3,
              "per_device_train_batch_size": 4}  # fmt: skip
    run = {
        "name": "w", "pairs": {"path": "pairs.jsonl"},
        "evaluate": {"prompts": "prompts.jsonl", "max_new_tokens": 4, "judge": "vader"},
        "train": {"model": "policy", "methods": {"dpo": {"loss": "dpo"}}, "eval_pairs": {"share": 0.34},
                  "trainer": fields | (trainer or {})} | train,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_seconds(item) for name, item in value.items() if name != "seconds"}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def run(file: Path) -> dict[str, Any]:
    config = load_config(file)
    check(config, tables=True)
    run_pipeline(config, command="align run", until=("train",))
    found: dict[str, Any] = read_json(config.folder / "train-dpo" / "history.json")["held_out"]
    return found


def test_a_killed_sampling_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the prompts that are left; the history is that of a run that was not stopped, and so are the samples."""
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, eval_samples=SAMPLES, keep={"rule": "win_rate"})
    asked: list[str] = []
    stream = TransformersEngine.stream

    def dying(self: Any, prompts: Any, sampling: Any, keys: Any = None) -> Any:
        for k, (index, completions) in enumerate(stream(self, prompts, sampling, keys)):
            if k == 3 and len(asked) == 8 + 3:
                raise KeyboardInterrupt
            asked.append(prompts[index])
            yield index, completions

    monkeypatch.setattr(TransformersEngine, "stream", dying)
    with pytest.raises(KeyboardInterrupt):
        run(file)
    part = next(tmp_path.glob("runs/w/train-dpo.partial/held-out/samples/*.part-0"))
    assert len(part.read_text().splitlines()) == 3
    with part.open("a") as stream_:
        stream_.write('{"prompt": 7, "ro')  # the kill may leave a part of a line
    killed = run(file)
    assert len(asked) == 3 * 8 and sorted(asked[8:16]) == sorted(asked[:8])
    folder = tmp_path / "runs" / "w" / "train-dpo" / "held-out" / "samples"
    assert not list(folder.glob("*.part-*"))
    samples = [(folder / f"step-{step}.jsonl").read_text() for step in (0, 2, 4)]
    (tmp_path / "runs" / "w" / "train-dpo" / "manifest.json").write_text("{}")
    whole = run(file)
    assert without_seconds(killed) == without_seconds(whole) and len(asked) == 6 * 8
    assert samples == [(folder / f"step-{step}.jsonl").read_text() for step in (0, 2, 4)]
    plain = write(tmp_path, eval_pairs={"share": 0.34}, trainer={"eval_strategy": "epoch"})
    history = tmp_path / "runs" / "w" / "train-dpo" / "history.json"
    losses = read_json(history)["history"]
    run(plain)
    assert losses == read_json(history)["history"]  # sampling changes nothing in the training
    start = killed["steps"][0]["samples"]
    assert start["all"]["win_rate"]["value"] == 0.5 and start["all"]["same_text"]["value"] == 1
    assert start["all"]["kl"]["value"] == 0 and start["all"]["gain"]["value"] == 0
    assert killed["steps"][-1]["samples"]["all"]["kl"]["value"] > 0
    assert start["samples"] == 16
    assert start["tokens"] == sum(json.loads(line)["tokens"] for line in samples[0].splitlines())
    assert {"pairs", "samples"} == {*killed["kept"]["reporting"]}


def test_what_is_held_out_is_trained_on_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share keeps clusters together; another share makes the training again; the page shows both curves."""
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, trainer={"max_steps": 2}, eval_pairs={"share": 0.34, "seed": 3})
    run(file)
    root = tmp_path / "runs" / "w"
    train, held_out = (read_pairs(root / "heldout" / part) for part in ("train", "eval"))
    assert len(train) + len(held_out) == 24 and 7 <= len(held_out) <= 9
    clusters = clusters_of(Dataset.from_list([*train, *held_out]))
    assert not {*clusters[: len(train)]} & {*clusters[len(train) :]}
    key = read_json(root / "train-dpo" / "manifest.json")["key"]
    write(tmp_path, trainer={"max_steps": 2}, eval_pairs={"share": 0.34, "seed": 4})
    run(file)
    assert read_json(root / "train-dpo" / "manifest.json")["key"] != key
    page = (root / "report.html").read_text()
    assert "DPO held out" in page and "exact KL to the reference along held-out responses" in page


def test_a_run_without_these_keys_keeps_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither stage nor key changes for it."""
    monkeypatch.chdir(tmp_path)
    config = load_config(write(tmp_path, eval_pairs=None))
    assert config.train is not None
    assert not {"eval_pairs", "eval_samples", "keep", "early_stopping"} & {*config.train.made_from(without=set())}


def overlapping(*changed: dict[str, Any]) -> Dataset:
    table = rows(24)
    return Dataset.from_list([{**table[k], **change} for k, change in enumerate(changed)])


def test_overlap() -> None:
    """By prompt and response, whatever the white space and the side; by id and prompt; not by id or prompt alone."""
    trained = Dataset.from_list(rows(24))
    new = {"chosen": " new", "rejected": " other"}
    held_out = overlapping(
        {"id": "a"},
        {"id": "b", "prompt": f" {rows(2)[1]['prompt']}  ", "rejected": " x"},
        {"id": "c", "chosen": rows(3)[2]["rejected"], "rejected": " x"},
        new,
        {"id": "e", **new},
        {"prompt": "another", **new},
        {"prompt": f"\ufeff{rows(7)[6]['prompt'].upper()}", **new},
    )
    assert trained_on(held_out, trained).tolist() == [True, True, True, True, False, False, True]
    copies = [{**row, "id": str(k), "prompt": row["prompt"].upper()} for k, row in enumerate(rows(2))]
    strange = {"id": "x", "prompt": "another", **new}
    assert shares_prompt(Dataset.from_list([*copies, strange]), trained).tolist() == [True, True, False]


def test_overlap_is_refused_or_removed(caplog: pytest.LogCaptureFixture) -> None:
    trained = Dataset.from_list(rows(24))
    held_out = overlapping({"id": "a"}, {"id": "b", "chosen": " new", "rejected": " y"})
    with pytest.raises(DataError, match=r"\[eval-overlap\] .*h.jsonl: 1 of 2 pairs are trained on .*the first 'a'"):
        without_trained(held_out, trained, EvalPairsSection(path="h.jsonl"))
    left = without_trained(held_out, trained, EvalPairsSection(path="h.jsonl", overlap="remove"))
    assert left["id"] == ["b"]
    with pytest.raises(DataError, match="all 1 pairs are trained on"):
        without_trained(held_out.select([0]), trained, EvalPairsSection(path="h.jsonl", overlap="remove"))


@pytest.mark.parametrize(
    ("train", "trainer", "message"),
    [
        ({"eval_pairs": {"path": "pairs.jsonl"}}, {}, r"\[eval-overlap\].*24 of 24 pairs are trained on"),
        ({"eval_pairs": {"share": 0.01}, "keep": {"rule": "held_out_loss"}}, {}, r"\[data-too-few\].*two prompts"),
        ({"eval_pairs": None, "eval_samples": {"every": 2}}, {}, "found neither prompts nor train.eval_pairs"),
        ({"eval_pairs": None, "early_stopping": {}}, {}, "train.early_stopping: found it and no train.eval_pairs"),
        ({"keep": {"rule": "gold_per_root_kl"}}, {}, "found gold_per_root_kl and no train.eval_samples"),
        ({"keep": {"rule": "win_rate", "kl_at_most": 2}, "eval_samples": {"every": 2, "top_p": 0.9}}, {}, "top_p 0.9"),
        ({"keep": {"rule": "held_out_loss"}}, {"metric_for_best_model": "loss"}, "together with train.keep"),
        ({"keep": {"rule": "held_out_loss"}}, {"save_strategy": "best"}, "found best together with train.keep"),
        ({}, {"metric_for_best_model": "kl"}, "greater_is_better: found nothing for the metric kl"),
        ({}, {"load_best_model_at_end": True, "greater_is_better": True}, "found True for the metric loss"),
        ({}, {"metric_for_best_model": "eval_loss", "greater_is_better": True}, "found True for the metric loss"),
        ({}, {"metric_for_best_model": "rewards/margins", "greater_is_better": False}, "expected True or nothing"),
        ({}, {"eval_strategy": "epoch", "eval_steps": 3}, "found 3 and eval_strategy epoch"),
        ({}, {"eval_steps": 0}, "eval_steps: found 0, expected more than 0"),
        ({}, {"load_best_model_at_end": True}, "requires the save and eval strategy to match"),
        ({}, {"eval_accumulation_steps": 3}, "eval_accumulation_steps: found 3, which has no effect here"),
    ],
)
def test_refused_before_a_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], trainer: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(write(tmp_path, trainer, **train))
    with pytest.raises((ConfigError, DataError), match=rf"(?s){message}"):
        check(config, tables=True)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_end_is_evaluated_whatever_the_delay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """And once: a second evaluation of one step would count twice against the patience."""
    monkeypatch.chdir(tmp_path)
    asked: list[int] = []
    evaluate = HeldOutTrainer._evaluate_step
    monkeypatch.setattr(HeldOutTrainer, "_evaluate_step", lambda self, at: (asked.append(at), evaluate(self, at))[1])
    for delay in (1000, 0):
        fields = {"eval_strategy": strategy, "eval_delay": delay, "max_steps": 2}
        found = run(write(tmp_path, fields, keep={"rule": "held_out_loss"}))
        steps = [one["step"] for one in found["steps"]]
        assert (steps == [0, 2] or not delay) and found["kept"]["step"] > 0
        assert asked == steps and steps[-1] == 2
        asked.clear()


def test_sample_metrics_of_given_rows() -> None:
    """Prompts count once; the win rate is over all pairs of a sample now and one of the start."""

    def row(prompt: int, sample: int, reward: float, text: str, kl: float, reason: str = "stop") -> dict[str, Any]:
        return {"prompt": prompt, "sample": sample, "reward": reward, "text": text, "kl": kl, "tokens": len(text),
                "finish_reason": reason}  # fmt: skip

    start = [row(0, 0, 0.0, "a", 0), row(0, 1, 2.0, "b", 0), row(1, 0, 1.0, "c", 0), row(1, 1, 1.0, "d", 0)]
    now = [
        row(0, 0, 1.0, "a", 1.0),
        row(0, 1, 2.0, "bb", 3.0),
        row(1, 0, 1.0, "c", 0.0, "length"),
        row(1, 1, 3, " ", 2),
    ]
    found = {name: one and one["value"] for name, one in sample_metrics(now, start, ratio=True).items()}
    assert found["win_rate"] == pytest.approx(((1 + 0 + 1 + 0.5) / 4 + (0.5 + 0.5 + 1 + 1) / 4) / 2)
    assert found["gain"] == pytest.approx(0.75) and found["kl"] == pytest.approx(1.5)
    assert found["unfinished"] == 0.25 and found["empty"] == 0.25 and found["same_text"] == 0.5
    unjudged = [one | {"reward": None} for one in now]
    assert not {"reward", "win_rate", "gain"} & {*sample_metrics(unjudged, start, ratio=True)}


def test_samples_on_disk(tmp_path: Path) -> None:
    """A line separator inside a text is part of it."""
    text = "one\u2028two\r\nthree"
    file = tmp_path / "step-0.jsonl"
    row = {"prompt": 0, "sample": 0, "text": text, "reward": None, "finish_reason": "stop"}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_samples(file)[0]["text"] == text
    (tmp_path / while_training.PROMPTS).write_text(json.dumps(["q"]))
    shown = while_training.shown_samples(tmp_path, 3)
    assert shown == [{"prompt": "q", "steps": [{"step": 0, "text": text, "reward": None, "finish_reason": "stop"}]}]
    assert while_training.shown_samples(tmp_path / "none", 3) == []


def test_the_start_is_always_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the fields say; a schedule that reads the metric of every evaluation needs one that is there."""
    monkeypatch.chdir(tmp_path)
    found = run(write(tmp_path, trainer={"eval_on_start": False, "eval_strategy": "epoch", "max_steps": 2}))
    assert [one["step"] for one in found["steps"]] == [0, 2]
    config = load_config(
        write(
            tmp_path,
            trainer={"lr_scheduler_type": "reduce_lr_on_plateau"},
            eval_samples=SAMPLES,
            keep={"rule": "win_rate"},
        )
    )
    with pytest.raises(ConfigError, match=r"lr_scheduler_type: found reduce_lr_on_plateau and keep\.rule win_rate"):
        check(config)
