"""Trackers: a run per training, its config, its end; resumed trainings; figures that come later; missing packages."""

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainingArguments
from trl import DPOConfig

from align import PreferenceConfig, PreferenceTrainer
from align.config import LossSection, RewardSection, TrainSection
from align.data.table_facts import table_facts
from align.errors import ConfigError, EnvironmentProblem
from align.io.files import read_json
from align.training.base.arguments import build_trainer_args
from align.training.base.tracked_runs import log_figures, tracked_run
from align.training.base.trackers import TRACKERS
from align.training.train import train_policy
from reward_models.crossfit import cross_fit
from tests.helpers.builders import bert_reward, rows
from tests.training.test_trainer import FIELDS

PAIRS = Dataset.from_list(rows(8))


def config(policy: Path, report_to: str, **fields: Any) -> TrainSection:
    return TrainSection(
        model=str(policy),
        methods={"plain": LossSection(loss="dpo"), "weighted": LossSection(loss="madpo", parameters={"tau": 1.5})},
        trainer=FIELDS | {"report_to": report_to, "max_steps": 2, "logging_steps": 1} | fields,
    )


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def shown(folder: Path) -> str:
    return events(folder).Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_tensorboard_has_a_run_per_method_that_outlives_the_checkpoints(tiny_policy: Path, tmp_path: Path) -> None:
    """Each folder has the losses of its own training, and says under which loss and on which pairs they were."""
    for method in ("plain", "weighted"):
        run = tracked_run(tmp_path, "run", method)
        train_policy(PAIRS, config(tiny_policy, "tensorboard"), method, tmp_path / method, seed=0, run=run)
        history = read_json(tmp_path / method / "history.json")["history"]
        folder = tmp_path / "tracking" / f"run-{method}"
        assert scalars(folder, "train/loss") == [(one["step"], pytest.approx(one["loss"])) for one in history]
        assert not (tmp_path / method / "checkpoints").exists()
    assert '"loss": "madpo"' in shown(folder) and '"tau": 1.5' in shown(folder)
    assert table_facts(PAIRS).fingerprint in shown(folder)
    assert '"loss": "dpo"' in shown(tmp_path / "tracking" / "run-plain")


def test_a_second_training_replaces_the_events_and_figures_join_the_last(tiny_policy: Path, tmp_path: Path) -> None:
    run = tracked_run(tmp_path, "run", "plain")
    for attempt, steps in (("first", 3), ("second", 2)):
        section = config(tiny_policy, "tensorboard", max_steps=steps)
        train_policy(PAIRS, section, "plain", tmp_path / attempt, seed=0, run=run)
    assert [step for step, _ in scalars(run.folder, "train/loss")] == [1, 2]
    log_figures(run, lambda: TrainingArguments(output_dir=str(tmp_path)), {"kl": 0.25})
    assert scalars(run.folder, "final/kl") == [(2, 0.25)]
    assert [step for step, _ in scalars(run.folder, "train/loss")] == [1, 2]


def test_a_resumed_training_continues_its_run(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps that are made again replace those that were logged before the training was interrupted."""
    section = config(tiny_policy, "tensorboard", max_steps=4, save_strategy="steps", save_steps=2)
    run, step = tracked_run(tmp_path, "run", "plain"), PreferenceTrainer.training_step

    def stop(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise RuntimeError("the machine is gone")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "training_step", stop)
    with pytest.raises(RuntimeError, match="gone"):
        train_policy(PAIRS, section, "plain", tmp_path / "out", seed=0, run=run)
    assert [step for step, _ in scalars(run.folder, "train/loss")] == [1, 2, 3]
    monkeypatch.undo()
    train_policy(PAIRS, section, "plain", tmp_path / "out", seed=0, run=run)
    assert [step for step, _ in scalars(run.folder, "train/loss")] == [1, 2, 3, 4]


def test_each_fold_of_a_reward_model_has_a_run(tmp_path: Path) -> None:
    fields = {"max_steps": 1, "report_to": "tensorboard", "bf16": False, "per_device_train_batch_size": 4}
    section = RewardSection(
        model=str(bert_reward(tmp_path / "backbone")), folds=2, max_length=64, trainer=fields | {"logging_steps": 1}
    )
    cross_fit(Dataset.from_list(rows(12)), section, tmp_path, seed=0, run=tracked_run(tmp_path, "run", "reward"))
    for k in range(2):
        folder = tmp_path / "tracking" / f"run-reward-fold-{k}"
        assert len(scalars(folder, "train/loss")) == 1
        assert '"loss": "bradley_terry"' in shown(folder) and f'"method": "reward-fold-{k}"' in shown(folder)


class Recorder(ModuleType):
    """Stands for the package of a tracker and records the calls; it tests what is called, not what is shown."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__version__ = "9.9.9"
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.run: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def test_wandb_is_opened_and_finished_around_each_training(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, settings = Recorder("wandb"), ModuleType("wandb.sdk.lib.config_util")
    settings.ConfigError = type("ConfigError", (Exception,), {})  # type: ignore[attr-defined]

    def begin(**kwargs: Any) -> None:
        wandb.calls.append(("init", (), kwargs))
        wandb.run = SimpleNamespace(id=kwargs["id"], summary={}, _label=lambda **_: None)

    def finish(**kwargs: Any) -> None:
        wandb.calls.append(("finish", (), kwargs))
        wandb.run = None

    wandb.init, wandb.finish, wandb.config = begin, finish, _Config(wandb)  # type: ignore[attr-defined]
    for name, module in {"wandb": wandb, "wandb.sdk.lib.config_util": settings}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for method in ("plain", "weighted"):
        run = tracked_run(tmp_path, "run", method)
        train_policy(PAIRS, config(tiny_policy, "wandb"), method, tmp_path / method, seed=0, run=run)
    begun = [kwargs for _, kwargs in wandb.named("init")]
    assert [(one["name"], one["group"]) for one in begun] == [("run-plain", "run"), ("run-weighted", "run")]
    assert begun[0]["id"] != begun[1]["id"]
    assert [kwargs for _, kwargs in wandb.named("finish")] == [{"exit_code": 0}] * 2
    updated = {key: value for (values,), _ in wandb.named("config") for key, value in values.items()}
    assert (updated["loss"], updated["loss_parameters"]["tau"], updated["loss_type"]) == ("madpo", 1.5, ["madpo"])
    assert updated["data"]["fingerprint"] == table_facts(PAIRS).fingerprint
    log_figures(run, lambda: TrainingArguments(output_dir=str(tmp_path)), {"kl": 0.25})
    assert wandb.named("init")[-1][1]["id"] == begun[1]["id"]


class _Config(dict):  # type: ignore[type-arg]
    """``wandb.config``."""

    def __init__(self, wandb: Recorder) -> None:
        super().__init__()
        self.wandb = wandb

    def update(self, values: dict[str, Any], **_: Any) -> None:
        self.wandb.calls.append(("config", (values,), {}))


@pytest.mark.parametrize("kind", [DPOConfig, TrainingArguments])
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed(
    kind: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.integrations.integration_utils as integrations

    monkeypatch.setattr(integrations, f"is_{name}_available", lambda: False)
    message = rf"\[tracker\] x.trainer.report_to: found {name}, which is not installed\n  do: pip install {name}"
    with pytest.raises(ConfigError, match=message):
        build_trainer_args(kind, {"report_to": name}, path="x.trainer", forced={"output_dir": str(tmp_path)})


def test_a_missing_tracker_is_told_when_a_trainer_is_made(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.integrations.integration_utils as integrations

    monkeypatch.setattr(integrations, "is_mlflow_available", lambda: False)
    args = PreferenceConfig(str(tmp_path), report_to="mlflow", use_cpu=True, bf16=False)
    with pytest.raises(ConfigError, match=r"\[tracker\] .*report_to: found mlflow, which is not installed"):
        PreferenceTrainer(str(tiny_policy), args=args, train_dataset=PAIRS)


def test_wandb_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Recorder("wandb")
    wandb.Settings = lambda: SimpleNamespace(base_url="https://api.wandb.ai")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    given: dict[str, Any] = {"path": "x.trainer", "forced": {"output_dir": str(tmp_path)}}
    with pytest.raises(ConfigError, match=r"\[tracker\] x.trainer.report_to: found wandb, and no key"):
        build_trainer_args(DPOConfig, {"report_to": "wandb"}, **given)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    build_trainer_args(DPOConfig, {"report_to": "wandb"}, **given)


def test_a_tracker_that_cannot_open_a_run(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> str:
        raise PermissionError("no room for events")

    monkeypatch.setattr(TRACKERS["tensorboard"], "open", fail)
    run = tracked_run(tmp_path, "run", "plain")
    with pytest.raises(EnvironmentProblem, match=r"\[tracker\] report_to: tensorboard cannot open a run \(no room"):
        train_policy(PAIRS, config(tiny_policy, "tensorboard"), "plain", tmp_path / "out", seed=0, run=run)
