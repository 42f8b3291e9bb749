"""Exact resume and stopping: bitwise from any checkpoint, one save per step, signals that come twice or late."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from align import PreferenceConfig, PreferenceTrainer
from align.errors import ConfigError
from align.training.base.stopping import stoppable
from tests.training.test_python_trainer import BASE, table
from tests.training.test_trainer import ours


@pytest.mark.parametrize(("loss", "order"), [("madpo", "random"), ("beta_dpo", "random"), ("madpo", "group_by_length")])
def test_resumed_equals_uninterrupted(tiny_policy: Path, tmp_path: Path, loss: str, order: str) -> None:
    """Bitwise, from the checkpoint of any step: in the first epoch, at its end, in a later one, and after the last."""
    saving = {"max_steps": 11, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 11,
              "lr_scheduler_type": "constant", "train_sampling_strategy": order}  # fmt: skip
    full = ours(tiny_policy, tmp_path, loss, **saving)
    full.train()
    steps = [entry for entry in full.state.log_history if "loss" in entry]
    assert len(steps) == 11 and len(full.get_train_dataloader()) == 4
    for step in range(1, 12):
        resumed = ours(tiny_policy, tmp_path, loss, **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / f"checkpoint-{step}"))
        assert resumed.state.global_step == 11
        for name, value in full.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), (step, name)
        states = [trainer.pair_losses.state_dict() for trainer in (full, resumed)]
        assert states[0] == states[1] and list(states[0]) == (["beta_dpo"] if loss == "beta_dpo" else [])
        assert [entry for entry in resumed.state.log_history if "loss" in entry] == steps


class Saves(TrainerCallback):
    """Raises SIGTERM in the second step, and records the steps of checkpoints."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


def test_a_checkpoint_is_written_once(tiny_policy: Path, tmp_path: Path) -> None:
    """Not a second time at the end of an epoch that a stop cuts short, nor when the training is already finished."""
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
    """Raises SIGTERM twice in a step, or once after the last step."""

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
def test_a_signal_that_comes_twice_or_late(tiny_policy: Path, tmp_path: Path, step: int) -> None:
    """Within a step: a checkpoint of that step; after the last: the rest of the block runs before the exit."""
    trainer = ours(tiny_policy, tmp_path, max_steps=3)
    trainer.add_callback(Signals(step))
    block = []
    with pytest.raises(SystemExit) as exit_, stoppable(trainer) as stop:
        trainer.train()
        stop.check()
        block.append("saved")
    assert exit_.value.code == 128 + signal.SIGTERM and block == (["saved"] if step == 3 else [])
    kept = [folder.name for folder in (tmp_path / "checkpoints").glob("checkpoint-*")]
    assert kept == ([] if step == 3 else [f"checkpoint-{step + 1}"])
    if step == 2:
        again = ours(tiny_policy, tmp_path, max_steps=3)
        again.train(resume_from_checkpoint=True)
        assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "pairs", "what"),
    [
        ({"loss": "ipo"}, 12, "loss dpo, and this one has ipo"),
        ({"beta": 0.5}, 12, "parameters {'beta': 0.1}, and this one has {'beta': 0.5}"),
        ({"pair_weights": {"normalise": True}}, 12, "parts"),
        ({}, 8, "data 12 pairs"),
        ({"learning_rate": 1.0, "max_steps": 2}, 12, None),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    tiny_policy: Path, tmp_path: Path, fields: dict[str, Any], pairs: int, what: str | None
) -> None:
    saving = BASE | {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}

    def trainer(count: int, **more: Any) -> PreferenceTrainer:
        args = PreferenceConfig(str(tmp_path), **(saving | more))
        return PreferenceTrainer(str(tiny_policy), args=args, train_dataset=table(count))

    trainer(12).train()
    if what is None:
        trainer(pairs, **fields).train("auto")
        return
    for choice in ("auto", True):
        with pytest.raises(ConfigError, match="checkpoint-1: was written by a training with ") as found:
            trainer(pairs, **fields).train(choice)
        assert found.value.code == "checkpoint-training" and what in found.value.message


def test_a_checkpoint_that_is_not_there(tiny_policy: Path, tmp_path: Path) -> None:
    args = PreferenceConfig(str(tmp_path), **BASE)
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint: found no folder .*checkpoint-7"):
        PreferenceTrainer(str(tiny_policy), args=args, train_dataset=table(4)).train(str(tmp_path / "checkpoint-7"))
