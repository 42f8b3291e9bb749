"""A judge behind a server: how answers are read, that none is asked for twice, and what is told when it fails."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.errors import DataError, EnvironmentProblem, ModelError
from reward_models.pairwise_judges import prefer_in_both_orders
from reward_models.server_judge import ServerJudge
from tests.generation.test_server_engine import Fake, Reply

PROMPTS, OURS, THEIRS = ["p0", "p1", "p2"], ["good", "bad", "good"], ["bad", "good", "good"]
USAGE = {"usage": {"prompt_tokens": 30, "completion_tokens": 1}}


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The responses A and B of a question."""
    text = body["messages"][0]["content"]
    a, b = (text.split(f"Response {label}: ")[1].split("\n")[0].strip() for label in "AB")
    return a, b


def by_log_probs(path: str, body: dict[str, Any], number: int) -> Reply:
    """Prefers A with 0.8 if it is good and B is bad, 0.2 the other way, else 0.5; always 0.1 on other tokens."""
    a, b = shown(body)
    p = {("good", "bad"): 0.8, ("bad", "good"): 0.2}.get((a, b), 0.5)
    tops = [{"token": token, "logprob": math.log(0.9 * mass)} for token, mass in (("A", p * 0.5), (" A", p * 0.5),
                                                                                  (" B", 1 - p))]  # fmt: skip
    content = [{"token": "**", "top_logprobs": []}, {"token": "A", "top_logprobs": tops}]
    return 200, {"choices": [{"message": {"content": "**A"}, "logprobs": {"content": content}}], **USAGE}


def by_letter(path: str, body: dict[str, Any], number: int) -> Reply:
    """Refuses log-probs; answers by a letter, and for two equal responses not at all."""
    if "logprobs" in body:
        return 400, "logprobs are not supported"
    a, b = shown(body)
    text = "Neither is better" if a == b else f"The answer is {'A' if a == 'good' else 'B'}."
    return 200, {"choices": [{"message": {"content": text}}], **USAGE}


@pytest.mark.parametrize(("answer", "expected"), [(by_log_probs, [0.8, 0.2, 0.5]), (by_letter, [1.0, 0.0, 0.5])])
def test_both_orders_and_the_cost(answer: Any, expected: list[float], tmp_path: Path) -> None:
    fake = Fake(answer)
    with fake.running() as address:
        judge = ServerJudge("policy", base_url=address, concurrency=1, cache=tmp_path / "answers.jsonl")
        first, second = prefer_in_both_orders(judge, PROMPTS, OURS, THEIRS)
    assert first == pytest.approx(expected) and second == pytest.approx(expected)
    assert judge.cost == {"questions": 5, "prompt_tokens": 150, "completion_tokens": 5}  # p2 is one question
    asked = [body for _, body in fake.bodies if "logprobs" in body]
    assert len(asked) == (5 if answer is by_log_probs else 1) and asked[0]["temperature"] == 0


def test_the_models_own_sampling_changes_nothing(tmp_path: Path) -> None:
    """Fields that vLLM fills from a generation config are sent; a server that knows one of them not does without."""

    def strict(path: str, body: dict[str, Any], number: int) -> Reply:
        if "repetition_penalty" in body:
            return 400, "Unrecognized request argument supplied: repetition_penalty"
        return by_log_probs(path, body, number)

    for answer, refusals in ((by_log_probs, 0), (strict, 1)):
        fake = Fake(answer)
        with fake.running() as address:
            judge = ServerJudge("policy", base_url=address, concurrency=1)
            assert judge.prefer(PROMPTS, OURS, THEIRS) == pytest.approx([0.8, 0.2, 0.5])
        bodies = [body for _, body in fake.bodies]
        assert len(bodies) == 3 + refusals and sum(body.get("repetition_penalty") == 1 for body in bodies) == (
            1 if refusals else 3
        )
        neutral = {"temperature": 0, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0}
        assert all(body[name] == value for body in bodies for name, value in neutral.items())


def test_a_server_that_goes_down_loses_no_answer(tmp_path: Path) -> None:
    """The next call asks what is left; a line that was cut off is asked for again."""
    down = Fake(lambda path, body, number: by_log_probs(path, body, number) if number < 3 else (503, "down"))
    cache = tmp_path / "answers.jsonl"
    settings: dict[str, Any] = {"concurrency": 1, "attempts": 2, "cache": cache, "first_wait": 0.01}
    with down.running() as address, pytest.raises(EnvironmentProblem, match="status 503: down, after 2 tries") as error:
        ServerJudge("policy", base_url=address, **settings).prefer(PROMPTS, OURS, THEIRS)
    assert error.value.code == "server-unreachable"
    kept = [line for line in cache.read_text().splitlines() if line]
    assert len(kept) == 2
    cache.write_text(kept[0] + "\n" + kept[1][:20])
    fake = Fake(by_log_probs)
    with fake.running() as address:
        judge = ServerJudge("policy", base_url=address, **settings)
        assert judge.prefer(PROMPTS, OURS, THEIRS) == pytest.approx([0.8, 0.2, 0.5])
    assert [shown(body) for _, body in fake.bodies] == list(zip(OURS, THEIRS, strict=True))[1:]
    assert judge.cost["questions"] == 3
    again = ServerJudge("policy", base_url="http://127.0.0.1:9/v1", cache=cache)
    assert np.array_equal(again.prefer(PROMPTS, OURS, THEIRS), judge.prefer(PROMPTS, OURS, THEIRS))


@pytest.mark.parametrize(
    ("reply", "kind", "text"),
    [
        ((200, {"choices": []}), ModelError, "lacks what is needed"),
        ((200, {"choices": [{"message": {"content": "I cannot say"}}]}), DataError, "none of 3 answers names A or B"),
        ((400, "too long"), DataError, "refuses a request"),
        ((200, {"choices": [{"message": {"content": None}}]}), DataError, "none of 3 answers"),
    ],
)
def test_answers_that_are_none(reply: Reply, kind: type[Exception], text: str) -> None:
    with Fake(lambda path, body, number: reply).running() as address, pytest.raises(kind, match=text):
        ServerJudge("policy", base_url=address).prefer(PROMPTS, OURS, THEIRS)


def test_another_model_is_asked_again_and_one_that_is_not_served_is_told(tmp_path: Path) -> None:
    cache = tmp_path / "answers.jsonl"
    fake = Fake(by_log_probs)
    with fake.running() as address:
        ServerJudge("policy", base_url=address, cache=cache).prefer(["p"], ["a"], ["b"])
        with pytest.raises(ModelError, match=r"does not serve 'polcy' \(did you mean `policy`"):
            ServerJudge("polcy", base_url=address, cache=cache).prefer(["p"], ["a"], ["b"])
    assert len(fake.bodies) == 1 and json.loads(cache.read_text().strip())["preference"] == 0.5
