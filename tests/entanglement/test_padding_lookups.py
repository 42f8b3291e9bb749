"""Pairs that hold the padding token of a tied model are counted and named, because a step moves that row unforeseen."""

import logging
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from align.entanglement.padding_lookups import padding_row, report_padding_lookups

TOKENS = Dataset.from_dict({
    "prompt_ids": [[3, 0, 4], [3, 4], [5]], "chosen_ids": [[6], [7], [6, 7]], "rejected_ids": [[5], [0], [4]],
})  # fmt: skip


def model(**fields: Any) -> LlamaForCausalLM:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, **small, bos_token_id=1, eos_token_id=1, **fields)).double()


@pytest.mark.parametrize(
    ("fields", "row"),
    [
        ({"pad_token_id": 0, "tie_word_embeddings": True}, 0),
        ({"pad_token_id": 0, "tie_word_embeddings": False}, None),
        ({"pad_token_id": None, "tie_word_embeddings": True}, None),
    ],
)
def test_which_models_are_concerned(fields: dict[str, Any], row: int | None) -> None:
    """The row moves unforeseen where the derivative along a step is not gradient times step."""
    made = model(**fields)
    assert padding_row(made) == row
    ids, last = torch.tensor([[3, 0, 4, 6]]), 6

    def logp() -> torch.Tensor:
        return torch.log_softmax(made(ids).logits[0, 2], dim=-1)[last]

    made.zero_grad()
    logp().backward()
    weight = made.get_input_embeddings().weight
    assert weight.grad is not None
    gradient, ends = weight.grad[0].clone(), []
    direction = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype)
    with torch.no_grad():
        for sign in (1, -1):  # norms are computed in float32, so the step is not tiny
            weight[0] += sign * 1e-3 * direction
            ends.append(logp())
            weight[0] -= sign * 1e-3 * direction
    moved, foretold = (ends[0] - ends[1]) / 2e-3, gradient @ direction
    agrees = torch.allclose(moved, foretold, rtol=0.02, atol=1e-5)
    assert agrees is (fields["pad_token_id"] is None)  # else the look-ups of the row are missing in the gradient
    if row is None and fields["pad_token_id"] == 0:
        assert gradient.abs().max() == 0  # and no step moves it


def test_pairs_are_counted_and_told_once_each(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="align"):
        assert report_padding_lookups(model(pad_token_id=0, tie_word_embeddings=True), TOKENS) == 2
    assert "2 of 3 pairs hold token 0" in caplog.text


def test_an_adapter_beside_the_embedding_is_not_concerned(caplog: pytest.LogCaptureFixture) -> None:
    adapted = get_peft_model(model(pad_token_id=0, tie_word_embeddings=True), LoraConfig(target_modules=["q_proj"]))
    assert report_padding_lookups(adapted, TOKENS) == 0 and not caplog.text
