"""KL of sampled completions against enumeration, in float64: with cuts, at temperatures, for adapters, in chunks."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation import MinPLogitsWarper

from align.models import lm_head, truncation
from align.models.sample_kl import SampleScores, score_samples
from align.models.truncation import Truncation, sampled_logps

WORDS = 5
PROMPT = [3, 1]
CUTS = [
    Truncation(), Truncation(top_p=0.8), Truncation(top_k=3), Truncation(min_p=0.2), Truncation(0.9, 4, 0.05),
]  # fmt: skip


def model(seed: int, vocabulary: int = WORDS) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = LlamaForCausalLM(config).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made.eval()


POLICY, REFERENCE = model(0), model(1)


def scores(
    completions: list[list[int]], policy: nn.Module = POLICY, reference: nn.Module = REFERENCE,
    temperature: float = 1.0, cuts: Truncation | None = None,
) -> SampleScores:  # fmt: skip
    prompts = [PROMPT] * len(completions)
    return score_samples(
        policy, reference, prompts, completions, batch_tokens=64, pad_token_id=0, temperature=temperature,
        truncation=cuts,
    )  # fmt: skip


def next_logps(of: nn.Module, ids: list[int], temperature: float = 1.0, cuts: Truncation | None = None) -> Tensor:
    """Log-probs [V] of the token after ``ids``, by transformers' own warpers in the order of ``Truncation``."""
    with torch.no_grad():
        logits = of(input_ids=torch.tensor([ids])).logits[:, -1].double() / temperature
    cuts = cuts or Truncation()
    none = torch.zeros(1, 1, dtype=torch.long)
    if cuts.min_p:
        logits = MinPLogitsWarper(cuts.min_p)(none, logits)
    if cuts.top_k:
        logits = TopKLogitsWarper(cuts.top_k)(none, logits)
    if cuts.top_p < 1:
        logits = TopPLogitsWarper(cuts.top_p)(none, logits)
    return logits.log_softmax(dim=-1)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("cuts", CUTS)
def test_both_estimates_average_to_the_enumerated_divergence(temperature: float, cuts: Truncation) -> None:
    """Over all completions of two tokens, weighted by the policy as it is sampled."""
    divergence = 0.0
    for first, second in product(range(WORDS), repeat=2):
        policy = [next_logps(POLICY, ids, temperature, cuts) for ids in (PROMPT, [*PROMPT, first])]
        reference = [next_logps(REFERENCE, ids) for ids in (PROMPT, [*PROMPT, first])]
        logp = float(policy[0][first] + policy[1][second])
        if logp > -np.inf:
            divergence += np.exp(logp) * (logp - float(reference[0][first] + reference[1][second]))
    every = [list(tokens) for tokens in product(range(WORDS), repeat=2)]
    allowed = [
        tokens for tokens in every
        if next_logps(POLICY, PROMPT, temperature, cuts)[tokens[0]] > -np.inf
        and next_logps(POLICY, [*PROMPT, tokens[0]], temperature, cuts)[tokens[1]] > -np.inf
    ]  # fmt: skip
    found = scores(allowed, temperature=temperature, cuts=cuts)
    weight = np.exp(found.logp_policy)
    assert weight.sum() == pytest.approx(1, rel=1e-9)
    assert (weight * found.kl).sum() == pytest.approx(divergence, rel=1e-9)
    assert (weight * found.log_ratios).sum() == pytest.approx(divergence, rel=1e-9)
    assert divergence > 0.05 and (found.kl >= 0).all() and found.kl.std() < found.log_ratios.std()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, WORDS - 1), max_size=4), min_size=1, max_size=4), st.sampled_from(CUTS),
       st.floats(0.3, 3.0))  # fmt: skip
def test_it_is_never_negative_and_zero_for_equal_models(
    completions: list[list[int]], cuts: Truncation, temperature: float
) -> None:
    """Also for responses that could not have been sampled."""
    found = scores(completions, temperature=temperature, cuts=cuts)
    assert (found.kl >= 0).all() and np.isfinite(found).all()
    for other in (POLICY, model(0)):
        same = scores(completions, reference=other)
        assert same.kl.tolist() == same.log_ratios.tolist() == [0.0] * len(completions)
    assert [value for value, ids in zip(found.kl, completions, strict=True) if not ids] == [0.0] * completions.count([])


def test_the_one_sample_estimate_agrees_and_is_noisier() -> None:
    """Over 400 sampled completions of six tokens."""
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = POLICY.generate(
            torch.tensor([PROMPT] * 400), do_sample=True, max_new_tokens=6, eos_token_id=None, pad_token_id=0,
            top_k=0, temperature=1.0, top_p=1.0,
        )[:, 2:]  # fmt: skip
    found = scores(drawn.tolist())
    apart = found.log_ratios - found.kl
    assert abs(apart.mean()) < 4 * apart.std() / 20
    assert found.kl.std() < 0.5 * found.log_ratios.std()


def test_greedy_completions_are_a_point_mass() -> None:
    ids = list(PROMPT)
    for _ in range(3):
        ids.append(int(next_logps(POLICY, ids).argmax()))
    found = scores([ids[2:]], temperature=0)
    logps = [float(next_logps(REFERENCE, ids[:k])[ids[k]]) for k in range(2, 5)]
    assert found.kl[0] == pytest.approx(-sum(logps), rel=1e-9) == found.log_ratios[0] and found.logp_policy[0] == 0


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_adapters_and_chunks_and_a_padded_vocabulary(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy is an adapter on another copy of the weights; rows that pad one vocabulary are left out."""
    monkeypatch.setitem(lm_head.CHUNK_LOGITS, "cpu", WORDS * 2)
    options = (
        LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
        if adapter == "lora"
        else PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    torch.manual_seed(2)
    policy = get_peft_model(model(0), options).double().eval()
    completions = [[4, 2, 1], [0], []]
    found = scores(completions, policy=policy)
    for k, completion in enumerate(completions):
        expected = 0.0
        for length in range(len(completion)):
            p, q = (next_logps(one, [*PROMPT, *completion[:length]]) for one in (policy, REFERENCE))
            expected += float((p.exp() * (p - q)).sum())
        assert found.kl[k] == pytest.approx(expected, rel=1e-9)
    wide = model(1, WORDS + 3)
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            rows = REFERENCE.get_parameter(name)
            parameter[: len(rows)] = rows
    assert scores(completions, reference=wide).kl == pytest.approx(scores(completions).kl, rel=1e-9)


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("slack", [-1e-2, 1e-2])
def test_a_nucleus_is_the_same_without_a_sort_of_all_scores(
    spread: float, slack: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flat rows, whose nucleus is larger than what is looked at first, and steep ones, in one batch and apart."""
    torch.manual_seed(0)
    scores = torch.cat([torch.randn(3, 400, dtype=torch.float64) * spread, torch.zeros(1, 400, dtype=torch.float64)])
    for cuts in (Truncation(0.9), Truncation(0.5, 40, 0.01), Truncation(0.999)):
        for rows in (scores, scores[:3]):
            whole = cuts.floor(rows, slack)
            monkeypatch.setattr(truncation, "NUCLEUS_TOKENS", 60)
            assert torch.equal(cuts.floor(rows, slack), whole)
            monkeypatch.undo()


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=9), st.sampled_from(CUTS), st.floats(0.0, 0.2))
def test_the_slack_of_a_cut_holds_every_smaller_change(values: list[float], cuts: Truncation, slack: float) -> None:
    """A token above the floor with slack stays if scores move by half of it; one below the floor without stays out."""
    scores = torch.tensor([values], dtype=torch.float64)
    surely = scores >= cuts.floor(scores, slack + 1e-9)
    never = scores < cuts.floor(scores, -slack - 1e-9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        moved = scores + (torch.rand(scores.shape, generator=generator, dtype=torch.float64) - 0.5) * slack
        kept = moved >= cuts.floor(moved)
        assert bool(kept[surely].all()) and not bool(kept[never].any()) and bool(kept.any())
    assert float(sampled_logps(scores, cuts, scores.argmax(dim=-1)).exp().sum()) == pytest.approx(1)
