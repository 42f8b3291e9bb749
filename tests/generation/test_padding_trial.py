"""Models that do not ignore padding are found at the first padded batch, and complete their prompts one at a time."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from align.generation.transformers_engine import PADDING_TOLERANCE, TransformersEngine
from align.generation.types import Sampling
from tests.helpers.builders import llama_config, tokenizer

PROMPTS = ["the film is", "a very bad plot was not good at all", "good", "the the the the"]
SMALL = {
    "vocab_size": len(tokenizer()), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip


def family(name: str, **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**SMALL | more))
    return made


def minimax() -> PreTrainedModel:
    """Its first layer is lightning attention, whose state decays with every token, padding included."""
    return family(
        "MiniMax", intermediate_size=32, num_key_value_heads=4, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["linear_attention", "full_attention"], block_size=8,
    )  # fmt: skip


def test_a_model_whose_batches_differ_from_its_rows_completes_one_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    model, sampling = minimax(), Sampling(8, n=2, seed=1)
    single = TransformersEngine(model, tokenizer(), batch_size=1)
    together = TransformersEngine(model, tokenizer(), batch_size=8)
    assert together.padding_difference() > 100 * PADDING_TOLERANCE[torch.float32]
    with caplog.at_level("WARNING"):
        assert together.generate(PROMPTS, sampling) == single.generate(PROMPTS, sampling)
    assert caplog.text.count("MiniMaxForCausalLM: in a trial its log-probs in a padded batch differ") == 1
    assert len(together._sample([[5, 6, 7]] * 3, [1, 2, 3], sampling)) == 3  # rows of one length need no padding


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Mamba"])
def test_models_that_ignore_padding_keep_their_batches(name: str, caplog: pytest.LogCaptureFixture) -> None:
    if name == "Llama":
        model: PreTrainedModel = LlamaForCausalLM(llama_config())
    else:
        model = family(name, intermediate_size=64)
    made = TransformersEngine(model, tokenizer(), batch_size=8)
    assert made.padding_difference() < PADDING_TOLERANCE[torch.float32]
    sizes = []
    sample = made._sample
    made._sample = lambda rows, *more: (sizes.append(len(rows)), sample(rows, *more))[1]  # type: ignore[method-assign]
    with caplog.at_level("WARNING"):
        made.generate(PROMPTS, Sampling(2))
    assert sizes == [4] and "trial" not in caplog.text
