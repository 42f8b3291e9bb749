"""Answers of a server that are not what was asked for are refused, each with what is wrong about it."""

import json
import math
from typing import Any

import pytest

from align.errors import EnvironmentProblem
from align.generation.server_engine import ServerEngine
from align.generation.types import Completion, Sampling
from tests.generation.test_server_engine import Fake

SAMPLING = Sampling(4, logprobs=True, stop=("###",))
RIGHT: dict[str, Any] = {
    "token_ids": [4, 1], "finish_reason": "stop", "text": "x", "logprobs": {"token_logprobs": [-0.5, 0.0]},
}  # fmt: skip


def answered(usage: Any = None, **changed: Any) -> Completion:
    """The completion in an answer that is right but for some fields."""
    fake = Fake(lambda *_: (200, json.dumps({"choices": [RIGHT | changed], "usage": usage})))
    with fake.running() as address:
        ((found,),) = ServerEngine("policy", base_url=address, attempts=1).generate(["a"], SAMPLING, ["p0"])
    return found


def test_a_right_answer() -> None:
    assert answered() == Completion("x", [4, 1], "stop", [-0.5, 0.0])
    assert answered(text="", token_ids=[], logprobs={"token_logprobs": []}).token_ids == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"token_ids": ["4", "1"]}, r"found token ids \['4', '1'\], expected whole numbers"),
        ({"token_ids": [4.5, 1]}, r"found token ids \[4\.5, 1\]"),
        ({"token_ids": [True, 1]}, r"found token ids \[True, 1\]"),
        ({"token_ids": [-1, 1]}, r"found token ids \[-1, 1\]"),
        ({"token_ids": []}, "found the text 'x' and no token ids"),
        ({"token_ids": [4] * 5, "finish_reason": "length"}, "found 5 tokens, and 4 were asked for at most"),
        ({"text": "x ### y"}, "its text holds '###', before which it was to stop"),
        ({"logprobs": {"token_logprobs": [-0.5]}}, "no log-prob for each token"),
        ({"logprobs": {"token_logprobs": [-0.5, math.nan]}}, "found nan, expected the log-prob of a token"),
        ({"logprobs": {"token_logprobs": [-0.5, 0.5]}}, r"found 0\.5, expected the log-prob of a token"),
        ({"logprobs": {"token_logprobs": [-9999.0, 0.0]}}, "found -9999, expected the log-prob of a token"),
    ],
)
def test_what_was_not_asked_for_is_refused(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(EnvironmentProblem, match=rf"prompt p0: the answer lacks what is needed.*{told}"):
        answered(**changed)


def test_half_a_character_becomes_the_sign_for_it() -> None:
    """JSON can hold half of a surrogate pair; no file of UTF-8 can."""
    assert answered(text="a\ud83d").text == "a\ufffd"
    assert answered(text="\U0001f600").text == "\U0001f600"


def test_numbers_of_tokens_that_are_none_are_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    for usage in ("x", {"prompt_tokens": "3"}, []):
        assert answered(usage=usage, finish_reason="length").finish_reason == "length"
    assert "by the end of the window, or by a limit of the server's own" in caplog.text
