"""Sampling is reproducible, log-probs equal those of one token at a time, intervals cover."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import ModelError
from align.evaluation.rewards import gain_per_root_kl, reward_differences
from align.generation.transformers_engine import TransformersEngine
from align.generation.types import Sampling
from align.models.completion_logps import completion_logps
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
    found = reward_differences({"reference": base, "a": base + 0.1, "b": base - 0.1}, baseline="reference")
    gain = found["policies"]["a"]["gain"]
    assert gain["value"] == pytest.approx(0.1) and gain["low"] is None  # the same on every prompt
    (comparison,) = found["comparisons"]
    assert (comparison["a"], comparison["b"]) == ("b", "a")
    assert comparison["difference"] == {"value": pytest.approx(-0.2), "low": None, "high": None, "n": 200}
    assert found["policies"]["reference"]["gain"] is None


def test_gain_per_root_kl() -> None:
    gain, kl = np.full(50, 2.0), np.full(50, 8.0)
    found = gain_per_root_kl(gain, kl)
    assert found is not None and (found.value, found.low) == (pytest.approx(0.5), None)
    assert gain_per_root_kl(gain, -kl) is None
    noisy = np.random.default_rng(0).normal(0.05, 1.0, 50)
    assert 0 < noisy.mean() < 0.2 and gain_per_root_kl(gain, noisy) is None


def test_left_padding_side_is_not_left_behind(tiny_policy: Path) -> None:
    made = engine(tiny_policy)
    side = made.tokenizer.padding_side
    made.generate(PROMPTS, Sampling(2))
    assert made.tokenizer.padding_side == side and tokenizer().eos_token_id == 1
