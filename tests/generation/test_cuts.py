"""Top-k, min-p and stop texts: what is drawn, where a completion ends, and what engines send."""

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import MinPLogitsWarper, TopKLogitsWarper

from align.generation.encoding import to_completion
from align.generation.engines import make_engine
from align.generation.sampler import DrawnToken
from align.generation.server_engine import ServerEngine
from align.generation.types import Sampling, sample_seed
from tests.generation.test_half_characters import bytes_tokenizer
from tests.generation.test_server_engine import Fake, Reply

PROMPTS = ["the film is", "a very bad plot was not", "good", "not"]


@pytest.mark.parametrize(("top_k", "min_p", "temperature"), [(3, 0.0, 1.0), (0, 0.3, 0.8), (4, 0.1, 1.3)])
def test_draws_follow_the_cut_softmax(top_k: int, min_p: float, temperature: float) -> None:
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.2, -0.5, -1.0]])
    none, warped = torch.zeros(1, 1, dtype=torch.long), logits / temperature
    warped = MinPLogitsWarper(min_p)(none, warped) if min_p else warped
    warped = TopKLogitsWarper(top_k)(none, warped) if top_k else warped
    expected, count = torch.softmax(warped, -1)[0], 4000
    sampling = Sampling(1, temperature, top_k=top_k, min_p=min_p)
    seeds = [sample_seed(0, str(k), 0) for k in range(count)]
    choice = DrawnToken(sampling, seeds, [0] * count, [], lambda row: logits[0], logits.device)
    drawn = choice(torch.zeros(count, 1, dtype=torch.long), logits.expand(count, -1).clone()).argmax(-1)
    counts, allowed = torch.bincount(drawn, minlength=6).numpy(), expected.numpy() > 0
    assert 1 < allowed.sum() < 6 and counts[~allowed].sum() == 0
    shares = expected.double().numpy()[allowed]
    assert chisquare(counts[allowed], shares / shares.sum() * count).pvalue > 1e-3


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_stop_text_ends_a_completion_before_it(batch_size: int, tiny_policy: Path) -> None:
    """The same draws as without, cut at the first of the texts; others go on to the limit."""
    engine = make_engine("transformers", str(tiny_policy), batch_size=batch_size)
    whole = engine.generate(PROMPTS, Sampling(12, n=3, seed=1))
    stops = ("good", "plot w")
    found = engine.generate(PROMPTS, Sampling(12, n=3, seed=1, stop=stops))
    ends = set()
    for one, other in zip(sum(whole, []), sum(found, []), strict=True):  # noqa: RUF017
        place = min((one.text.find(stop) for stop in stops if stop in one.text), default=None)
        assert other.text == one.text[:place]
        assert other.finish_reason == (one.finish_reason if place is None else "stop")
        assert other.token_ids == one.token_ids[: len(other.token_ids)]
        assert (len(other.token_ids) < len(one.token_ids)) <= (place is not None)
        ends.add(place is None)
    assert ends == {True, False}


@pytest.mark.parametrize(("stops", "text", "tokens"), [(["\n"], "ab", 3), (["b\nc", "d"], "a", 4), (["é"], "ab\ncd", 7),
                                                       (["x"], "ab\ncdé", 7)])  # fmt: skip
def test_its_tokens_end_with_the_one_that_completes_it(stops: list[str], text: str, tokens: int) -> None:
    words = bytes_tokenizer(False)
    ids = words("ab\ncdé")["input_ids"]
    found = to_completion(words, words("go")["input_ids"], ids, [words.eos_token_id], [0.0] * 7, stops)
    assert (found.text, len(found.token_ids), len(found.logprobs or [])) == (text, tokens, tokens)
    assert found.finish_reason == ("length" if stops == ["x"] else "stop")


def test_a_server_is_asked_for_them() -> None:
    def answer(path: str, body: dict[str, Any], number: int) -> Reply:
        return 200, {"choices": [{"text": " ok", "token_ids": [4], "finish_reason": "stop"}]}

    fake = Fake(answer)
    with fake.running() as address:
        engine = ServerEngine("policy", base_url=address)
        engine.generate(["a"], Sampling(2, top_k=5, min_p=0.25, stop=("x",)))
        engine.generate(["a"], Sampling(2))
    cut, plain = (body for _, body in fake.bodies)
    assert (cut["top_k"], cut["min_p"], cut["stop"]) == (5, 0.25, ["x"])
    assert (plain["top_k"], plain["min_p"], "stop" in plain) == (0, 0.0, False)
