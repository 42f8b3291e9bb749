"""Code of a script's own: its faults stay what they are, and what it returns is checked in each step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from align import PairLogps, PreferenceConfig, PreferenceTrainer
from align.errors import ConfigError
from align.training.base.arguments import HOMES, refusals
from reward_models import RewardConfig, RewardTrainer
from reward_models.registry import own_objective
from tests.helpers.builders import llama_reward, rows
from tests.training.test_python_trainer import BASE, logged, table


def dpo(logps: PairLogps) -> Tensor:
    return -F.logsigmoid(0.1 * logps.log_ratio_gap)


def failing(*_: Any) -> Any:
    raise ValueError("a fault of the user's")


def trainer(policy: Path, folder: Path, **more: Any) -> PreferenceTrainer:
    given = {"train_dataset": table(8), **more}
    return PreferenceTrainer(str(policy), args=PreferenceConfig(str(folder), **BASE), **given)


def test_a_fault_of_the_user_s_code_is_not_a_setting(tiny_policy: Path, tmp_path: Path) -> None:
    """In a step it is raised as it is; where a function is tried first, it is the cause of the error."""
    loss: Callable[[PairLogps], Any] = lambda logps: dpo(logps) if len(logps.chosen) < 4 else failing()  # noqa: E731
    with pytest.raises(ValueError, match=r"^a fault of the user's$"):
        trainer(tiny_policy, tmp_path, loss=loss).train()
    with pytest.raises(ConfigError, match="loss: failing failed on three pairs: ValueError: a fault") as found:
        trainer(tiny_policy, tmp_path, loss=failing)
    assert str(found.value.__cause__) == "a fault of the user's"
    with pytest.raises(ValueError, match=r"^a fault of the user's$"):
        trainer(tiny_policy, tmp_path, compute_metrics=failing, eval_dataset=table(4)).evaluate()


@pytest.mark.parametrize(("module", "kind"), [("__main__", TypeError), ("trl.made_by_a_dataclass", ConfigError)])
def test_code_typed_at_a_prompt_is_the_user_s(module: str, kind: type[Exception]) -> None:
    """Code without a file is told by its module; the caller is code of this program."""
    typed: dict[str, Any] = {"__name__": module}
    exec(compile("def typed(): raise TypeError('mine')", "<stdin>", "exec"), typed)
    call = compile("with refusals('here'): typed()", str(HOMES[0] / "caller.py"), "exec")
    with pytest.raises(kind, match="mine"):
        exec(call, {"refusals": refusals, "typed": typed["typed"]})


@pytest.mark.parametrize(("shape", "words"), [((4, 1), r"\[4, 1\]"), ((), r"\[\]")])
def test_a_loss_of_another_shape_in_a_step(tiny_policy: Path, tmp_path: Path, shape: Any, words: str) -> None:
    """[B, 1] times the weights [B] would be [B, B], a wrong loss without a word."""

    def own(logps: PairLogps) -> Tensor:
        losses = dpo(logps)
        return losses if len(losses) < 4 else losses.reshape(shape) if shape else losses.mean()

    with pytest.raises(ConfigError, match=rf"own returned a tensor {words} .*float tensor \[4\] for 4 pairs") as found:
        trainer(tiny_policy, tmp_path, loss=own).train()
    assert found.value.code == "loss-function"


def test_a_module_as_a_loss(tiny_policy: Path, tmp_path: Path) -> None:
    """Its ``forward`` says whether it reads margins; weights of its own would stay as they are."""

    class Own(nn.Module):
        def forward(self, logps: PairLogps) -> Tensor:
            return dpo(logps)

    expected = logged(trainer(tiny_policy, tmp_path, loss="dpo"))
    found = logged(trainer(tiny_policy, tmp_path, loss=Own()))
    assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in expected], abs=1e-6)
    learns = Own()
    learns.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ConfigError, match="Own holds weights that no optimizer would train"):
        trainer(tiny_policy, tmp_path, loss=learns)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda chosen, rejected: (chosen - rejected) * float("nan"), r"returned \[nan, nan\]"),
        (lambda chosen, rejected: (chosen > rejected).long(), r"found a result \(2,\) of torch.int64"),
        (lambda chosen, rejected: torch.ones(2), "losses without a gradient"),
        (lambda chosen, rejected: None, "found a result NoneType for 2 pairs"),
    ],
)
def test_what_is_no_objective(function: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as found:
        own_objective(function, {})
    assert found.value.code == "objective-parameter"


def test_an_objective_of_another_shape_in_a_step(tmp_path: Path) -> None:
    def own(chosen: Tensor, rejected: Tensor) -> Tensor:
        losses = -F.logsigmoid(chosen - rejected)
        return losses if len(losses) < 3 else losses[:, None]

    args = RewardConfig(str(tmp_path / "out"), **BASE)
    made = RewardTrainer(str(llama_reward(tmp_path / "m")), args=args, train_dataset=table(8), objective=own)
    with pytest.raises(ConfigError, match=r"found a result \(4, 1\) of torch.float32 for 4 pairs"):
        made.train()


def test_an_objective_whose_pairs_depend_on_each_other_sees_all_of_them() -> None:
    assert not own_objective(lambda chosen, rejected: -F.logsigmoid(chosen - rejected), {}).spec.coupled
    assert own_objective(lambda chosen, rejected: (chosen - rejected) / chosen.std(), {}).spec.coupled
    assert own_objective(lambda chosen, rejected: rejected - chosen.mean(), {}).spec.coupled


def test_models_by_their_path_and_adapters_twice(tiny_policy: Path, tmp_path: Path) -> None:
    args = PreferenceConfig(str(tmp_path / "out"), **BASE)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    first = PreferenceTrainer(tiny_policy, args=args, train_dataset=table(4), peft_config=lora)
    first.save_model(str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match="peft_config: found one, and a model that is an adapter already"):
        PreferenceTrainer(tmp_path / "adapter", args=args, train_dataset=table(4), peft_config=lora)


def test_frames_that_are_no_table(tiny_policy: Path, tmp_path: Path) -> None:
    frame = pd.DataFrame(rows(4))
    for wrong, words in (
        (pd.concat([frame, frame[["chosen"]]], axis=1), "train_dataset: column 'chosen' is there twice"),
        (frame.assign(prompt=[1.5, "a", "b", "c"]), r"train_dataset:\(rows\): its rows do not fit one column"),
    ):
        with pytest.raises(Exception, match=words):
            trainer(tiny_policy, tmp_path, train_dataset=wrong)


def test_what_is_trained_otherwise_than_meant_is_said(
    tiny_policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights in 16 bits, and responses without a prompt column that have no common beginning."""
    args = PreferenceConfig(str(tmp_path), **BASE)
    PreferenceTrainer(str(tiny_policy), args=args, train_dataset=table(4))
    assert not [text for text in caplog.messages if "weights in" in text or "prompt" in text]
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype="bfloat16")
    PreferenceTrainer(model, args=args, train_dataset=table(4).remove_columns("prompt"))
    assert any("model: weights in bfloat16 are trained" in text for text in caplog.messages)
    assert any("prompt: found no such column, and the responses of" in text for text in caplog.messages)


def test_saved_arguments_hold_no_token(tiny_policy: Path, tmp_path: Path) -> None:
    """training_args.bin is a pickle of the arguments, which transformers uploads."""
    token = "hf_" + "a" * 20
    made = PreferenceTrainer(
        str(tiny_policy), args=PreferenceConfig(str(tmp_path), hub_token=token, **BASE), train_dataset=table(4)
    )
    made.save_model()
    assert token.encode() not in (tmp_path / "training_args.bin").read_bytes() and made.args.hub_token == token
