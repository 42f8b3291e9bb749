"""Screening scores against plain loops over single sequences."""

import pytest
import torch

from align.entanglement.screening import screening_scores
from tests.models.test_logps import make_batch, tiny

LENGTHS = [(6, 5, 8), (1, 3, 2), (12, 4, 4), (3, 1, 9)]


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen3"])
def test_against_loops_over_single_sequences(family: str) -> None:
    """Sums from the last prompt token to the last but one of the response; padding and batching change nothing."""
    model, batch = tiny(family), make_batch(LENGTHS, same_start=1)
    found = screening_scores(model, batch)
    for k, (prompt, *lengths) in enumerate(LENGTHS):
        sums = []
        for side, length in enumerate(lengths):
            ids = batch["input_ids"][k + side * len(LENGTHS), : prompt + length][None]
            states = model(ids, output_hidden_states=True).hidden_states[-1][0]
            sums.append(sum(states[place] for place in range(prompt - 1, prompt + length - 1)))
        inner, square = float(sums[0] @ sums[1]), float(sums[0] @ sums[0])
        assert float(found.ches[k]) == pytest.approx(inner - square, rel=1e-5, abs=1e-5)
        normalized = inner / (lengths[0] * lengths[1]) - square / lengths[0] ** 2
        assert float(found.ches_normalised[k]) == pytest.approx(normalized, rel=1e-5, abs=1e-5)
        assert float(found.hidden_cosine[k]) == pytest.approx(inner / (square**0.5 * float(sums[1].norm())), rel=1e-5)


def test_equal_responses_score_zero() -> None:
    batch = make_batch([(5, 4, 4)], same_start=4)
    found = screening_scores(tiny("Llama"), batch)
    assert torch.allclose(found.ches, torch.zeros(1, dtype=torch.float64), atol=1e-9)
    assert float(found.hidden_cosine) == pytest.approx(1.0)
