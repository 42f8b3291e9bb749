"""RewardTrainer, RewardConfig and RewardModel as Python calls them: trl's signature, trl's losses, what is refused."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from align.commands.score import score_pairs
from align.config import ObjectiveSection, PairsSection, RewardSection
from align.data.pairs import read_pairs
from align.errors import AlignError
from reward_models import OBJECTIVES, RewardConfig, RewardModel, RewardTrainer
from reward_models.ensemble import train_members
from reward_models.train import train_reward_model
from tests.api.test_pair_tables import in_python
from tests.helpers.builders import llama_reward, rows

STEPS = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 64, "report_to": "none"}
PAIRS = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows(12)]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_reward(tmp_path_factory.mktemp("backbone"))


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_script_for_trl_gives_trls_losses(backbone: Path, tmp_path: Path) -> None:
    """The signature begins with trl's; a string, a module and positional arguments give the losses of trl."""
    ours, theirs = (list(inspect.signature(kind.__init__).parameters) for kind in (RewardTrainer, trl.RewardTrainer))
    assert ours[: len(theirs)] == theirs
    data = Dataset.from_list(PAIRS)
    settings = STEPS | {"logging_steps": 1, "save_strategy": "no", "bf16": False}
    expected = losses(trl.RewardTrainer(str(backbone), trl.RewardConfig(str(tmp_path), **settings), None, data))
    assert len(expected) == 3
    named = RewardTrainer(str(backbone), args=RewardConfig(str(tmp_path), **settings), train_dataset=data)
    assert losses(named) == pytest.approx(expected, abs=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    plain = trl.RewardConfig(str(tmp_path), **settings)
    assert losses(RewardTrainer(model, plain, None, pd.DataFrame(PAIRS), None, tokenizer)) == pytest.approx(
        expected, abs=1e-5
    )


def test_python_and_the_run_train_one_model(backbone: Path, tmp_path: Path) -> None:
    """The same pairs, objective and seed give the same weights."""
    table = Dataset.from_list([row | {"teacher_margin": float(k)} for k, row in enumerate(rows(12))])
    parameters = {"scale": 0.5}
    fields = {key: value for key, value in STEPS.items() if key != "max_length"}
    section = RewardSection(
        model=str(backbone), objective=ObjectiveSection(name="margin_mse", parameters=parameters), max_length=64,
        trainer=fields | {"train_sampling_strategy": "random", "bf16": False, "use_cpu": True},
    )  # fmt: skip
    train_reward_model(table, section, tmp_path / "run", seed=5)
    args = RewardConfig(str(tmp_path / "python"), **STEPS, seed=5, objective_kwargs=parameters, use_cpu=True)
    trainer = RewardTrainer(str(backbone), args, train_dataset=table, objective="margin_mse")
    trainer.train()
    trainer.save_model()
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("python", "run"))
    assert found == expected
    records = [np.load(tmp_path / name / "training_texts.npy") for name in ("python", "run")]
    assert np.array_equal(*records)


def test_a_stream_is_read_as_far_as_the_steps_reach(backbone: Path, tmp_path: Path) -> None:
    """Its first pairs that can be told apart give the losses of the same pairs in a table, in their order."""
    taken: list[int] = []

    def stream() -> Any:
        for k, row in enumerate(rows(5000)):
            taken.append(k)
            pair = {key: row[key] for key in PAIRS[0]}
            yield pair | {"prompt": "the film was " * 60} if k == 1 else pair

    settings = STEPS | {"logging_steps": 1, "save_strategy": "no", "bf16": False}
    first = [{key: row[key] for key in PAIRS[0]} for k, row in enumerate(rows(13)) if k != 1]
    args = RewardConfig(str(tmp_path), **settings)
    trainer = RewardTrainer(str(backbone), args, train_dataset=IterableDataset.from_generator(stream))
    assert len(trainer.train_dataset) == 12 and max(taken) < 600 and args.train_sampling_strategy == "random"
    table = RewardTrainer(
        str(backbone),
        RewardConfig(str(tmp_path), **settings, train_sampling_strategy="sequential"),
        train_dataset=first,
    )
    assert trainer.train_dataset["id"] == table.train_dataset["id"] and losses(trainer) == losses(table)
    bad = IterableDataset.from_generator(
        lambda: (pair | {"rejected": pair["chosen"]} if k == 300 else pair for k, pair in enumerate(stream()))
    )
    args = RewardConfig(str(tmp_path), **settings | {"max_steps": 64})
    with pytest.raises(AlignError, match=r"from row 256 of the stream on: 1 of 256 rows(.|\n)*row 44, rejected"):
        RewardTrainer(str(backbone), args, train_dataset=bad)
    with pytest.raises(AlignError, match=r"max_steps -1, expected more than 0(.|\n)*set RewardConfig.max_steps"):
        RewardTrainer(str(backbone), RewardConfig(str(tmp_path)), train_dataset=IterableDataset.from_generator(stream))


def test_an_own_objective_reads_columns_and_parameters(backbone: Path, tmp_path: Path) -> None:
    """It learns what the registered one learns; its losses are those of the registered one."""

    def squared(chosen: Tensor, rejected: Tensor, teacher_margin: Tensor, *, scale: float = 1.0) -> Tensor:
        return (chosen - rejected - scale * teacher_margin).square()

    table = Dataset.from_list([row | {"teacher_margin": float(k % 3)} for k, row in enumerate(PAIRS)])
    args = RewardConfig(str(tmp_path), **STEPS, logging_steps=1, save_strategy="no", objective_kwargs={"scale": 0.5})
    expected = losses(RewardTrainer(str(backbone), args, train_dataset=table, objective="margin_mse"))
    assert losses(RewardTrainer(str(backbone), args, train_dataset=table, objective=squared)) == expected


def test_the_last_checkpoint_of_a_finished_training_is_the_model(backbone: Path, tmp_path: Path) -> None:
    args = RewardConfig(str(tmp_path / "rm"), **STEPS)
    trainer = RewardTrainer(
        str(backbone), args, train_dataset=PAIRS, eval_dataset=PAIRS[:4], peft_config=LoraConfig(r=2)
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] >= 0
    model = RewardModel.from_pretrained(tmp_path / "rm")
    assert model.name.endswith("checkpoint-3") and "checkpoint-3" in repr(model)
    scored = model.score_pairs([*PAIRS[:2], {"prompt": "the plot is", "chosen": " very", "rejected": " not"}])
    assert scored["margin_source"] == ["in-sample", "in-sample", "outside"]
    state = tmp_path / "rm" / "checkpoint-3" / "trainer_state.json"
    state.write_text(state.read_text().replace('"max_steps": 3', '"max_steps": 9'))
    with pytest.raises(AlignError, match="the checkpoint of step 3 of 9, expected a finished model"):
        RewardModel.from_pretrained(tmp_path / "rm")


def test_scores_are_those_of_the_command(backbone: Path, tmp_path: Path) -> None:
    """An ensemble of two: rewards, margin, spread and source; a reward is the mean of the members'."""
    section = RewardSection(
        model=str(backbone), ensemble=2, max_length=64,
        trainer={"max_steps": 1, "bf16": False, "use_cpu": True, "per_device_train_batch_size": 4},
    )  # fmt: skip
    train_members(Dataset.from_list(rows(6)), section, tmp_path / "rm", seed=0)
    Dataset.from_list(rows(9)).to_json(str(tmp_path / "pairs.jsonl"))
    score_pairs(
        PairsSection(path=str(tmp_path / "pairs.jsonl")), str(tmp_path / "rm"), tmp_path / "out", batch_tokens=64,
        max_length=64,
    )  # fmt: skip
    model = RewardModel.from_pretrained(tmp_path / "rm", batch_tokens=64, max_length=64)
    found, expected = model.score_pairs(rows(9)).to_list(), read_pairs(tmp_path / "out").to_list()
    assert found == expected
    assert {"margin_std", "margin_source"} <= found[0].keys() and found[0]["margin_source"] == "in-sample"
    texts = Dataset.from_list(rows(9))
    rewards = model.score(texts["prompt"], texts["chosen"])
    assert rewards.shape == (9,) and rewards == pytest.approx([row["reward_chosen"] for row in found], abs=1e-5)
    assert model.score([], []).shape == (0,)


TALK = [{"role": "user", "content": "the film"}]
ANSWER = [{"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ({"objective": "bradley"}, "objective-name", "did you mean `bradley_terry`?"),
        ({"objective": 3}, "objective-name", "objective: found 3, expected a name or a function"),
        ({"objective": lambda c, r: (c - r).mean()}, "objective-parameter", "found a result () of torch.float32"),
        ({"objective": lambda c, r: (c - r).detach()}, "objective-parameter", "without a gradient"),
        ({"objective": lambda c, r: c @ r[:1]}, "objective-parameter", "raised RuntimeError"),
        ({"objective": lambda c, r, margn: c - r}, "objective-column", "reads 'margn'"),
        ({"objective": lambda c, r, margin: margin - c + r}, "objective-column", "margin: found no such column"),
        ({"objective": "margin_mse"}, "objective-column", "teacher_margin: found no such column"),
        ({"train_dataset": None}, "data-type", "train_dataset: found None"),
        ({"train_dataset": []}, "data-empty", "train_dataset: holds no rows"),
        ({"train_dataset": {"prompt": ["a"]}}, "data-type", "train_dataset: found a dict"),
        ({"train_dataset": [{"prompt": "x", "chosen": "y"}]}, "data-column", "no column 'rejected'"),
        ({"train_dataset": [row | {"id": "one"} for row in PAIRS]}, "pair-duplicate-id", "row 1, id: found 'one'"),
        ({"eval_dataset": [{"prompt": "x", "chosen": 3, "rejected": "z"}]}, "pair-type", "row 0, chosen: found 3"),
        ({"model": 3}, "config-option", "model: found a int"),
        ({"model": "no/where/at/all"}, "model-load", "no/where/at/all"),
        ({"data_collator": print}, "trainer-key", "data_collator: found builtin_function"),
        ({"peft_config": LoraConfig(task_type="CAUSAL_LM")}, "peft-key", "peft_config.task_type: found"),
        ({"args": trl.DPOConfig("out", bf16=False)}, "trainer-key", "args: found a DPOConfig, expected"),
    ],
)  # fmt: skip
def test_a_trainer_refuses(arguments: dict[str, Any], code: str, words: str, backbone: Path, tmp_path: Path) -> None:
    given = {"model": str(backbone), "args": RewardConfig(str(tmp_path), **STEPS), "train_dataset": PAIRS}
    with pytest.raises(AlignError) as caught:
        RewardTrainer(**(given | arguments))
    assert caught.value.code == code and words in str(caught.value)
    in_python(caught.value)


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"tilt": {"kind": "upp"}}, "trainer-key", "tilt.kind: found 'upp'"),
        ({"tilt": {"kind": "up", "temprature": 1}}, "trainer-key", "tilt.temprature"),
        ({"sharpness": {"radius": -1}}, "trainer-key", "sharpness.radius: found -1"),
        ({"chat_template_path": "x"}, "trainer-key", "chat_template_path: found 'x', which has no effect here"),
        (
            {"model_init_kwargs": {"num_labels": 2}},
            "trainer-key",
            "model_init_kwargs.num_labels: found 2, expected only",
        ),
    ],
)
def test_arguments_are_refused_when_they_are_made(fields: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(AlignError) as caught:
        RewardConfig("out", **fields)
    assert caught.value.code == code and words in str(caught.value)


def test_arguments_are_read_from_a_command_line() -> None:
    """As those of trl are: dictionaries are JSON; bf16 is off where there is no GPU, and stays as it is given."""
    line = ["--output_dir", "out", "--objective_kwargs", '{"scale": 0.5}', "--tilt", '{"kind": "up"}']
    (found,) = HfArgumentParser(RewardConfig).parse_args_into_dataclasses(line)
    assert found.objective_kwargs == {"scale": 0.5} and found.tilt == {"kind": "up"}
    assert found.bf16 is torch.cuda.is_available() and RewardConfig("out", bf16=True, use_cpu=True).bf16 is True


def test_sections_of_the_arguments_reach_the_step(backbone: Path, tmp_path: Path) -> None:
    """The tilt and the penalty are logged, and a parameter of the objective that it lacks is refused by name."""
    args = RewardConfig(str(tmp_path), **STEPS, logging_steps=1, tilt={"kind": "up"}, sharpness={"radius": 0.1})
    trainer = RewardTrainer(str(backbone), args, train_dataset=PAIRS)
    trainer.train()
    assert {"weight/ess_share", "sharpness/norm"} <= trainer.state.log_history[0].keys()
    with pytest.raises(AlignError, match=r"objective-parameter.*objective_kwargs"):
        RewardTrainer(str(backbone), RewardConfig(str(tmp_path), objective_kwargs={"x": 1}), train_dataset=PAIRS)
    assert isinstance(OBJECTIVES["bradley_terry"].function(torch.ones(2), torch.zeros(2)), Tensor)


@pytest.mark.parametrize(
    ("prompts", "completions", "code", "words"),
    [
        (["a"], ["b", "c"], "completion-count", "completions: found 2 for 1 prompts"),
        ("a", ["b"], "data-type", "prompts: found a str"),
        (["a"], [3], "completion-row", "completions[0]: found 3"),
        (["a"], [[{"role": "assistant", "content": "b"}]], "pair-mixed", "completions[0]: found messages"),
        ([TALK], ["b"], "pair-mixed", "completions[0]: found text"),
        (pd.DataFrame(PAIRS), pd.DataFrame(PAIRS), "data-type", "prompts: found a DataFrame"),
        (Dataset.from_list(PAIRS), ["b"] * 12, "data-type", "prompts: found a Dataset"),
        ({"a", "b"}, ["c", "d"], "data-type", "prompts: found a set"),
        ([TALK], [TALK], "pair-role", "completions[0]: found a last message by user, expected one by assistant"),
        ([TALK], [[]], "pair-empty", "completions[0]: found no messages"),
        ([[{"role": "user"}]], [ANSWER], "pair-message", "prompts[0], message 1: found {'role': 'user'}"),
        ([TALK], [[{"role": "bot", "content": "b"}]], "pair-role", "completions[0], message 1: found role 'bot'"),
    ],
)
def test_a_score_refuses(prompts: Any, completions: Any, code: str, words: str, backbone: Path) -> None:
    model = RewardModel.from_pretrained(backbone)
    with pytest.raises(AlignError) as caught:
        model.score(prompts, completions)
    assert caught.value.code == code and words in str(caught.value)


def test_texts_in_any_sequence_have_the_same_rewards(backbone: Path) -> None:
    """Lists, tuples, arrays, columns, generators; messages too; on any device and in batches of any size."""
    model = RewardModel.from_pretrained(backbone, device="cpu")
    prompts, completions = ([str(row[name]) for row in PAIRS] for name in ("prompt", "chosen"))
    found = model.score(prompts, completions)
    frame, table = pd.DataFrame(PAIRS, index=range(12, 0, -1)), Dataset.from_list(PAIRS)
    for one in (
        model.score(tuple(prompts), tuple(completions)),
        model.score(np.array(prompts), np.array(completions, dtype=object)),
        model.score(frame["prompt"], frame["chosen"]),
        model.score(table["prompt"], table["chosen"]),
        model.score(iter(prompts), iter(completions)),
        RewardModel.from_pretrained(backbone, batch_tokens=1).score(prompts, completions),
    ):
        assert one.dtype == np.float64 and one == pytest.approx(found, abs=1e-5)
    talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers = [({"role": "assistant", "content": text.strip()},) for text in completions]
    rewards = model.score(talks, [list(answer) for answer in answers])
    assert model.score(pd.Series(talks), answers) == pytest.approx(rewards) and len(set(rewards)) > 6
    assert model.score(["", "a"], ["", "b"]).shape == (2,)  # a policy may write nothing


def test_a_model_refuses(backbone: Path) -> None:
    for device in ("nope", "cuda:99", 3.5):
        with pytest.raises(AlignError, match="device: found"):
            RewardModel.from_pretrained(backbone, device=device)  # type: ignore[arg-type]
    with pytest.raises(AlignError, match="path: found NoneType, expected a folder or a hub id"):
        RewardModel.from_pretrained(None)  # type: ignore[arg-type]
    with pytest.raises(AlignError, match="max_length: found 0"):
        RewardModel.from_pretrained(backbone, max_length=0)
    with pytest.raises(AlignError, match="model-load"):
        RewardModel.from_pretrained("no/where/at/all")
    with pytest.raises(AlignError, match="pairs: holds no rows"):
        RewardModel.from_pretrained(backbone).score_pairs([])
