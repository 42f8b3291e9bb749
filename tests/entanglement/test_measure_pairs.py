"""``measure_entanglement`` on an in-memory table, against two autograd backward passes per pair."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.entanglement.measure import MeasureJob
from align.entanglement.measure_pairs import measure_entanglement
from align.entanglement.summary import advice, summarize
from align.errors import ConfigError, DataError
from align.losses.registry import resolve
from align.models.loading import load_policy
from align.models.tokenization import tokenize_pairs
from align.stats import share_interval
from tests.helpers.builders import rows, trained_adapter

BETA = 0.1


def loaded(policy: Path) -> tuple[nn.Module, Any]:
    return AutoModelForCausalLM.from_pretrained(policy, dtype="float32").eval(), AutoTokenizer.from_pretrained(policy)


def logp(model: nn.Module, tokenizer: Any, prompt: str, response: str) -> tuple[Tensor, int]:
    """Log-prob of a response and its end-of-sequence token by a plain forward pass, and their number."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]])
    logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logps[start - 1 :].sum(), ids.shape[1] - start


def gradient(model: nn.Module, value: Tensor) -> Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([g.flatten().double() for g in torch.autograd.grad(value, trained)])


@pytest.mark.parametrize("adapter", [False, True])
def test_against_two_backward_passes(adapter: bool, tiny_policy: Path, tmp_path: Path) -> None:
    """Products, log-probs, the weights and the step of DPO; the reference of an adapter is the model without it."""
    folder = trained_adapter(tiny_policy, tmp_path / "adapter", 1) if adapter else tiny_policy
    model = load_policy(str(folder), trainable=True, dtype="float32").eval()
    base, tokenizer = loaded(tiny_policy)
    table = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows(7)]
    found = measure_entanglement(model, tokenizer, Dataset.from_list(table))
    assert found["id"] == [str(k) for k in range(7)]
    for row, pair in zip(found, table, strict=True):
        both = [logp(model, tokenizer, pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
        gw, gl = (gradient(model, value) for value, _ in both)
        for name, expected in (("chosen_sq", gw @ gw), ("rejected_sq", gl @ gl), ("inner", gw @ gl)):
            assert row[name] == pytest.approx(float(expected), rel=1e-4, abs=1e-4 * float(gw.norm() * gl.norm())), name
        assert row["cosine"] == pytest.approx(float(gw @ gl / (gw.norm() * gl.norm())), abs=1e-4)
        assert row["norm_ratio"] == pytest.approx(float(gl.norm() / gw.norm()), rel=1e-4)
        assert (row["tokens_chosen"], row["tokens_rejected"]) == tuple(count for _, count in both)
        change = []
        for side, (value, _) in zip(("chosen", "rejected"), both, strict=True):
            assert row[f"logp_{side}"] == pytest.approx(value.item(), abs=1e-3)
            change.append((value - logp(base, tokenizer, pair["prompt"], pair[side])[0]).item())
            assert row[f"logp_{side}_change"] == pytest.approx(change[-1], abs=1e-3)
        assert not adapter or abs(change[0] - change[1]) > 1e-2
        d = BETA / (1 + torch.tensor(BETA * (change[0] - change[1])).exp().item())  # -d/dh of -log sigmoid(beta h)
        assert row["d_w"] == pytest.approx(d, rel=1e-3) and row["d_l"] == pytest.approx(d, rel=1e-3)
        step = d * gw - d * gl
        size = float(gw.norm() * gl.norm())
        assert row["step_chosen"] == pytest.approx(float(gw @ step), rel=1e-2, abs=1e-4 * size)
        assert row["step_rejected"] == pytest.approx(float(gl @ step), rel=1e-2, abs=1e-4 * size)
        expected = {(True, False): "separated", (True, True): "both rise", (False, False): "both fall"}
        assert row["verdict"] == expected[float(gw @ step) > 0, float(gl @ step) > 0]
        assert row["entangled"] == (row["verdict"] != "separated")


def test_the_model_stays_as_it_is(tiny_policy: Path) -> None:
    """Weights, accumulated gradients, which parameters train, and the mode."""
    model, tokenizer = loaded(tiny_policy)
    model.train()
    model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()
    model.get_input_embeddings().weight.requires_grad_(False)
    state = [
        (p.detach().clone(), None if p.grad is None else p.grad.clone(), p.requires_grad) for p in model.parameters()
    ]
    measure_entanglement(model, tokenizer, Dataset.from_list(rows(3)), max_length=32)
    assert model.training
    for parameter, (value, grad, trains) in zip(model.parameters(), state, strict=True):
        assert torch.equal(parameter, value) and parameter.requires_grad == trains
        assert parameter.grad is grad is None or torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("loss", ["madpo", "ipo"])
def test_the_job_of_the_command_measures_the_same(loss: str, tiny_policy: Path) -> None:
    model, tokenizer = loaded(tiny_policy)
    pairs = Dataset.from_list(rows(6))
    job = MeasureJob(str(tiny_policy), None, resolve(loss, {}), None, batch_tokens=2048, max_length=1024)
    expected = job.start()(tokenize_pairs(pairs, tokenizer))
    found = measure_entanglement(model, tokenizer, pairs, loss=loss)
    assert found.to_list() == expected.to_list() and found["margin"] == pairs["margin"]
    assert measure_entanglement(model, tokenizer, pairs, loss=resolve(loss, {})).to_list() == found.to_list()


def test_a_tokenizer_without_a_padding_token(tiny_policy: Path) -> None:
    """The padding mask hides whatever pads."""
    model, tokenizer = loaded(tiny_policy)
    pairs = Dataset.from_list(rows(4))
    expected = measure_entanglement(model, tokenizer, pairs).to_list()
    tokenizer.pad_token = None
    assert measure_entanglement(model, tokenizer, pairs).to_list() == expected


def test_what_cannot_be_measured_is_refused(tiny_policy: Path) -> None:
    model, tokenizer = loaded(tiny_policy)
    table = [{name: row[name] for name in ("id", "prompt", "chosen", "rejected")} for row in rows(3)]
    with pytest.raises(ConfigError, match=r"entanglement-loss.*loss beta_dpo: compares the pairs of a step"):
        measure_entanglement(model, tokenizer, Dataset.from_list(table), loss="beta_dpo")
    with pytest.raises(DataError, match=r"loss-needs-margin.*`margin` of every pair, found 3 of 3 without one"):
        measure_entanglement(model, tokenizer, Dataset.from_list(table), loss="madpo")
    some = [row | {"margin": margin} for row, margin in zip(table, (0.5, None, 1.0), strict=True)]
    with pytest.raises(DataError, match="found 1 of 3 without one"):
        measure_entanglement(model, tokenizer, Dataset.from_list(some), loss="madpo")
    with pytest.raises(DataError, match="no token of a response is left within 3 tokens"):
        measure_entanglement(model, tokenizer, Dataset.from_list(table), max_length=3)


def test_a_model_that_is_its_own_reference_has_not_changed(tiny_policy: Path) -> None:
    """No noise of a second forward pass, so no correlation with it."""
    found = measure_entanglement(*loaded(tiny_policy), Dataset.from_list(rows(6)))
    assert set(found["logp_chosen_change"]) == set(found["logp_rejected_change"]) == {0.0}
    assert summarize(found)["cosine_against"]["logp_chosen_change"] is None


def test_few_pairs_do_not_show_that_entanglement_is_rare() -> None:
    few, many = (
        {"entangled": share_interval(np.zeros(n)).to_dict(), "chosen_falls": share_interval(np.zeros(n)).to_dict(),
         "norm_ratio": {"median": 1.0}}
        for n in (16, 400)
    )  # fmt: skip
    assert "16 pairs show only that at most 19%" in advice(few, "dpo")["headline"]
    assert "separates the responses of nearly every pair" in advice(many, "dpo")["headline"]
