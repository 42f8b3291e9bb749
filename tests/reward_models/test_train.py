"""train_reward_model: the pairs that are trained on, settings that are refused, exact resume."""

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from datasets import Dataset

from align.config import ObjectiveSection, RewardSection
from align.errors import ConfigError, DataError
from reward_models.score import RewardScorer
from reward_models.train import train_reward_model
from reward_models.trainer import RewardTrainer
from tests.helpers.builders import beginning, bert_reward, llama_reward, rows
from tests.reward_models.test_reward_models import ANSWERS, FAST, TALK, long_and_short


def test_messages_are_trained_on_as_they_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer gets the token ids from which the margin of a pair is computed."""
    folder = llama_reward(tmp_path / "rm", words=1)
    tokenizer = beginning(folder)
    tables: list[Any] = []
    original = RewardTrainer.__init__

    def spy(self: RewardTrainer, **kwargs: Any) -> None:
        tables.append(kwargs["train_dataset"])
        original(self, **kwargs)

    monkeypatch.setattr(RewardTrainer, "__init__", spy)
    table = [{"id": str(k), "prompt": TALK, "chosen": ANSWERS[0], "rejected": ANSWERS[2]} for k in range(8)]
    config = RewardSection(model=str(folder), max_length=64, trainer=FAST | {"max_steps": 1})
    train_reward_model(Dataset.from_list(table), config, tmp_path / "out", seed=0)
    ids = [tokenizer.apply_chat_template([*TALK, *answer], return_dict=False) for answer in (ANSWERS[0], ANSWERS[2])]
    assert tables[0]["chosen_ids"][0] == ids[0] and tables[0]["rejected_ids"][0] == ids[1]


@pytest.mark.parametrize("head", ["full", "naive-bayes"])
def test_pairs_whose_prompts_fill_the_length_are_left_out_of_training(
    head: Literal["full", "naive-bayes"], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model is that of the other pairs alone, and the number is logged; without other pairs nothing is trained."""
    backbone, pairs = llama_reward(tmp_path / "rm"), long_and_short()
    config = RewardSection(model=str(backbone), head=head, max_length=16, trainer=FAST | {"max_steps": 3})
    train_reward_model(pairs, config, tmp_path / "all", seed=0)
    assert (
        caplog.text.count("3 of 8 pairs are left out: their two responses are the same tokens within max_length") == 1
    )
    train_reward_model(pairs.select(range(3, 8)), config, tmp_path / "others", seed=0)
    assert caplog.text.count("are left out") == 1
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("all", "others")]
    assert weights[0] == weights[1]
    with pytest.raises(DataError, match=r"same-responses.*none of 3 pairs can be trained on.*within max_length 16"):
        train_reward_model(pairs.select(range(3)), config, tmp_path / "none", seed=0)


def test_columns_of_the_objective_stay_with_their_pairs(tmp_path: Path) -> None:
    """The columns of pairs that are left out are left out as well."""
    pairs = long_and_short().add_column("teacher_margin", [float(k) for k in range(8)])
    objective = ObjectiveSection(name="margin_mse")
    config = RewardSection(
        model=str(llama_reward(tmp_path / "rm")), objective=objective, max_length=16, trainer=FAST | {"max_steps": 3}
    )
    for name, table in (("all", pairs), ("others", pairs.select(range(3, 8)))):
        train_reward_model(table, config, tmp_path / name, seed=0)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("all", "others")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("peft", [None, {"r": 4, "target_modules": ["q_proj", "v_proj"]}])
def test_training_learns_and_loads_as_a_plain_model(tmp_path: Path, peft: dict[str, object] | None) -> None:
    backbone = llama_reward(tmp_path / "backbone")
    config = RewardSection(model=str(backbone), max_length=64, trainer=FAST, peft=peft)
    pairs = Dataset.from_list(rows(16))

    def accuracy(model: Path) -> float:
        return float(
            np.mean(np.asarray(RewardScorer(model, batch_tokens=512, max_length=64).score_pairs(pairs)["margin"]) > 0)
        )

    train_reward_model(pairs, config, tmp_path / "out", seed=0)
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out" / "adapter_config.json").exists()
    assert accuracy(tmp_path / "out") >= 0.9
    if peft is None:
        train_reward_model(pairs, config, tmp_path / "again", seed=0)
        first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
        assert first == second


def test_unknown_trainer_key_is_named(tmp_path: Path) -> None:
    config = RewardSection(model=str(llama_reward(tmp_path / "m")), trainer={"learning_rat": 1e-3, "max_steps": "ten"})
    with pytest.raises(ConfigError) as caught:
        train_reward_model(Dataset.from_list(rows(4)), config, tmp_path / "out", seed=0)
    assert "reward.trainer.learning_rat: not a field of RewardConfig (did you mean `learning_rate`?)" in str(
        caught.value
    )
    assert "reward.trainer.max_steps: found 'ten', expected a whole number" in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [{"chat_template_path": "t.jinja"}, {"eos_token": "good"}, {"model_init_kwargs": {"dtype": "bfloat16"}}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_field_that_scoring_would_ignore_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    config = RewardSection(model=str(llama_reward(tmp_path / "m")), trainer=FAST | fields)
    with pytest.raises(ConfigError, match=f"reward.trainer.{next(iter(fields))}: has no meaning here"):
        train_reward_model(Dataset.from_list(rows(4)), config, tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()


def test_training_resumed_anywhere_ends_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise, from the checkpoint of any of eight steps, six per epoch."""
    trainer = FAST | {"max_steps": 8, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    config = RewardSection(
        model=str(bert_reward(tmp_path / "backbone")), max_length=64,
        trainer=trainer | {"lr_scheduler_type": "constant"},
    )  # fmt: skip
    pairs = Dataset.from_list(rows(24))
    train_reward_model(pairs, config, tmp_path / "full", seed=0)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("reward_models.train.save_model", die)
        with pytest.raises(KeyboardInterrupt):
            train_reward_model(pairs, config, tmp_path / "stopped" / "model", seed=0)
    checkpoints = tmp_path / "stopped" / "model-checkpoints"
    for step in range(1, 9):
        folder = tmp_path / f"stopped-{step}"
        shutil.copytree(checkpoints, folder / checkpoints.name, ignore=lambda _, names, step=step: [
            name for name in names if name.startswith("checkpoint-") and int(name.split("-")[1]) > step
        ])  # fmt: skip
        train_reward_model(pairs, config, folder / "model", seed=0)
        weights = [(path / "model.safetensors").read_bytes() for path in (folder / "model", tmp_path / "full")]
        assert weights[0] == weights[1], step
