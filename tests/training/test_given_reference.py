"""``train.reference``: another model as the reference of the losses, with its own log-probs, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from align.config import LossSection, TrainSection
from align.config.run import RunConfig
from align.errors import ConfigError
from align.models.layout import choose_layout
from align.models.loading import load_policy
from align.models.logps import pair_logps
from align.run.checks import check_train
from align.run.pipeline import _Runner
from align.training.preference_config import PreferenceConfig
from align.training.train import CHECKPOINTS, make_trainer
from align.training.trainer import PreferenceTrainer
from tests.helpers.builders import causal, llama_config, rows, tokenizer, trained_adapter
from tests.training.test_settings import Stop
from tests.training.test_trainer import FIELDS

LORA = {"r": 4, "target_modules": "all-linear"}


def section(policy: Path, reference: Path | None, loss: str = "dpo", **options: Any) -> TrainSection:
    trainer = FIELDS | options.pop("trainer", {})
    return TrainSection(
        model=str(policy), reference=None if reference is None else str(reference), trainer=trainer,
        methods={"m": LossSection(loss=loss)}, **options,
    )  # fmt: skip


def made(config: TrainSection, output: Path) -> PreferenceTrainer:
    return make_trainer(Dataset.from_list(rows(8)), config, "m", output, seed=0, reference_cache=None)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return causal(tmp_path / "other", seed=7)


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "adapter"])
@pytest.mark.parametrize("precomputed", [True, False])
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_the_loss_is_that_of_the_two_models(
    kind: str, precomputed: bool, peft: Any, tiny_policy: Path, other: Path, tmp_path: Path
) -> None:
    """-log s(beta h), h from one forward pass of each model."""
    reference = other if kind == "model" else trained_adapter(tiny_policy, tmp_path / "adapter", seed=3)
    config = section(tiny_policy, reference, peft=peft, trainer={"precompute_ref_log_probs": precomputed})
    trainer = made(config, tmp_path / "out")
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(8)])
    ratios = []
    for folder in (tiny_policy, reference):
        model = load_policy(str(folder), dtype="float32").eval()
        choose_layout(model, batch, "concatenated")
        with torch.no_grad():
            logps = pair_logps(model, batch, "concatenated")
        ratios.append(logps.chosen - logps.rejected)
    expected = -torch.nn.functional.logsigmoid(trainer.loss.beta * (ratios[0] - ratios[1])).mean()
    assert abs(float(expected) - 0.6931) > 0.01
    found = trainer.compute_loss(trainer.model, batch)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_a_reference_that_follows_starts_as_the_given_one_and_resumes(
    tiny_policy: Path, other: Path, tmp_path: Path
) -> None:
    fields = {
        "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.25, "max_steps": 3,
        "precompute_ref_log_probs": False, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    config = section(tiny_policy, other, trainer=fields)
    whole = made(config, tmp_path / "whole")
    start = {name: value.clone() for name, value in whole.ref_model.state_dict().items()}
    for name, value in load_policy(str(other), dtype="float32").state_dict().items():
        assert torch.equal(value, start[name]), name
    whole.train()
    stopped = made(config, tmp_path / "stopped")
    stopped.add_callback(Stop(2))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert (tmp_path / "stopped" / CHECKPOINTS / "checkpoint-2").exists()
    resumed = made(config, tmp_path / "stopped")
    with resumed.trained("test"):
        pass
    for name, value in whole.ref_model.state_dict().items():
        assert torch.equal(value, resumed.ref_model.state_dict()[name]), name
    moved = sum(not torch.equal(value, start[name]) for name, value in whole.ref_model.state_dict().items())
    assert moved > 5


def test_a_reference_with_other_tokens_is_refused(tiny_policy: Path, other: Path, tmp_path: Path) -> None:
    names = tokenizer()
    vocabulary = names.get_vocab()
    swapped = {"good": vocabulary["bad"], "bad": vocabulary["good"]}
    text = (other / "tokenizer.json").read_text()
    for word, number in swapped.items():
        text = text.replace(f'"{word}": {vocabulary[word]}', f'"{word}": {number}')
    (other / "tokenizer.json").write_text(text)
    config = section(tiny_policy, other)
    with pytest.raises(ConfigError, match=r"2 of 21 tokens .* have another id there \('good' is 3 and 4, 'bad' is 4"):
        check_train(config, {"output_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match="2 of 21 tokens"):
        made(config, tmp_path / "out")


def test_a_reference_in_python_that_embeds_too_few_tokens(tiny_policy: Path, tmp_path: Path) -> None:
    small = LlamaForCausalLM(LlamaConfig(**{**llama_config().to_dict(), "vocab_size": 9}))
    args = PreferenceConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(ConfigError, match=r"ref_model: embeds 9 tokens, and the policy's tokenizer has 21"):
        PreferenceTrainer(str(tiny_policy), small, args, train_dataset=rows(4))


def test_a_reference_without_effect_is_refused(tiny_policy: Path, other: Path, tmp_path: Path) -> None:
    forced = {"output_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"which is train\.model: the model as it is before training"):
        check_train(section(tiny_policy, tiny_policy / ".." / tiny_policy.name), forced)
    with pytest.raises(ConfigError, match="no loss here reads a reference: simpo"):
        check_train(section(tiny_policy, other, "simpo"), forced)
    assert made(section(tiny_policy, other, "simpo"), tmp_path / "out").ref_model is None


def test_the_reference_is_part_of_the_key(tiny_policy: Path, other: Path, tmp_path: Path) -> None:
    def key(reference: Path | None) -> dict[str, Any]:
        train = section(tiny_policy, reference)
        config = RunConfig(name="r", output_dir=str(tmp_path), pairs={"path": "p.jsonl"}, train=train.model_dump())
        return _Runner(config, tmp_path)._inputs("train-m")

    without, first = key(None), key(other)
    assert "reference" not in without and "reference" not in without["settings"]
    assert first["settings"]["reference"] == str(other)
    causal(other, seed=8)
    assert key(other)["reference"] != first["reference"]
