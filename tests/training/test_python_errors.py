"""Wrong input of the Python API: the codes of the command line, the names of Python, told when the object is made."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from peft import LoraConfig
from transformers import HfArgumentParser, TrainingArguments
from trl import DPOConfig

from align import PreferenceConfig, PreferenceTrainer
from align.errors import AlignError, ConfigError, in_python
from tests.helpers.builders import rows
from tests.training.test_python_trainer import BASE, table

ROOT = Path(__file__).parents[2]
REACHED = ("align/training", "align/models/layout.py", "align/models/adapters.py", "align/models/positions.py")
"""What a trainer made in Python runs."""


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"loss": "dppo"}, "loss-name", "PreferenceConfig.loss: loss 'dppo' is not known (did you mean `dpo`?)"),
        ({"loss": "madpo", "loss_kwargs": {"tua": 1}}, "loss-parameter", "PreferenceConfig.loss_kwargs: parameters of madpo"),
        ({"loss": "madpo", "loss_kwargs": {"c_min": 3.0}}, "madpo-parameters", "PreferenceConfig.loss_kwargs: "),
        ({"loss_kwargs": {"beta": 0.2}, "beta": 0.3}, "loss-parameter", "found 0.3 there and 0.2 in loss_kwargs"),
        ({"loss": "madpo", "loss_type": "ipo"}, "loss-name", "PreferenceConfig.loss 'madpo', PreferenceConfig.loss_type"),
        ({"loss_type": "sigmoidal"}, "loss-terms", "sigmoidal: not a loss (did you mean `sigmoid`?)"),
        ({"loss_type": ["sigmoid", "dpo"]}, "loss-terms", "PreferenceConfig.loss_type: loss:"),
        ({"label_smoothing": 0.1}, "trainer-key", "PreferenceConfig.label_smoothing: 0.1 has no meaning for the loss dpo"),
        ({"ld_alpha": 0.5}, "trainer-key", "PreferenceConfig.ld_alpha: 0.5 has no meaning"),
        ({"padding_free": True}, "trainer-key", "PreferenceConfig.padding_free: True has no meaning"),
        ({"label_smoothing_factor": 0.1}, "trainer-key", "PreferenceConfig.label_smoothing_factor"),
        ({"layout": "packed"}, "trainer-key", "PreferenceConfig.layout: found 'packed', expected one of auto"),
        ({"max_tokens_per_device": 0}, "trainer-key", "PreferenceConfig.max_tokens_per_device: found 0"),
        ({"pairs_per_step": 6}, "trainer-key", "PreferenceConfig.pairs_per_step: found 6, expected a multiple of the 4"),
        ({"pairs_per_step": -4}, "trainer-key", "PreferenceConfig.pairs_per_step: found -4, expected a whole number"),
        ({"pairs_per_step": "8"}, "trainer-key", "PreferenceConfig.pairs_per_step: found '8', expected a whole number"),
        ({"loss_kwargs": "tau=1"}, "loss-parameter", "PreferenceConfig.loss_kwargs: found 'tau=1', expected a dict"),
        ({"beta": float("nan")}, "loss-parameter", "beta: found nan, expected a number above 0"),
        ({"pairs_per_step": 8, "gradient_accumulation_steps": 3}, "trainer-key", "and 2 follows from pairs_per_step"),
        ({"reference_cache": "c"}, "trainer-key", "set precompute_ref_log_probs=True"),
        ({"pair_weights": {"tilt": {"kind": "upp"}}}, "config-key", "PreferenceConfig.pair_weights"),
        ({"pair_weights": {"spraed": True}}, "config-key", "spraed: unknown key (did you mean `spread`?)"),
        ({"pair_weights": {"spread": True}}, "weights-loss", "PreferenceConfig.pair_weights: ood and spread shrink"),
        ({"gradient_remedy": {"kind": "hold"}}, "config-key", "PreferenceConfig.gradient_remedy"),
        ({"loss": "beta_dpo", "token_mask": {}}, "remedy-loss", "beta_dpo compares pairs or reads tokens"),
        ({"token_mask": {}, "gradient_remedy": {"kind": "normalise"}}, "remedy-loss", "found `remedy` and `token_mask`"),
    ],
)  # fmt: skip
def test_settings_are_refused_when_the_config_is_made(
    tmp_path: Path, fields: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(ConfigError) as found:
        PreferenceConfig(str(tmp_path), **(BASE | fields))
    assert found.value.code == code and words in str(found.value), found.value
    assert not re.search(r"train\.\w", str(found.value)), found.value


def refused(policy: Path, folder: Path, args: Any = None, **more: Any) -> AlignError:
    """The error of a trainer with these arguments."""
    arguments = {"train_dataset": table(4)} | more
    with pytest.raises(AlignError) as found:
        PreferenceTrainer(str(policy), None, args or PreferenceConfig(str(folder), **BASE), **arguments)
    assert not re.search(r"train\.\w", str(found.value)), found.value
    return found.value


def no_margin() -> list[dict[str, Any]]:
    pairs = rows(4)
    pairs[2] |= {"margin": None}
    return pairs


@pytest.mark.parametrize(
    ("fields", "more", "code", "words"),
    [
        ({"loss": "madpo"}, {}, "loss-needs-margin", "score the pairs first: reward_models.RewardModel.from"),
        ({"loss": "madpo"}, {"train_dataset": no_margin}, "loss-needs-margin", "1 of 4 pairs have none, the first 'p2'"),
        ({"loss": "madpo"}, {"train_dataset": lambda: table(4, "margin"), "eval_dataset": table}, "loss-needs-margin", "madpo"),
        ({}, {"train_dataset": lambda: None}, "data-type", "train_dataset: found nothing, expected a datasets.Dataset"),
        ({}, {"train_dataset": lambda: "pairs.jsonl"}, "data-type", 'datasets.load_dataset("json", data_files=...)'),
        ({}, {"train_dataset": lambda: DatasetDict(test=table(4))}, "data-type", "choose one: train_dataset['test']"),
        ({}, {"train_dataset": lambda: [1, 2]}, "data-type", "train_dataset: row 0 is a int"),
        ({}, {"train_dataset": lambda: []}, "data-empty", "train_dataset: found no rows"),
        ({"max_steps": -1}, {"train_dataset": lambda: table(4).to_iterable_dataset()}, "data-type", "max_steps -1"),
        ({}, {"train_dataset": lambda: table(4).remove_columns("rejected")}, "data-column", "expected also rejected"),
        ({}, {"eval_dataset": lambda: table(4).remove_columns("chosen")}, "data-column", "eval_dataset: found the columns"),
        ({}, {"train_dataset": lambda: table(4).add_column("weight", [1.0, -1.0, 1.0, 1.0])}, "pair-number", "row 1: found -1"),
        ({}, {"train_dataset": lambda: table(4).add_column("margin", list("abcd"))}, "data-column", "holds string"),
        ({}, {"train_dataset": lambda: table(4).add_column("images", [[1]] * 4)}, "data-column", "found images"),
        ({}, {"train_dataset": lambda: [*rows(2), rows(3)[2] | {"chosen": None}]}, "pair-missing", "chosen of row 2"),
        ({}, {"loss": lambda: "dppo"}, "loss-name", "loss: loss 'dppo' is not known"),
        ({"loss": "ipo"}, {"loss": lambda: "dpo"}, "loss-name", "found loss 'dpo', PreferenceConfig.loss 'ipo'"),
        ({}, {"loss": lambda: 3}, "loss-name", "loss: found 3, expected a name in align.LOSSES"),
        ({}, {"loss": lambda: lambda logps: logps.log_ratio_gap.mean()}, "loss-function", "returned a tensor [] of torch"),
        ({}, {"loss": lambda: lambda logps: logps.ref_chosen}, "loss-function", "does not depend on the policy's"),
        ({}, {"loss": lambda: lambda logps: logps.log_ratio_gap * float("nan")}, "loss-function", "expected finite losses"),
        ({}, {"loss": lambda: lambda logps: logps.chosen - logps.chosen.mean()}, "loss-function", "another loss if other"),
        ({}, {"loss": lambda: lambda logps, margin: logps.nothing}, "loss-function", "has no attribute 'nothing'"),
        ({}, {"data_collator": lambda: list}, "trainer-key", "data_collator: found type"),
        ({}, {"processing_class": object}, "trainer-key", "processing_class: found object"),
        ({}, {"peft_config": lambda: {"r": 4}}, "trainer-key", "peft_config: found dict, expected a peft.PeftConfig"),
        ({}, {"peft_config": lambda: LoraConfig(init_lora_weights="pissa")}, "adapter", "peft_config.init_lora_weights: 'pissa'"),
        ({}, {"peft_config": lambda: LoraConfig(bias="all", target_modules=["q_proj"])}, "adapter", "peft_config.bias: found 'all'"),
        ({"precompute_ref_log_probs": True, "token_mask": {}}, {}, "trainer-key", "PreferenceConfig.precompute_ref_log_probs"),
        ({"max_length": 2}, {}, "empty-completion", "raise PreferenceConfig.max_length"),
    ],
)  # fmt: skip
def test_what_a_trainer_refuses(
    tiny_policy: Path, tmp_path: Path, fields: dict[str, Any], more: dict[str, Callable[[], Any]], code: str, words: str
) -> None:
    args = PreferenceConfig(str(tmp_path), **(BASE | fields))
    error = refused(tiny_policy, tmp_path, args, **{name: value() for name, value in more.items()})
    assert error.code == code and words in str(error), error


def test_other_arguments(tiny_policy: Path, tmp_path: Path) -> None:
    error = refused(tiny_policy, tmp_path, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    assert "args: found TrainingArguments, expected align.PreferenceConfig" in str(error)
    error = refused(tiny_policy, tmp_path, DPOConfig(str(tmp_path), **BASE), loss="simpo")
    assert "args.beta: found 0.1, trl.DPOConfig's unless it is set; that of simpo is 2.0" in str(error)
    args = PreferenceConfig(str(tmp_path), **BASE)
    args.ld_alpha = 0.5  # changed afterwards
    assert "PreferenceConfig.ld_alpha: 0.5 has no meaning" in str(refused(tiny_policy, tmp_path, args))
    with pytest.raises(ConfigError, match="ref_model: found PreferenceConfig, expected a loaded model"):
        PreferenceTrainer(str(tiny_policy), args, train_dataset=table(4))
    with pytest.raises(ConfigError, match="model: found int, expected a folder"):
        PreferenceTrainer(3, args=PreferenceConfig(str(tmp_path), **BASE), train_dataset=table(4))


def test_a_checkpoint_without_its_optimizer_is_not_resumed(tiny_policy: Path, tmp_path: Path) -> None:
    fields = BASE | {"save_strategy": "steps", "save_steps": 1, "save_only_model": True, "max_steps": 1}
    args = PreferenceConfig(str(tmp_path), **fields)
    PreferenceTrainer(str(tiny_policy), args=args, train_dataset=table(4)).train()
    for choice in ("auto", True, str(tmp_path / "checkpoint-1")):
        with pytest.raises(ConfigError, match=r"checkpoint-1: holds no optimizer \(save_only_model\)"):
            PreferenceTrainer(str(tiny_policy), args=args, train_dataset=table(4)).train(choice)


def messages() -> list[str]:
    """Every text of the code that a trainer reaches and that names a place in a run file."""
    found = []
    for place in REACHED:
        for file in sorted((ROOT / place).rglob("*.py")) if (ROOT / place).is_dir() else [ROOT / place]:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "m" for part in node.values]
                    found.append("".join(str(part) for part in parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    names = r"\btrain\.(trainer|methods|peft|model|layout|max_|pairs_|entanglement|async)"
    return [text for text in found if re.search(names, text) and "\n" not in text]


def test_every_place_of_a_run_file_has_a_name_in_python() -> None:
    texts = [text for text in messages() if "\\." not in text]
    assert len(texts) > 25
    left = [text for text in texts if re.search(r"\btrain\.[a-z]", in_python(text))]
    assert left == []
    assert in_python("set `precompute_ref_log_probs: false`") == "set `precompute_ref_log_probs=False`"
    assert in_python("`train.model`; give --max-length") == "`model`; give max_length"
    assert in_python("train.methods.m.weights.tilt: x") == "PreferenceConfig.pair_weights.tilt: x"


def test_tensors_of_a_trial_are_those_of_a_pair() -> None:
    """A function sees float tensors [B] of log-probs, lengths and margins, one at a time too."""
    seen: list[tuple[int, ...]] = []

    def own(logps: Any, margin: torch.Tensor) -> torch.Tensor:
        seen.append((*logps.chosen.shape, *logps.rejected_length.shape, *margin.shape))
        return -logps.log_ratio_gap + margin

    from align.training.loss_choice import own_loss

    bound = own_loss(own, 0.1)
    assert bound.spec.name == "own" and bound.spec.needs_margin and seen == [(3, 3, 3), *[(1, 1, 1)] * 3]


@pytest.mark.parametrize(
    ("given", "loss"),
    [
        ([], "dpo"),
        (["--loss", "madpo"], "madpo"),
        (["--loss", '{"terms": {"dpo": 1.0, "nll": 0.5}}'], {"terms": {"dpo": 1.0, "nll": 0.5}}),
    ],
)
def test_a_script_reads_the_loss_from_its_command_line(given: list[str], loss: str | dict[str, Any]) -> None:
    """By transformers' parser, as trl's scripts do: a name, or JSON of a sum."""
    (found,) = HfArgumentParser(PreferenceConfig).parse_args_into_dataclasses(
        ["--output_dir", "out", "--use_cpu", *given]
    )
    assert found.loss == loss
