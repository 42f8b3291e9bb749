"""Sampling is reproducible, log-probs equal those of one token at a time, intervals cover."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import ModelError
from align.evaluation.rewards import gain_per_root_kl, reward_differences
from align.generation.transformers_engine import TransformersEngine
from align.generation.types import Sampling
from align.models.completion_logps import completion_logps
from align.stats import bootstrap_mean, bootstrap_share
from tests.helpers.builders import tokenizer

PROMPTS = ["the film is", "a very bad plot was not", "good"]


def engine(folder: Path, batch_size: int = 8) -> TransformersEngine:
    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return TransformersEngine(model, words, batch_size=batch_size)


def test_same_seed_same_text_other_seed_other_text(tiny_policy: Path) -> None:
    made = engine(tiny_policy)
    state = torch.random.get_rng_state()
    first = made.generate(PROMPTS, Sampling(6, n=2, seed=1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == made.generate(PROMPTS, Sampling(6, n=2, seed=1)) != made.generate(PROMPTS, Sampling(6, n=2, seed=2))
    assert [len(group) for group in first] == [2, 2, 2]
    assert all(len(c.token_ids) == 6 or c.finish_reason == "stop" for group in first for c in group)


def test_greedy_does_not_depend_on_the_batch(tiny_policy: Path) -> None:
    wide = engine(tiny_policy).generate(PROMPTS, Sampling(5, temperature=0))
    assert wide == engine(tiny_policy, batch_size=1).generate(PROMPTS, Sampling(5, temperature=0))


@pytest.mark.model
def test_prompt_and_text_read_as_one(assets: Path) -> None:
    made = engine(assets / "smollm2")
    (found,) = made.generate(["The capital of France is"], Sampling(4, temperature=0))
    assert ("The capital of France is" + found[0].text).startswith("The capital of France is Paris")


def test_messages_need_a_template(tiny_policy: Path) -> None:
    chat = [{"role": "user", "content": "good film"}]
    made = engine(tiny_policy)
    assert made.tokenizer.decode(made.encode(chat)) == "user : good film assistant :"
    made.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        made.encode(chat)


@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
def test_log_probs_equal_one_token_at_a_time(tiny_policy: Path, batch_tokens: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy).eval()
    prompts, completions = [[3, 4], [5, 6, 7, 8], [9]], [[4, 5, 6], [], [3, 3, 1]]
    found = completion_logps(model, prompts, completions, batch_tokens=batch_tokens, pad_token_id=0)
    for k, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        expected, context = 0.0, list(prompt)
        for token in completion:
            with torch.no_grad():
                logits = model(torch.tensor([context])).logits[0, -1].double()
            expected += float(torch.log_softmax(logits, -1)[token])
            context.append(token)
        assert found[k] == pytest.approx(expected, abs=1e-4)


def test_compare_is_paired() -> None:
    base = np.random.default_rng(0).normal(0, 5, 200)
    found = reward_differences({"reference": base, "a": base + 0.1, "b": base - 0.1}, baseline="reference", seed=0)
    gain = found["policies"]["a"]["gain"]
    assert gain["value"] == pytest.approx(0.1) and gain["high"] - gain["low"] < 1e-9
    (comparison,) = found["comparisons"]
    assert (comparison["a"], comparison["b"]) == ("b", "a")
    assert comparison["difference"] == pytest.approx({"value": -0.2, "low": -0.2, "high": -0.2, "n": 200})
    assert found["policies"]["reference"]["gain"] is None


def test_bootstrap_interval_covers_about_95_percent() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        estimate = bootstrap_mean(rng.normal(1.0, 2.0, 60), seed=seed, resamples=400)
        inside += estimate.low <= 1.0 <= estimate.high
    assert 180 <= inside <= 199
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean([], seed=0)


def test_a_share_of_none_or_all_keeps_an_interval() -> None:
    """It is Clopper and Pearson's: with a true share of 0.025^(1/N), N of N happens in 2.5% of the cases."""
    every, none = bootstrap_share([1.0] * 20, seed=0), bootstrap_share([0.0] * 20, seed=0)
    exact = binomtest(20, 20).proportion_ci(0.95, method="exact")
    assert (every.value, every.low, every.high) == pytest.approx((1.0, exact.low, 1.0))
    assert (none.value, none.low, none.high) == pytest.approx((0.0, 0.0, 1 - exact.low))
    ties, mixed = [0.5] * 9, [0.0, 1.0, 0.5, 1.0]
    assert bootstrap_share(ties, seed=0) == bootstrap_mean(ties, seed=0)
    assert bootstrap_share(mixed, seed=0) == bootstrap_mean(mixed, seed=0)


def test_resampling_a_part_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=37)
    whole = bootstrap_mean(values, seed=3, resamples=101)
    monkeypatch.setattr("align.stats.CHUNK_CELLS", 37 * 4)
    assert bootstrap_mean(values, seed=3, resamples=101) == whole


def test_gain_per_root_kl() -> None:
    gain, kl = np.full(50, 2.0), np.full(50, 8.0)
    found = gain_per_root_kl(gain, kl, seed=0)
    assert found is not None and (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert gain_per_root_kl(gain, -kl, seed=0) is None
    noisy = np.random.default_rng(0).normal(0.05, 1.0, 50)
    assert 0 < noisy.mean() < 0.2 and gain_per_root_kl(gain, noisy, seed=0) is None


def test_left_padding_side_is_not_left_behind(tiny_policy: Path) -> None:
    made = engine(tiny_policy)
    side = made.tokenizer.padding_side
    made.generate(PROMPTS, Sampling(2))
    assert made.tokenizer.padding_side == side and tokenizer().eos_token_id == 1
