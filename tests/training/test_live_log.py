"""The file that a training writes while it goes on: what it logs, as the viewer reads it, and gone at the end."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from align import PreferenceTrainer
from align.config import LossSection, TrainSection
from align.io.files import read_json
from align.training.base.live_log import LIVE
from align.training.train import train_policy
from align.viewer.followed import follow
from tests.helpers.builders import rows
from tests.training.test_trainer import FIELDS

PAIRS = Dataset.from_list(rows(8))


def test_a_stopped_and_resumed_training_can_be_followed(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = TrainSection(
        model=str(tiny_policy), methods={"plain": LossSection(loss="dpo")},
        trainer=FIELDS | {"max_steps": 4, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2},
    )  # fmt: skip
    output, step, seen = tmp_path / "train-plain.partial", PreferenceTrainer.training_step, []

    def stop(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise RuntimeError("the machine is gone")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "training_step", stop)
    with pytest.raises(RuntimeError, match="gone"):
        train_policy(PAIRS, section, "plain", output, seed=0)
    found = follow(tmp_path)["methods"]["plain"]
    assert [point[0] for point in found["curves"]["loss"]] == [1, 2, 3] and (found["step"], found["of"]) == (3, 4)
    assert found["seconds_left"] > 0

    def look(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.append(follow(tmp_path)["methods"]["plain"]["curves"]["loss"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "training_step", look)
    train_policy(PAIRS, section, "plain", output, seed=0)
    assert [[point[0] for point in points] for points in seen] == [[1, 2, 3], [1, 2, 3]], "3 came again"
    assert not (output / LIVE).exists(), "a finished stage holds no file with times"
    history = read_json(output / "history.json")["history"]
    assert seen[-1][:2] == [[one["step"], pytest.approx(one["loss"])] for one in history[:2]]
