"""Arguments of trl scripts that need more than a value: compiling, streams, what this machine lacks, round trips."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import HfArgumentParser, TrainerCallback
from trl import DPOConfig, DPOTrainer

from align import PreferenceConfig, PreferenceTrainer
from align.errors import AlignError, ConfigError
from reward_models import RewardConfig, RewardModel, RewardTrainer
from tests.helpers.builders import llama_reward, rows

BASE: dict[str, Any] = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1, "bf16": False,
    "use_cpu": True, "max_length": 64, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
PAIRS = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows(12)])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_reward(tmp_path_factory.mktemp("backbone"))


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [value for entry in trainer.state.log_history for name, value in entry.items() if name.endswith("loss")]


def test_a_compiled_policy_with_a_live_reference_gives_trl_s_losses(tiny_policy: Path, tmp_path: Path) -> None:
    """accelerate compiles the reference before its head is prepared."""
    fields = BASE | {"torch_compile": True, "torch_compile_backend": "eager"}
    runs = []
    for trainer, config in ((DPOTrainer, DPOConfig), (PreferenceTrainer, PreferenceConfig)):
        torch._dynamo.reset()
        runs.append(losses(trainer(str(tiny_policy), args=config(str(tmp_path), **fields), train_dataset=PAIRS)))
    assert len(runs[0]) == 3 and runs[1] == pytest.approx(runs[0], abs=1e-5)


def test_a_trl_reward_script_runs_unchanged(backbone: Path, tmp_path: Path) -> None:
    """``python -m trl.scripts.reward`` always sets these model_init_kwargs; tokens and a held-out stream as in trl."""
    kwargs = {"revision": "main", "trust_remote_code": False, "attn_implementation": "eager", "dtype": "float32"}
    fields: dict[str, Any] = {"pad_token": "<unk>", "eos_token": "<eos>", "eval_strategy": "steps", "eval_steps": 1}
    runs, models = [], []
    for trainer, config in ((trl.RewardTrainer, trl.RewardConfig), (RewardTrainer, RewardConfig)):
        args = config(str(tmp_path / trainer.__module__), model_init_kwargs=dict(kwargs), **fields, **BASE)
        made = trainer(
            str(backbone), args=args, train_dataset=PAIRS, eval_dataset=PAIRS.select(range(5)).to_iterable_dataset()
        )
        runs.append(losses(made))
        models.append(made.model.config)
    assert len(runs[0]) == 5 and runs[1] == pytest.approx(runs[0], abs=1e-5)
    assert [model._attn_implementation for model in models] == ["eager", "eager"]
    assert models[0].pad_token_id == models[1].pad_token_id == made.processing_class.unk_token_id
    assert made.evaluate(PAIRS.select(range(5)).to_iterable_dataset())["eval_loss"] == runs[1][-2]
    made.save_model()
    saved = RewardModel.from_pretrained(tmp_path / RewardTrainer.__module__)
    texts = PAIRS["prompt"][:3], PAIRS["chosen"][:3]
    with torch.no_grad():
        ids = [made.processing_class(p + c)["input_ids"] for p, c in zip(*texts, strict=True)]
        ids = [row if row[-1] == made.processing_class.eos_token_id else [*row, 1] for row in ids]
        found = [float(made.model(input_ids=torch.tensor([row])).logits) for row in ids]
    assert saved.score(*texts) == pytest.approx(found, abs=1e-5)


def test_a_reward_backbone_in_16_bits(backbone: Path, tmp_path: Path) -> None:
    args = RewardConfig(str(tmp_path), model_init_kwargs={"dtype": "bfloat16"}, **BASE)
    assert RewardTrainer(str(backbone), args=args, train_dataset=PAIRS).model.dtype == torch.bfloat16


SGD = torch.optim.SGD


@pytest.mark.parametrize(
    ("fields", "more", "words"),
    [
        ({"pad_token": "<nope>"}, {}, "pad_token"),
        ({"use_liger_kernel": True}, {}, "use_liger_kernel: found True, expected the package liger-kernel"),
        ({"activation_offloading": True}, {}, "activation_offloading: found True, expected a GPU"),
        ({"lr_scheduler_kwargs": {"nope": 1}, "lr_scheduler_type": "cosine"}, {}, "lr_scheduler_kwargs: found"),
        ({"optim_args": "nope"}, {}, "optim_args: found 'nope', expected key=value"),
        ({"eval_strategy": "steps"}, {}, "eval_dataset"),
    ],
)  # fmt: skip
def test_what_is_refused_when_either_trainer_is_made(
    fields: dict[str, Any], more: dict[str, Any], words: str, tiny_policy: Path, backbone: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With a code and the name of the field, where trl raises an error of its own in the middle of the work."""
    monkeypatch.setattr("align.training.base.settings.is_liger_kernel_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for trainer, config, model in (
        (PreferenceTrainer, PreferenceConfig, tiny_policy),
        (RewardTrainer, RewardConfig, backbone),
    ):
        with pytest.raises(ConfigError, match="trainer-key") as caught:
            trainer(str(model), args=config(str(tmp_path), **BASE | fields), train_dataset=PAIRS, **more)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"optimizer_cls_and_kwargs": "sgd"}, "optimizer_cls_and_kwargs: found 'sgd', expected a class of optimizers"),
        ({"optimizer_cls_and_kwargs": (SGD,)}, "optimizer_cls_and_kwargs: found (<class"),
        ({"optimizer_cls_and_kwargs": (SGD, {"lrr": 1})}, "SGD refused {'lrr': 1}: SGD.__init__"),
        ({"optimizer_cls_and_kwargs": (SGD, {"lr": -1})}, "Invalid learning rate"),
        ({"optimizer_cls_and_kwargs": (SGD, {"lr": 1}), "optimizers": (SGD([torch.ones(1)]), None)},
         "found it together with `optimizers`"),
        ({"preprocess_logits_for_metrics": 3}, "preprocess_logits_for_metrics: found 3, expected a function of logits"),
        ({"compute_metrics": "x"}, "compute_metrics: found 'x', expected a function of transformers.EvalPrediction"),
    ],
)  # fmt: skip
def test_arguments_of_the_reward_trainer(more: dict[str, Any], words: str, backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        RewardTrainer(str(backbone), args=RewardConfig(str(tmp_path), **BASE), train_dataset=PAIRS, **more)
    assert caught.value.code == "trainer-key" and words in str(caught.value)


def test_a_trainer_without_a_table_to_evaluate_on_and_a_search(
    tiny_policy: Path, backbone: Path, tmp_path: Path
) -> None:
    policy = PreferenceTrainer(str(tiny_policy), args=PreferenceConfig(str(tmp_path), **BASE), train_dataset=PAIRS)
    reward = RewardTrainer(str(backbone), args=RewardConfig(str(tmp_path), **BASE), train_dataset=PAIRS)
    for trainer in (policy, reward):
        with pytest.raises(AlignError, match="eval_dataset: found None, expected a table"):
            trainer.evaluate()
        with pytest.raises(AlignError, match=r"hyperparameter_search: .* makes it for each trial"):
            trainer.hyperparameter_search(n_trials=1)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (PreferenceConfig, {"loss": "madpo", "loss_kwargs": {"tau": 1.5}, "beta": 0.3, "pad_token": "<pad>"}),
        (PreferenceConfig, {"loss": {"terms": {"dpo": 1.0, "nll": 0.5}}, "pair_weights": {"normalise": True}}),
        (PreferenceConfig, {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2], "pairs_per_step": 8}),
        (RewardConfig, {"objective_kwargs": {"scale": 0.5}, "eos_token": "<eos>", "tilt": {"kind": "up"}}),
    ],
)
def test_a_config_survives_json(config: Any, fields: dict[str, Any]) -> None:
    """``to_dict`` makes an equal config again; a secret that is set is masked in it."""
    made = config("out", **BASE, **fields)
    for found in (made.to_dict(), json.loads(made.to_json_string())):
        (again,) = HfArgumentParser(config).parse_dict(found)
        assert {one.name: repr(getattr(again, one.name)) for one in dataclasses.fields(made)} == {
            one.name: repr(getattr(made, one.name)) for one in dataclasses.fields(made)
        }
    assert config("out", hub_token="hf_secret", **BASE).to_dict()["hub_token"] == "<HUB_TOKEN>"


@pytest.mark.parametrize(
    ("config", "name"),
    [(PreferenceConfig, "loss_kwargs"), (PreferenceConfig, "loss"), (RewardConfig, "objective_kwargs")],
)
def test_broken_json_on_a_command_line_names_its_field(config: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: found '{{tau: 1}}', expected an object in JSON"):
        HfArgumentParser(config).parse_args_into_dataclasses(["--output_dir", "out", f"--{name}", "{tau: 1}"])


def test_names_of_trackers(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that transformers does not know is refused with the config; a package is named as pip knows it."""
    for config in (PreferenceConfig, RewardConfig):
        with pytest.raises(ConfigError, match=r"report_to: found 'nonsense', expected one of .*wandb"):
            config(str(tmp_path), **BASE | {"report_to": ["tensorboard", "nonsense"]})
    monkeypatch.setattr("transformers.integrations.integration_utils._is_comet_installed", False)
    args = PreferenceConfig(str(tmp_path), **BASE | {"report_to": "comet_ml"})
    with pytest.raises(ConfigError, match=r"found comet_ml, which is not installed\n  do: pip install comet-ml>=3\.\d"):
        PreferenceTrainer(str(tiny_policy), args=args, train_dataset=PAIRS)


class Broken(TrainerCallback):
    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("a fault of the user's own code")


def test_a_fault_in_a_callback_is_not_called_a_setting(tiny_policy: Path, backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^a fault of the user's own code$"):
        PreferenceTrainer(
            str(tiny_policy), args=PreferenceConfig(str(tmp_path), **BASE), train_dataset=PAIRS, callbacks=[Broken()]
        )
    with pytest.raises(ValueError, match=r"^a fault of the user's own code$"):
        RewardTrainer(
            str(backbone), args=RewardConfig(str(tmp_path), **BASE), train_dataset=PAIRS, callbacks=[Broken()]
        )
