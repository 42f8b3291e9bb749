"""Every kind of adapter that peft has: trained in Python it is one policy everywhere, or refused when it is made."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from align import PreferenceConfig, PreferenceTrainer
from align.errors import AlignError, ConfigError
from align.models.loading import load_merged_policy, load_policy, load_tokenizer
from tests.helpers.builders import make_base, rows
from tests.training.test_adapters import CLOSE, completions, difference, plain, scored

TASK = {"task_type": "CAUSAL_LM"}
LAYERS = TASK | {"target_modules": ["q_proj", "v_proj"]}
VIRTUAL = TASK | {"num_virtual_tokens": 3}
FIELDS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": VIRTUAL,
    "PREFIX_TUNING": VIRTUAL,
    "CARTRIDGE": VIRTUAL,
    "P_TUNING": VIRTUAL | {"encoder_hidden_size": 8},
    "MULTITASK_PROMPT_TUNING": VIRTUAL | {"num_tasks": 2},
    "CPT": TASK | {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "ADAPTION_PROMPT": TASK | {"adapter_len": 2, "adapter_layers": 1},
    "ADALORA": LAYERS | {"total_step": 10, "init_r": 4, "target_r": 2},
    "LN_TUNING": TASK | {"target_modules": ["input_layernorm"]},
    "IA3": TASK | {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "VERA": TASK | {"target_modules": ["q_proj"], "r": 4},
    "PVERA": TASK | {"target_modules": ["q_proj"], "r": 4},
    "OFT": LAYERS | {"r": 4, "oft_block_size": 0},
    "BOFT": LAYERS | {"boft_block_size": 4},
    "VBLORA": LAYERS | {"r": 2, "vector_length": 8, "num_vectors": 10},
    "FOURIERFT": LAYERS | {"n_frequency": 20},
    "WAVEFT": LAYERS | {"n_frequency": 20},
    "TRAINABLE_TOKENS": TASK | {"token_indices": [4, 5, 9]},
    "C3A": LAYERS | {"block_size": 4},
    "ROAD": LAYERS | {"group_size": 8},
    "XLORA": TASK | {"hidden_size": 16, "adapters": {}},
} | {kind: LAYERS | {"r": 4} for kind in ("MISS", "PSOFT", "RANDLORA", "SHIRA", "HRA", "LORA")}
REFUSED = {"ADAPTION_PROMPT", "MULTITASK_PROMPT_TUNING", "POLY", "SHADOW", "XLORA"}
DRAWN = {"CARTRIDGE", "CPT", "C3A", "FOURIERFT", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "UNILORA", "VBLORA"}
"""Kinds whose start is not their reference."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_base(tmp_path_factory.mktemp("base"), tied=False))


def trainer(base: str, config: PeftConfig, folder: Path) -> PreferenceTrainer:
    """A trainer of two large steps."""
    args = PreferenceConfig(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, max_length=64,
        bf16=False, gradient_checkpointing=False, report_to="none", beta=1.0, save_strategy="no", disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    pairs = Dataset.from_list(rows(8))
    return PreferenceTrainer(
        base, args=args, train_dataset=pairs, processing_class=load_tokenizer(base), peft_config=config
    )


def made(kind: str) -> PeftConfig:
    """A configuration of this kind with the small fields above, or with two layers named where it takes them."""
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    if kind in FIELDS:
        return cls(**FIELDS[kind])
    try:
        return cls(**LAYERS)
    except TypeError:
        return cls(**TASK)


@pytest.mark.parametrize("kind", sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
def test_a_kind_of_adapter_is_one_policy_or_refused(
    kind: str, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if kind in REFUSED:
        with pytest.raises(AlignError):
            trainer(base, made(kind), tmp_path)
        return
    first = plain(load_policy(base, dtype="float32"))
    with caplog.at_level(logging.WARNING):
        training = trainer(base, made(kind), tmp_path)
    start = difference(plain(training.model), first)
    told = "nats a token away from its reference" in caplog.text
    assert told == (start > 1e-3) == (kind in DRAWN)
    training.train()
    trained = plain(training.model)
    assert difference(trained, first) > 1e-3
    assert difference(scored(training.model, training.layout), completions(trained)) < CLOSE
    training.save_model(str(tmp_path / "model"))
    assert difference(plain(load_policy(str(tmp_path / "model"), dtype="float32")), trained) < CLOSE
    sampled = load_merged_policy(str(tmp_path / "model"), dtype="float32")
    assert difference(plain(sampled), trained) < 10 * CLOSE


def test_the_message_of_a_refused_kind_names_it(base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"peft_config: an adapter of the kind POLY: .*task_ids") as error:
        trainer(base, made("POLY"), tmp_path)
    assert error.value.code == "adapter"


def test_the_start_is_told_in_nats(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An adapter with random weights from the beginning; dropout adds nothing to its distance."""
    torch.manual_seed(0)
    config = LoraConfig(**LAYERS, r=4, init_lora_weights=False, lora_dropout=0.9)
    with caplog.at_level(logging.WARNING):
        training = trainer(base, config, tmp_path)
    ids = torch.randint(training.model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    model = training.model.eval()
    with torch.no_grad():
        start = model(input_ids=ids).logits.log_softmax(dim=-1)
        with model.disable_adapter():
            reference = model(input_ids=ids).logits.log_softmax(dim=-1)
    assert f"starts {float((start - reference).abs().max()):.2g} nats a token away" in caplog.text
