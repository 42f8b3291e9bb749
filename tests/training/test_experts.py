"""The load-balancing loss of mixtures of experts: trl's in both layouts, weighed by the pairs of a micro-batch."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from align.errors import ConfigError
from align.models.expert_balance import balance_loss, check_balanced
from align.training.trainer import PreferenceTrainer
from tests.helpers.builders import rows, tokenizer
from tests.training.test_trainer import compare_with_trl, ours

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.5, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def experts(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny mixture of experts whose balance matters."""
    words = tokenizer()
    torch.manual_seed(0)
    if request.param == "mixtral":
        model: torch.nn.Module = MixtralForCausalLM(MixtralConfig(vocab_size=len(words), num_local_experts=4, **SIZES))
    else:
        more = {"moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(words), **more, **SIZES))
    model.save_pretrained(tmp_path / "moe")
    words.save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


@pytest.mark.parametrize("layout", ["concatenated", "shared_prefix"])
def test_equal_to_trl_step_by_step(layout: str, experts: Path, tmp_path: Path) -> None:
    compare_with_trl(experts, tmp_path, "dpo", "sigmoid", rows(16), layout=layout, max_steps=2)  # type: ignore[arg-type]


def test_the_coefficient_decides_and_the_loss_is_logged(experts: Path, tmp_path: Path) -> None:
    def first(coefficient: float, **fields: int) -> tuple[float, float | None]:
        name = f"{coefficient}{fields}"
        trainer = ours(experts, tmp_path / name, pairs=Dataset.from_list(rows(8)), max_steps=1,
                       router_aux_loss_coef=coefficient, **fields)  # fmt: skip
        trainer.train()
        entry = trainer.state.log_history[0]
        return float(entry["loss"]), entry.get("aux_loss")

    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    plain, none = first(0.0, **whole)
    loss, balance = first(0.5, **whole)
    assert none is None and balance is not None
    assert float(balance) >= 2 - 1e-3  # the smallest value is the number of experts that a token takes
    assert loss == pytest.approx(plain + 0.5 * float(balance), abs=1e-4)
    split, mean = first(0.5, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert mean is not None and split == pytest.approx(plain + 0.5 * float(mean), abs=2e-4)


def test_equal_use_of_all_experts_gives_the_smallest_loss() -> None:
    """Two experts, one taken, each by half of the tokens with certainty: 2 * (1/2 * 1/2 + 1/2 * 1/2) = 1."""
    config = MixtralConfig(num_local_experts=2, num_experts_per_tok=1)
    logits = torch.tensor([[50.0, -50.0], [-50.0, 50.0]])
    mask = torch.ones(2, 2, dtype=torch.long)
    both = torch.tensor([[0, 1], [1, 0]])
    assert float(balance_loss((logits,), config, mask, both)) == pytest.approx(1.0)
    one = torch.zeros(2, 2, dtype=torch.long)
    assert float(balance_loss((logits,), config, mask, one)) == pytest.approx(2.0)


def test_a_config_without_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef: found 0\.1, and PreTrainedConfig does not say"):
        check_balanced(PreTrainedConfig(), 0.1)


def test_other_models_have_no_experts_to_balance(tiny_policy: Path, tmp_path: Path) -> None:
    trainer: PreferenceTrainer = ours(tiny_policy, tmp_path)
    assert not trainer.aux_loss_enabled
