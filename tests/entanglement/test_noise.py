"""No verdict of a pair rests on the rounding of its gradient products, in any dtype."""

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from align.entanglement.conditions import NOISE, changes, products_noise
from align.entanglement.measure_pairs import measure_entanglement
from align.entanglement.products import GradientProducts
from tests.helpers.builders import llama_config, rows, tokenizer
from tests.models.test_logps import make_batch, tiny

BATCH = make_batch([(6, 5, 8), (1, 3, 2), (12, 4, 4), (3, 1, 9)], same_start=2)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_a_change_of_zero_has_no_sign(family: str, dtype: torch.dtype) -> None:
    """Weights under which a step of the same weights in float64 would not move a response at all."""
    model = tiny(family).to(dtype)
    found, true = GradientProducts(model)(BATCH), GradientProducts(copy.deepcopy(model).double())(BATCH)
    one = torch.ones_like(true.inner)
    size = (true.chosen_sq * true.rejected_sq).sqrt()
    noise = products_noise(model)
    assert noise == NOISE[dtype]
    for value, exact, scale in (
        (found.chosen_sq, true.chosen_sq, true.chosen_sq),
        (found.rejected_sq, true.rejected_sq, true.rejected_sq),
        (found.inner, true.inner, size),
    ):
        assert ((value - exact).abs() <= noise * scale).all()
    squares = (found.chosen_sq, found.rejected_sq, found.inner)
    still_chosen = changes(*squares, true.inner / true.chosen_sq, one, noise=noise)
    still_rejected = changes(*squares, one, true.inner / true.rejected_sq, noise=noise)
    assert set(still_chosen.verdicts()) == set(still_rejected.verdicts()) == {"undecided"}
    clear = changes(*squares, one, -one, noise=noise)  # both responses rise by |gw|^2 + <gw, gl> and |gl|^2 + <gw, gl>
    assert "undecided" not in clear.verdicts()


def test_what_is_not_a_number_has_no_sign() -> None:
    one, nan = torch.ones(1, dtype=torch.float64), torch.full((1,), torch.nan, dtype=torch.float64)
    for squares in ((nan, one, 0 * one), (one, nan, 0 * one), (one, one, nan)):
        assert changes(*squares, one, one, noise=NOISE[torch.float32]).verdicts() == ["undecided"]


def test_the_least_precise_part_counts() -> None:
    model: Any = LlamaForCausalLM(llama_config()).double()
    assert products_noise(model) == NOISE[torch.float64]
    model.lm_head.to(torch.bfloat16)
    assert products_noise(model) == NOISE[torch.bfloat16]
    quantized: Any = LlamaForCausalLM(llama_config())
    quantized.is_quantized = True
    assert products_noise(quantized) == NOISE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verdicts_of_a_table_know_the_dtype(dtype: torch.dtype) -> None:
    """Responses of 16 words of which one differs: a step moves them by little more than bf16's rounding, or less."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).to(dtype).eval()
    shared = " " + " ".join(["film is fine and slow"] * 3)
    table = [row | {"chosen": f"{shared} good", "rejected": f"{shared} bad"} for row in rows(6)]
    found = measure_entanglement(model, tokenizer(), Dataset.from_list(table))
    undecided = 0
    for row in found:
        size = (row["chosen_sq"] * row["rejected_sq"]) ** 0.5
        bound_chosen = NOISE[dtype] * (row["d_w"] * row["chosen_sq"] + row["d_l"] * size)
        bound_rejected = NOISE[dtype] * (row["d_w"] * size + row["d_l"] * row["rejected_sq"])
        within = abs(row["step_chosen"]) <= bound_chosen or abs(row["step_rejected"]) <= bound_rejected
        assert (row["verdict"] == "undecided") == within
        undecided += within
    assert (undecided > 0) == (dtype == torch.bfloat16)
