"""The server engine against a small HTTP server: its requests, bounded concurrency, retries, messages."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from align.errors import ConfigError, DataError, EnvironmentProblem, ModelError
from align.generation.engines import choose_engine, make_engine
from align.generation.server_engine import ServerEngine
from align.generation.types import Sampling, sample_seed

Reply = tuple[int, dict[str, Any] | str]


class Fake:
    """A server that answers each request with ``answer(path, body, number of the request)``."""

    def __init__(self, answer: Callable[[str, dict[str, Any], int], Reply]) -> None:
        self.answer = answer
        self.lock = threading.Lock()
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.active = self.most_active = 0
        self.headers: dict[str, str] = {}
        self.key: str | None = None
        self.entry: dict[str, Any] = {}

    @contextmanager
    def running(self) -> Iterator[str]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                """Log nothing."""

            def do_GET(self) -> None:
                self._reply(200, {"data": [{"id": "policy"} | fake.entry]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.key = self.headers.get("Authorization")
                    fake.bodies.append((self.path, body))
                    number = len(fake.bodies)
                    fake.active += 1
                    fake.most_active = max(fake.most_active, fake.active)
                status, reply = fake.answer(self.path, body, number)
                with fake.lock:
                    fake.active -= 1
                self._reply(status, reply)

            def _reply(self, status: int, reply: dict[str, Any] | str) -> None:
                content = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                for name, value in fake.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            server.server_close()


def echo(path: str, body: dict[str, Any], number: int) -> Reply:
    """Answer with prompt and seed as the text, and with log-probs if asked for."""
    asked = "logprobs" in body
    choice: dict[str, Any] = {"token_ids": [4, 1], "finish_reason": "stop"}
    if path == "/v1/completions":
        choice |= {"text": f"{body['prompt']}/{body['seed']}"}
        choice |= {"logprobs": {"token_logprobs": [-0.5, -1.5]}} if asked else {}
    else:
        choice |= {"message": {"content": f"{body['messages'][0]['content']}/{body['seed']}"}}
        choice |= {"logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1.5}]}} if asked else {}
    return 200, {"choices": [choice]}


def test_log_probs_that_were_asked_for_and_did_not_come_are_told() -> None:
    def silent(path: str, body: dict[str, Any], number: int) -> Reply:
        return echo(path, {name: value for name, value in body.items() if name != "logprobs"}, number)

    with Fake(silent).running() as address, pytest.raises(EnvironmentProblem, match="no log-prob for each token"):
        ServerEngine("policy", base_url=address).generate(["a"], Sampling(4, logprobs=True))


def test_each_sample_has_its_own_seed_and_its_place() -> None:
    fake = Fake(echo)
    prompts = ["b", "a", [{"role": "user", "content": "hi"}]]
    sampling = Sampling(7, temperature=0.5, top_p=0.9, n=2, seed=3, logprobs=True)
    keys = ["k0", "k1", "k2"]
    with fake.running() as address:
        found = ServerEngine("policy", base_url=address + "/").generate(prompts, sampling, keys)
    for k, shown in enumerate(("b", "a", "hi")):
        assert [one.text for one in found[k]] == [f"{shown}/{sample_seed(3, keys[k], s)}" for s in range(2)]
        assert found[k][0].logprobs == [-0.5, -1.5] and found[k][0].finish_reason == "stop"
    path, body = next(item for item in fake.bodies if item[1].get("prompt") == "a")
    assert path == "/v1/completions"
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("policy", 7, 0.5, 0.9)
    assert body["logprobs"] == 0 and body["return_token_ids"] is True
    assert {path for path, _ in fake.bodies} == {"/v1/completions", "/v1/chat/completions"}


def test_no_more_requests_at_once_than_allowed() -> None:
    def slow(path: str, body: dict[str, Any], number: int) -> Reply:
        time.sleep(0.03)
        return echo(path, body, number)

    fake = Fake(slow)
    with fake.running() as address:
        ServerEngine("policy", base_url=address, concurrency=3).generate([str(k) for k in range(12)], Sampling(2))
    assert fake.most_active == 3


def test_trouble_that_passes_is_waited_out() -> None:
    def troubled(path: str, body: dict[str, Any], number: int) -> Reply:
        return echo(path, body, number) if number > 3 else ((503, "loading") if number % 2 else (429, "slow down"))

    fake = Fake(troubled)
    with fake.running() as address:
        made = ServerEngine("policy", base_url=address, concurrency=1, attempts=4, first_wait=0.05)
        start = time.monotonic()
        (found,) = made.generate(["a"], Sampling(2))
    assert found[0].text.startswith("a/") and len(fake.bodies) == 4
    assert time.monotonic() - start >= 0.5 * (0.05 + 0.1 + 0.2)


def test_the_servers_wish_to_wait_is_kept() -> None:
    fake = Fake(lambda path, body, number: (429, "busy") if number == 1 else echo(path, body, number))
    fake.headers = {"Retry-After": "1"}
    with fake.running() as address:
        start = time.monotonic()
        ServerEngine("policy", base_url=address, first_wait=0.01).generate(["a"], Sampling(2))
    assert time.monotonic() - start >= 1.0


def test_trouble_that_stays_ends_with_one_line() -> None:
    with Fake(lambda path, body, number: (500, "out of memory")).running() as address:
        made = ServerEngine("policy", base_url=address, attempts=2, first_wait=0.01)
        with pytest.raises(EnvironmentProblem, match=r"status 500: out of memory, after 2 tries") as caught:
            made.generate(["a", "b"], Sampling(2))
    assert caught.value.code == "server-unreachable" and "vllm serve policy" in caught.value.hint


@pytest.mark.parametrize(
    ("reply", "kind", "code"),
    [
        ((400, "prompt too long"), DataError, "prompt-refused"),
        ((401, "who are you"), EnvironmentProblem, "server-refused"),
        ((404, "not here"), EnvironmentProblem, "server-refused"),
        ((200, "<html>"), EnvironmentProblem, "server-response"),
        ((200, {"choices": [{"text": "no ids", "finish_reason": "stop"}]}), EnvironmentProblem, "server-response"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(reply: Reply, kind: type[Exception], code: str) -> None:
    fake = Fake(lambda path, body, number: reply)
    with fake.running() as address, pytest.raises(kind) as caught:
        ServerEngine("policy", base_url=address, first_wait=0.01).generate(["a"], Sampling(2))
    assert caught.value.code == code and len(fake.bodies) == 1  # type: ignore[attr-defined]


def test_a_finished_prompt_is_given_before_the_rest() -> None:
    release = threading.Event()

    def one_waits(path: str, body: dict[str, Any], number: int) -> Reply:
        if body["prompt"] == "slow":
            release.wait(10)
        return echo(path, body, number)

    with Fake(one_waits).running() as address:
        stream = ServerEngine("policy", base_url=address).stream(["slow", "fast"], Sampling(2))
        assert next(stream)[0] == 1
        release.set()
        assert next(stream)[0] == 0


def test_nobody_waits_for_a_request_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when a job fails nor when the iterator is closed; no further job is started."""
    release = threading.Event()

    def others_wait(path: str, body: dict[str, Any], number: int) -> Reply:
        if body["prompt"] != "bad":
            release.wait(20)
        return (404, "no") if body["prompt"] == "bad" else echo(path, body, number)

    fake = Fake(others_wait)
    with fake.running() as address:
        start = time.monotonic()
        with pytest.raises(EnvironmentProblem, match="refuses a request"):
            ServerEngine("policy", base_url=address, concurrency=2).generate(["a", "bad", "b", "c"], Sampling(2))
        assert time.monotonic() - start < 10
        assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("request"))
        release.set()
        time.sleep(0.2)
        assert len(fake.bodies) == 2


def test_nobody_there_and_unknown_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentProblem, match="no answer") as caught:
        ServerEngine("policy", base_url="http://127.0.0.1:9/v1", attempts=2, first_wait=0.01)
    assert caught.value.code == "server-unreachable"
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    fake = Fake(echo)
    with fake.running() as address:
        with pytest.raises(ModelError, match="does not serve 'policies'"):
            make_engine("server", "policies", batch_size=1, base_url=address)
        with pytest.raises(ConfigError, match="unexpected keyword argument 'tries'"):
            make_engine("server", "policy", batch_size=1, base_url=address, options={"tries": 3})
        make_engine("auto", "policy", batch_size=1, base_url=address).generate(["a"], Sampling(2))
    assert fake.key == "Bearer secret"


def test_auto_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_engine("auto", base_url="http://x/v1") == ("server", "the address of a server is given")
    monkeypatch.setattr("align.generation.vllm_install.find_spec", lambda name: None)
    assert choose_engine("auto") == ("transformers", "vLLM is not installed")
    with pytest.raises(EnvironmentProblem, match="vLLM is not installed") as caught:
        make_engine("vllm", "model", batch_size=1)
    assert caught.value.code == "vllm-missing" and "pip install 'margin-align[vllm]'" in caught.value.hint
    monkeypatch.setattr("align.generation.vllm_install.find_spec", lambda name: object())
    monkeypatch.setattr("align.generation.vllm_install.version", lambda name: "0.9.1")
    assert choose_engine("auto") == ("transformers", "vLLM 0.9.1 is installed and 0.20 or newer is needed")
    with pytest.raises(ConfigError, match="did you mean `vllm`"):
        choose_engine("vlm")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="takes no --base-url"):
        choose_engine("transformers", base_url="http://x/v1")


def test_a_vllm_that_does_not_import_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from align.generation.vllm_engine import VllmEngine

    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr("align.generation.vllm_install.find_spec", lambda name: object())
    monkeypatch.setattr("align.generation.vllm_install.version", lambda name: "0.32.0")
    monkeypatch.setattr("align.generation.vllm_install.importlib.import_module", broken)
    with pytest.raises(EnvironmentProblem, match=r"0.32.0 does not import .*undefined symbol"):
        VllmEngine("model")


def chat(message: dict[str, Any], reason: str | None) -> Callable[[str, dict[str, Any], int], Reply]:
    """Answer that message for that reason."""
    return lambda *_: (200, {"choices": [{"token_ids": [4, 5, 1], "finish_reason": reason, "message": message}]})


CHAT = [[{"role": "user", "content": "hi"}]]


@pytest.mark.parametrize(
    ("message", "reason", "told"),
    [
        ({"content": None, "reasoning_content": "hm"}, "length", "reasoning parser"),
        ({"content": "ok", "reasoning": "hm"}, "stop", "reasoning parser"),
        ({"content": None}, "stop", "no content in the message"),
        ({"content": None, "tool_calls": [{}]}, "tool_calls", "prompt a0.*found finish_reason 'tool_calls'"),
        ({"content": "ok", "thinking": "hm"}, "stop", "reasoning parser"),
        ({"content": "ok", "reasoning_details": [{"text": "hm"}]}, "stop", "reasoning parser"),
        ({"content": "", "tool_calls": [{"id": 1}]}, "stop", "tool_calls parser"),
        ({"content": [{"type": "image_url"}]}, "stop", "found content .*image_url"),
        ({"content": 3}, "length", "found content 3"),
        ({"content": "par"}, "content_filter", "prompt a0.*found finish_reason 'content_filter'"),
    ],
)
def test_what_the_model_did_not_write_is_no_completion(message: dict[str, Any], reason: str, told: str) -> None:
    with Fake(chat(message, reason)).running() as address, pytest.raises(EnvironmentProblem, match=told):
        ServerEngine("policy", base_url=address).generate(CHAT, Sampling(4), ["a0"])


@pytest.mark.parametrize("reason", ["abort", None])
def test_what_the_server_gave_up_is_asked_for_again(reason: str | None) -> None:
    fake = Fake(lambda path, body, n: chat({"content": "half" if n < 3 else "whole"}, reason if n < 3 else "stop")())
    with fake.running() as address:
        (found,) = ServerEngine("policy", base_url=address, first_wait=0.01).generate(CHAT, Sampling(4))
    assert [one.text for one in found] == ["whole"] and len(fake.bodies) == 3
    with Fake(chat({"content": "half"}, reason)).running() as address:
        engine = ServerEngine("policy", base_url=address, attempts=2, first_wait=0.01)
        with pytest.raises(EnvironmentProblem, match="prompt a0 was aborted by the server, 2 times"):
            engine.generate(CHAT, Sampling(4), ["a0"])


def test_nothing_of_the_models_generation_config_is_left_to_the_server() -> None:
    fake = Fake(echo)
    with fake.running() as address:
        ServerEngine("policy", base_url=address).generate(["a"], Sampling(2))
    neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert {name: fake.bodies[0][1][name] for name in neutral} == neutral


def test_a_refused_prompt_is_named_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    def strict(path: str, body: dict[str, Any], number: int) -> Reply:
        return (400, "too long") if len(body["prompt"]) > 3 else echo(path, body, number)

    with Fake(strict).running() as address, caplog.at_level("WARNING"):
        engine = ServerEngine("policy", base_url=address)
        found = dict(engine.stream(["a", "long one", "b"], Sampling(2, n=2), ["p0", "p1", "p2"]))
    assert {k: len(group) for k, group in found.items()} == {0: 2, 1: 0, 2: 2}
    assert "prompt p1 is left out" in caplog.text and "too long" in caplog.text


TOO_LONG = {"error": {"message": "maximum context length is 8", "code": "context_length_exceeded"}}


@pytest.mark.parametrize(
    "reply",
    [
        (200, TOO_LONG),
        (200, {"error": {"message": "no", "code": 400}}),
        (500, TOO_LONG),
        (500, "the request exceeds the available context size"),
    ],
)
def test_a_prompt_that_is_refused_under_another_status_stops_no_other(
    reply: Reply, caplog: pytest.LogCaptureFixture
) -> None:
    fake = Fake(lambda path, body, n: reply if len(body["prompt"]) > 3 else echo(path, body, n))
    with fake.running() as address, caplog.at_level("WARNING"):
        engine = ServerEngine("policy", base_url=address, first_wait=0.01)
        found = dict(engine.stream(["a", "long one", "b"], Sampling(2), ["p0", "p1", "p2"]))
    assert {k: len(group) for k, group in found.items()} == {0: 1, 1: 0, 2: 1}
    assert "prompt p1 is left out" in caplog.text and sum(len(body["prompt"]) > 3 for _, body in fake.bodies) == 1


@pytest.mark.parametrize("prompt", ["some text", CHAT[0]])
def test_what_every_request_is_refused_for_is_no_fault_of_a_prompt(prompt: Any) -> None:
    fake = Fake(lambda *_: (400, "unknown field min_p"))
    with fake.running() as address:
        engine = ServerEngine("policy", base_url=address)
        with pytest.raises(EnvironmentProblem, match=r"unknown field min_p.*prompt of one letter too") as error:
            list(engine.stream([prompt] * 3, Sampling(2)))
    assert error.value.code == "server-refused"


@pytest.mark.parametrize("reply", [(200, {"error": "overloaded"}), (200, {"error": {"code": 503}})])
def test_trouble_under_status_200_is_waited_out(reply: Reply) -> None:
    fake = Fake(lambda path, body, n: reply if n < 3 else echo(path, body, n))
    with fake.running() as address:
        ((found,),) = ServerEngine("policy", base_url=address, first_wait=0.01).generate(["a"], Sampling(2))
    assert found.token_ids == [4, 1] and len(fake.bodies) == 3


def test_content_in_parts_is_their_text_and_null_is_none() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "film"}]
    with Fake(chat({"content": parts}, "stop")).running() as address:
        ((found,),) = ServerEngine("policy", base_url=address).generate(CHAT, Sampling(4))
    assert found.text == "a film"
    choice = {"token_ids": [4, 1], "finish_reason": "stop", "text": None}
    null = Fake(lambda *_: (200, {"choices": [choice]}))
    with null.running() as address, pytest.raises(EnvironmentProblem, match="found no content"):
        ServerEngine("policy", base_url=address).generate(["a"], Sampling(4))


@pytest.mark.parametrize(("prompt_tokens", "window", "refused"), [(3, 64, True), (59, 64, False), (None, None, False)])
def test_a_limit_of_the_servers_own_is_no_end_of_the_window(
    prompt_tokens: int | None, window: int | None, refused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM caps every request at ``max_new_tokens`` of the model's generation config."""
    choice = {"token_ids": [4, 5, 6, 7, 8], "finish_reason": "length", "text": "cut"}
    fake = Fake(lambda *_: (200, {"choices": [choice], "usage": {"prompt_tokens": prompt_tokens}}))
    fake.entry = {"max_model_len": window}
    with fake.running() as address, caplog.at_level("WARNING"):
        engine = ServerEngine("policy", base_url=address)
        if refused:
            with pytest.raises(EnvironmentProblem, match=r"prompt p0: cut off after 5 of 9 tokens.*window of 64"):
                engine.generate(["a"], Sampling(9), ["p0"])
        else:
            assert len(engine.generate(["a", "b"], Sampling(9), ["p0", "p1"])) == 2
    assert caplog.text.count("a limit of the server's own") == (prompt_tokens is None)
