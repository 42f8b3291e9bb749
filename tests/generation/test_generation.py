"""A completion depends on its prompt and seed alone; draws follow softmax and top-p; log-probs are the model's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM, TopPLogitsWarper

from align.generation.encoding import stop_ids, to_completion
from align.generation.engines import make_engine
from align.generation.sampler import TOLERANCE, DrawnToken, draw
from align.generation.transformers_engine import TransformersEngine
from align.generation.types import Sampling, prompt_keys, sample_seed
from align.models.completion_logps import completion_logps
from align.models.positions import check_positions
from align.models.truncation import Truncation
from tests.helpers.builders import WORDS, llama_config, tokenizer

PROMPTS = ["the film is", "a very bad plot was not", "good", "the the the the", "not"]
SAMPLINGS = [
    Sampling(8, n=3, seed=1),
    Sampling(8, temperature=0.6, top_p=0.8, n=2, seed=5),
    Sampling(8, temperature=0, n=1),
]


def engine(folder: Path, batch_size: int = 8) -> TransformersEngine:
    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return TransformersEngine(model, words, batch_size=batch_size)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "top-p", "greedy"])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batch_size_order_and_company_do_not_matter(tiny_policy: Path, sampling: Sampling, batch_size: int) -> None:
    wide = engine(tiny_policy, 64).generate(PROMPTS, sampling)
    assert engine(tiny_policy, batch_size).generate(PROMPTS, sampling) == wide
    assert engine(tiny_policy, batch_size).generate(PROMPTS[::-1], sampling) == wide[::-1]
    assert engine(tiny_policy, batch_size).generate(PROMPTS[1:3], sampling) == wide[1:3]


def test_samples_and_repeated_prompts_differ_and_keys_decide(tiny_policy: Path) -> None:
    made = engine(tiny_policy)
    sampling = Sampling(12, n=2, seed=3)
    first, second = made.generate(["good film"] * 2, sampling)
    assert len({tuple(found.token_ids) for found in [*first, *second]}) == 4
    assert (
        made.generate(["good film"] * 2, sampling, keys=["a", "a"])[1]
        == made.generate(["good film"], sampling, keys=["a"])[0]
    )
    assert made.generate(["good film"], sampling, keys=["a"]) != made.generate(["good film"], sampling, keys=["b"])


def test_rounding_cannot_turn_a_choice(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a batch that are off by up to half the tolerance give the same completions."""
    sampling = Sampling(20, top_p=0.9, n=24, seed=2)
    exact = engine(tiny_policy, 1).generate(PROMPTS, sampling)
    recomputed = []
    call = DrawnToken.__call__
    shake = torch.Generator().manual_seed(0)

    def shaken(self: DrawnToken, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        off = (torch.rand(scores.shape, generator=shake) - 0.5) * 0.99 * TOLERANCE
        out = call(self, input_ids, scores + off)
        recomputed.append(self.recomputed)
        return out

    monkeypatch.setattr(DrawnToken, "__call__", shaken)
    for batch_size in (1, 7, 200):
        assert engine(tiny_policy, batch_size).generate(PROMPTS, sampling) == exact
    assert max(recomputed) > 0


@given(
    st.lists(st.floats(-4, 4), min_size=3, max_size=8),
    st.sampled_from([1.0, 0.9, 0.5]),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.integers(0, 2**31),
)
def test_a_sure_choice_survives_any_rounding_within_half_the_tolerance(
    values: list[float], top_p: float, temperature: float, seed: int
) -> None:
    tolerance = 0.2
    logits = torch.tensor([values])
    random = torch.Generator().manual_seed(seed)
    noise = -torch.rand(logits.shape, generator=random).log().neg().log() if temperature else torch.zeros_like(logits)
    sampling = Sampling(1, temperature=temperature, top_p=top_p)
    drawn, sure = draw(logits, noise, sampling, tolerance=tolerance)
    if sure:
        for _ in range(20):
            off = (torch.rand(logits.shape, generator=random) - 0.5) * tolerance
            assert draw(logits + off, noise, sampling, tolerance=0.0)[0] == drawn


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.7), (1.5, 0.85)])
def test_draws_follow_the_tempered_nucleus(temperature: float, top_p: float) -> None:
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.2, -0.5, -1.0]])
    warped = TopPLogitsWarper(top_p)(torch.zeros(1, 1), logits / temperature) if top_p < 1 else logits / temperature
    expected = torch.softmax(warped, -1)[0]
    count = 6000
    seeds = [sample_seed(0, str(k), 0) for k in range(count)]
    choice = DrawnToken(Sampling(1, temperature, top_p), seeds, [0] * count, [], lambda row: logits[0], logits.device)
    drawn = choice(torch.zeros(count, 1, dtype=torch.long), logits.expand(count, -1).clone()).argmax(-1)
    counts = torch.bincount(drawn, minlength=6).numpy()
    allowed = expected.numpy() > 0
    assert counts[~allowed].sum() == 0
    shares = expected.double().numpy()[allowed]
    assert chisquare(counts[allowed], shares / shares.sum() * count).pvalue > 1e-3


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9), st.floats(0.05, 0.99))
def test_nucleus_is_the_smallest_set_that_reaches_the_mass(values: list[float], top_p: float) -> None:
    scores = torch.tensor([values], dtype=torch.float64)
    floor = Truncation(top_p).floor(scores)
    p = torch.softmax(scores, -1)
    assert p[scores >= floor].sum() >= top_p - 1e-9
    assert p[scores > floor].sum() < top_p + 1e-9


def test_a_mass_that_is_reached_exactly_takes_no_further_token() -> None:
    """Probabilities 1/2, 1/4, 1/4, which floats hold exactly."""
    scores = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    first, second, all_of_them = (Truncation(top_p).floor(scores) for top_p in (0.5, 0.51, 1.0))
    assert first.item() == scores[0, 0] and second.item() == scores[0, 1] and all_of_them.item() == -torch.inf


def test_a_draw_at_the_border_of_the_nucleus_is_not_sure() -> None:
    """The mass before the drawn token is 0.5: rounding could put it out of a nucleus of 0.49 or 0.51, not of 0.6, of
    which it is the last token, nor where rounding could let the token after it in."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    noise = torch.tensor([[0.0, 5.0, 0.0, 0.0]], dtype=torch.float64)
    for top_p, sure in ((0.49, False), (0.51, False), (0.6, True), (0.79, True), (0.81, True), (0.9, True)):
        drawn, certain = draw(logits, noise, Sampling(1, top_p=top_p), tolerance=0.02)
        assert (int(drawn), bool(certain)) == (1, sure)


@pytest.mark.parametrize("sampling", [
    Sampling(1, top_k=1), Sampling(1, top_k=2), Sampling(1, top_p=0.3), Sampling(1, top_p=0.8, top_k=2, min_p=0.4),
    Sampling(1, top_k=3), Sampling(1, top_k=4),
])  # fmt: skip
def test_the_last_token_of_a_cut_is_sure_if_the_next_one_is_far_below(sampling: Sampling) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    last = {1: 0, 2: 1, 3: 2, 4: 3, 0: 0}[sampling.top_k]
    noise = torch.zeros_like(logits).index_fill(1, torch.tensor([last]), 9.0)
    drawn, certain = draw(logits, noise, sampling, tolerance=0.02)
    assert (int(drawn), bool(certain)) == (last, True)
    near = logits.clone()
    if last + 1 < logits.shape[1] and sampling.top_k:
        near[0, last + 1] = near[0, last] - 0.01
        assert not draw(near, noise, sampling, tolerance=0.02)[1]


def test_log_probs_are_the_models_own(tiny_policy: Path) -> None:
    """They are those of the plain model at every temperature and top-p."""
    made = engine(tiny_policy, 3)
    sampling = Sampling(9, temperature=0.7, top_p=0.9, n=2, seed=4, logprobs=True)
    found = made.generate(PROMPTS, sampling)
    pairs = [(made.encode(prompt), one) for prompt, group in zip(PROMPTS, found, strict=True) for one in group]
    expected = completion_logps(
        made.model, [ids for ids, _ in pairs], [one.token_ids for _, one in pairs], batch_tokens=50, pad_token_id=0
    )
    assert all(one.logprobs is not None and len(one.logprobs) == len(one.token_ids) for _, one in pairs)
    assert np.allclose([sum(one.logprobs or []) for _, one in pairs], expected, atol=1e-4)
    plain = made.generate(PROMPTS, Sampling(9, temperature=0.7, top_p=0.9, n=2, seed=4))
    assert [one.token_ids for group in plain for one in group] == [one.token_ids for _, one in pairs]
    assert plain[0][0].logprobs is None


def test_only_stop_tokens_of_the_generation_config_count(tiny_policy: Path) -> None:
    plain = engine(tiny_policy).generate(PROMPTS, Sampling(6, temperature=0))
    made = engine(tiny_policy)
    made.model.generation_config.repetition_penalty = 5.0
    made.model.generation_config.temperature = 0.1
    assert made.generate(PROMPTS, Sampling(6, temperature=0)) == plain


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "adapter"])
@pytest.mark.parametrize(
    "field",
    [
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 12},
        {"num_beams": 3},
        {"suppress_tokens": [5, 6, 7, 8, 9]},
        {"bad_words_ids": [[5], [6], [7]]},
        {"forced_eos_token_id": 4},
        {"guidance_scale": 3.0},
        {"repetition_penalty": 5.0},
    ],
    ids=lambda field: next(iter(field)),
)
def test_no_field_of_the_generation_config_changes_what_is_sampled_from(
    field: dict[str, Any], wrapped: bool, tiny_policy: Path
) -> None:
    """The model's own config is as it was afterwards, for an adapter too."""
    made, sampling = engine(tiny_policy), Sampling(12, seed=3)
    plain = made.generate(PROMPTS, sampling)
    if wrapped:
        torch.manual_seed(0)
        adapted = get_peft_model(made.model, LoraConfig(r=2, target_modules=["q_proj"]))  # of no effect yet
        made = TransformersEngine(adapted, made.tokenizer, batch_size=8)
    ((name, value),) = field.items()
    setattr(made.model.generation_config, name, value)
    before = made.model.generation_config
    assert made.generate(PROMPTS, sampling) == plain
    inside = made.model.get_base_model() if wrapped else made.model
    assert made.model.generation_config is inside.generation_config is before and getattr(before, name) == value


def test_stop_ids_and_cutting() -> None:
    words = tokenizer()
    assert stop_ids(words, GenerationConfig(eos_token_id=[7, 9])) == [1, 7, 9]
    assert stop_ids(words, GenerationConfig(eos_token_id=None)) == [1]
    good, film = words.convert_tokens_to_ids(["good", "film"])
    cut = to_completion(words, [good], [film, 1, film], {1}, [-0.1, -0.2, -0.3])
    assert (cut.text.strip(), cut.token_ids, cut.finish_reason, cut.logprobs) == (
        "film",
        [film, 1],
        "stop",
        [-0.1, -0.2],
    )
    assert to_completion(words, [good], [film, film], {1}, None).finish_reason == "length"


def test_seeds_are_spread_and_stable() -> None:
    seeds = {sample_seed(s, key, n) for s in range(20) for key in WORDS for n in range(10)}
    assert len(seeds) == 20 * len(WORDS) * 10
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert abs(np.mean([seed / 2**32 for seed in seeds]) - 0.5) < 0.02
    assert prompt_keys(["a", "b", "a"])[0] == prompt_keys(["a"])[0] != prompt_keys(["b", "a", "a"])[2]


def test_an_adapter_is_merged_for_sampling_and_samples_the_same(tiny_policy: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_policy)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(tmp_path)
    made = make_engine("transformers", str(tmp_path), batch_size=8)
    assert isinstance(made, TransformersEngine) and not isinstance(made.model, PeftModel)
    sampling = Sampling(12, n=4, seed=1)
    unmerged = TransformersEngine(adapted, made.tokenizer, batch_size=8)
    assert made.generate(PROMPTS, sampling) == unmerged.generate(PROMPTS, sampling)
    assert made.generate(PROMPTS, sampling) != engine(tiny_policy).generate(PROMPTS, sampling)


@pytest.mark.model
def test_real_model_equal_seeds_equal_completions(assets: Path) -> None:
    prompts = [f"Review of film number {k}: {'it was ' * (k % 5)}" for k in range(12)]
    sampling = Sampling(24, top_p=0.95, n=2, seed=7)
    wide = engine(assets / "smollm2", 24).generate(prompts, sampling)
    assert engine(assets / "smollm2", 5).generate(prompts, sampling) == wide
    assert engine(assets / "smollm2", 1).generate(prompts[:3], sampling) == wide[:3]


def test_text_beyond_what_a_rotary_model_was_made_for_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = LlamaForCausalLM(llama_config())
    model.name_or_path = "a model of this test"
    with caplog.at_level("WARNING"):
        for _ in range(2):
            check_positions(model, 200, "a row", "shorten it")
            check_positions(model, 128, "a row", "shorten it")
    assert caplog.text.count("has 200 tokens, and the model was made for 128") == 1
