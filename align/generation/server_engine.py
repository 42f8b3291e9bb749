"""Sampling by a running OpenAI-compatible server, such as ``vllm serve MODEL``."""

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from align.config.columns import TEMPLATE_KWARGS
from align.data.messages import split_arguments, with_arguments
from align.errors import DataError, EnvironmentProblem
from align.generation.server_client import DEFAULT_URL, TOO_LONG, ServerClient
from align.generation.types import ENDS, REPLACEMENT, Completion, Engine, Sampling, prompt_keys, sample_seed
from align.io.console import log

T = TypeVar("T")
ABORTED = ("abort", "error", None)
"""Finish reasons of a completion that the server gave up; it is asked for again."""
LEAST_LOGPROB, LOGPROB_ROUNDING = -9999.0, 1e-3
"""Nats between which log-probs of sampled tokens lie; servers send the first for tokens of probability 0."""
TAKEN = ("reason", "think", "thought", "tool_call", "function_call", "refusal")
"""Beginnings of the names of fields into which a server's parsers move what the model wrote."""
SHORT = "a"
"""A prompt that no server refuses for its length."""


class ServerEngine(Engine):
    """Send one request per sample, with bounded concurrency, retries with exponential backoff and a seed for each.

    Text goes to ``/completions``, messages to ``/chat/completions``, where the server applies its chat template, with
    ``tools`` and ``chat_template_kwargs`` of the prompt. The server must return token ids (vLLM 0.10.2 or newer does).
    Its batches round as described at ``VllmEngine``. The API key is read from the environment variable
    ``OPENAI_API_KEY``.

    Args:
        model: the name that the server uses; for an adapter, the name given to ``--lora-modules``.
        base_url: the server's address, ending in ``/v1``.
        concurrency: requests in flight at once.
        attempts: tries for each request.
        first_wait: seconds before the second try; doubled for each further try, with jitter.
        timeout: seconds that one request may take.

    Raises:
        EnvironmentProblem: the server cannot be reached.
        ModelError: it does not serve the model.
    """

    name = "server"

    def __init__(
        self,
        model: str,
        *,
        base_url: str = DEFAULT_URL,
        concurrency: int = 64,
        attempts: int = 6,
        first_wait: float = 0.5,
        timeout: float = 600.0,
    ) -> None:
        self.model = model
        self.concurrency = concurrency
        self.client = ServerClient(
            model, base_url=base_url, concurrency=concurrency, attempts=attempts, first_wait=first_wait,
            timeout=timeout,
        )  # fmt: skip
        self.base_url, self.attempts = self.client.base_url, attempts
        self.client.check_model()
        self._first = threading.Lock()
        self._takes_requests = False
        """Whether a request has been answered with a completion."""
        self._told_short = False

    def stream(
        self, prompts: Sequence[Any], sampling: Sampling, keys: Sequence[str] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (index of a prompt, its completions) as answers arrive; none for a prompt that the server refuses.

        Raises:
            EnvironmentProblem: a request failed ``attempts`` times, or the answer is not as expected.
        """
        keys = prompt_keys(prompts) if keys is None else keys
        found: dict[int, dict[int, Completion]] = {}
        refused: set[int] = set()
        jobs = [
            partial(self._complete, prompt, sample_seed(sampling.seed, key, sample), sampling, key)
            for prompt, key in zip(prompts, keys, strict=True)
            for sample in range(sampling.n)
        ]
        stopping = self.client.stopping = threading.Event()
        self._check_arguments(prompts)
        for number, completion in in_threads(jobs, self.concurrency, stopping):
            k, sample = divmod(number, sampling.n)
            if completion is None:
                if k not in refused:
                    refused.add(k)
                    yield k, []
                continue
            group = found.setdefault(k, {})
            group[sample] = completion
            if len(group) == sampling.n:
                yield k, [group[number] for number in range(sampling.n)]
                del found[k]

    def _complete(self, prompt: Any, seed: int, sampling: Sampling, key: str) -> Completion | None:
        """One completion; None if the server refuses the prompt, which is logged with its key."""
        path, body, reader = self._body(prompt, seed, sampling)
        for attempt in range(1, self.attempts + 1):
            try:
                answer = self.client.request("POST", path, body)
            except DataError as error:
                if not TOO_LONG.search(error.message):
                    self._check_refusal(path, body)
                log.warning("prompt %s is left out: %s", key, error.message)
                return None
            self._takes_requests = True
            completion = self._read(answer, reader, sampling, key)
            if completion is not None:
                return completion
            log.debug("%s: prompt %s was aborted, try %d of %d", self.base_url, key, attempt, self.attempts)
            if self.client.wait(attempt):
                break
        raise self.client.unreachable(f"prompt {key} was aborted by the server, {attempt} times")

    def _check_refusal(self, path: str, body: dict[str, Any]) -> None:
        """After a prompt was refused for another reason than its length, and before any was completed: ask for the
        completion of a short one.

        Raises:
            EnvironmentProblem: it is refused as well, so the prompt is not what the server refuses.
        """
        with self._first:
            if self._takes_requests:
                return
            short: Any = SHORT if "prompt" in body else [{"role": "user", "content": SHORT}]
            asked = {name: value for name, value in body.items() if name not in ("tools", "tool_choice")}
            try:
                self.client.request("POST", path, asked | {"prompt" if "prompt" in body else "messages": short})
            except DataError as error:
                raise EnvironmentProblem(
                    f"{error.message}; it refuses a prompt of one letter too",
                    code="server-refused",
                    hint="see what it says: --max-new-tokens beyond its window, a field that it does not know, or no "
                    "chat template",
                ) from None
            self._takes_requests = True

    def _body(self, prompt: Any, seed: int, sampling: Sampling) -> tuple[str, dict[str, Any], Any]:
        """Path and body of a request, and the reader of its answer.

        Fields that a server fills from the model's generation config are set to what changes nothing.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
            "return_token_ids": True,
        } | ({"stop": list(sampling.stop)} if sampling.stop else {})
        if isinstance(prompt, str):
            body |= {"prompt": prompt} | ({"logprobs": 0} if sampling.logprobs else {})
            return "/completions", body, _from_text
        messages, arguments = split_arguments(prompt)
        if "tools" in arguments:  # the template describes them, and no parser takes calls out of the text
            arguments |= {"tool_choice": "none"}
        body |= {"messages": messages, **arguments}
        body |= {"logprobs": True, "top_logprobs": 0} if sampling.logprobs else {}
        return "/chat/completions", body, _from_chat

    def _check_arguments(self, prompts: Sequence[Any]) -> None:
        """Warn if a prompt has the same tokens without its ``tools`` or its ``chat_template_kwargs``."""
        found: dict[tuple[str, str], Any] = {}
        for prompt in prompts:
            for name, value in split_arguments(prompt)[1].items():
                found.setdefault((name, json.dumps(value) if name == TEMPLATE_KWARGS else ""), prompt)
        for (name, text), prompt in found.items():
            messages, arguments = split_arguments(prompt)
            try:
                ids = [self._prompt_ids(one) for one in (prompt, with_arguments(messages, arguments | {name: None}))]
            except DataError:
                continue  # the prompt is refused, which is told where it is completed
            if None in ids:
                log.warning(
                    "%s returns no prompt_token_ids, so whether it renders %s is not known", self.base_url, name
                )
            elif ids[0] == ids[1]:
                log.warning("%s: %s %s changes no token of a prompt: it is the default, or it is not rendered there",
                            self.base_url, name, text)  # fmt: skip

    def _prompt_ids(self, prompt: Any) -> list[int] | None:
        """Token ids of a prompt as the server renders it; None if it does not say."""
        path, body, _ = self._body(prompt, 0, Sampling(1))
        found = self.client.request("POST", path, body).get("prompt_token_ids")
        return [int(token) for token in found] if isinstance(found, list) else None

    def _read(self, answer: dict[str, Any], reader: Any, sampling: Sampling, key: str) -> Completion | None:
        """The completion in an answer; None if the server aborted it.

        Raises:
            EnvironmentProblem: the answer lacks something, or is not what the model wrote: a tool call or reasoning
                that a parser of the server took out, a text that a filter stopped, or one that the server's own limit
                of tokens cut off.
        """
        try:
            choice = answer["choices"][0]
            token_ids = list(choice["token_ids"])
            text, logprobs = reader(choice)
            reason = choice["finish_reason"]
            if reason not in ABORTED:
                check_answer(text, token_ids, logprobs, sampling)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EnvironmentProblem(
                f"{self.base_url}: prompt {key}: the answer lacks what is needed ({type(error).__name__}: {error})",
                code="server-response",
                hint="use `vllm serve` 0.10.2 or newer, which returns token ids, without --reasoning-parser and "
                "--tool-call-parser, which take text away",
            ) from None
        if reason in ABORTED:
            return None
        if reason not in ENDS:
            raise EnvironmentProblem(
                f"{self.base_url}: prompt {key}: found finish_reason {reason!r}, expected stop or length",
                code="server-response",
                hint="start the server without tool parsers and content filters: they change what the model wrote",
            )
        if reason == "length" and len(token_ids) < sampling.max_new_tokens:
            self._check_cut(answer, len(token_ids), sampling.max_new_tokens, key)
        whole = text.rstrip(REPLACEMENT) if reason == "length" else text  # it was cut off inside a character
        return Completion(whole, token_ids, reason, logprobs)

    def _check_cut(self, answer: dict[str, Any], tokens: int, wanted: int, key: str) -> None:
        """Refuse a completion that the server cut off before its window ends; warn once where the window is unknown.

        vLLM takes ``max_new_tokens`` of the model's generation config as a limit for all requests.
        """
        usage = answer.get("usage")
        prompt = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        cut = f"{self.base_url}: prompt {key}: cut off after {tokens} of {wanted} tokens"
        if isinstance(prompt, int) and self.client.window is not None:
            if prompt + tokens < self.client.window - 1:
                raise EnvironmentProblem(
                    f"{cut} and a prompt of {prompt}, expected all of them within the window of {self.client.window}",
                    code="server-response",
                    hint="the server has a limit of its own: start it with --generation-config vllm",
                )
        elif not self._told_short:
            self._told_short = True
            log.warning("%s: by the end of the window, or by a limit of the server's own, such as max_new_tokens in "
                        "the model's generation config", cut)  # fmt: skip


def check_answer(text: str, token_ids: list[Any], logprobs: list[float] | None, sampling: Sampling) -> None:
    """Check that an answer is what was asked for.

    Args:
        text: of the completion.
        token_ids: of the completion, as the server sent them.
        logprobs: of its tokens in nats, None where they were not sent.
        sampling: what was asked for.

    Raises:
        ValueError: token ids that are none, text without tokens, a stop or a limit of tokens that was not obeyed, or
            values that are no log-probs of sampled tokens.
    """
    if not all(type(token) is int and token >= 0 for token in token_ids):
        raise ValueError(f"found token ids {token_ids[:8]!r:.60}, expected whole numbers of at least 0")
    if text and not token_ids:
        raise ValueError(f"found the text {text[:40]!r} and no token ids")
    if len(token_ids) > sampling.max_new_tokens:
        raise ValueError(f"found {len(token_ids)} tokens, and {sampling.max_new_tokens} were asked for at most")
    kept = next((stop for stop in sampling.stop if stop in text), None)
    if kept is not None:
        raise ValueError(f"its text holds {kept!r}, before which it was to stop")
    if sampling.logprobs and (logprobs is None or len(logprobs) != len(token_ids)):
        raise ValueError("no log-prob for each token, which were asked for")
    wrong = [value for value in logprobs or () if not LEAST_LOGPROB < value <= LOGPROB_ROUNDING]
    if sampling.logprobs and wrong:
        raise ValueError(f"found {wrong[0]:g}, expected the log-prob of a token that was sampled")


def in_threads(jobs: Sequence[Callable[[], T]], threads: int, stopping: threading.Event) -> Iterator[tuple[int, T]]:
    """Yield (index of a job, its result) as jobs end; raise the first failure.

    Once the iterator is closed, nothing waits for running jobs, not even the end of the program: a request may take
    minutes.

    Args:
        jobs: functions to call, started in this order.
        threads: jobs that run at a time.
        stopping: set when a job fails or the iterator is closed; no further job is started then.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    ended: queue.SimpleQueue[tuple[int, T | BaseException]] = queue.SimpleQueue()
    for number in range(len(jobs)):
        todo.put(number)

    def work() -> None:
        while not stopping.is_set():
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            try:
                ended.put((number, jobs[number]()))
            except BaseException as error:  # raised again by the loop that reads the results
                stopping.set()
                ended.put((number, error))

    for number in range(min(threads, len(jobs))):
        threading.Thread(target=work, name=f"request-{number}", daemon=True).start()
    try:
        for _ in jobs:
            number, result = ended.get()
            if isinstance(result, BaseException):
                raise result
            yield number, result
    finally:
        stopping.set()


def _from_text(choice: dict[str, Any]) -> tuple[str, list[float] | None]:
    logprobs = choice.get("logprobs")
    _check_taken(choice)
    return _written(choice["text"]), None if logprobs is None else [float(v) for v in logprobs["token_logprobs"]]


def _from_chat(choice: dict[str, Any]) -> tuple[str, list[float] | None]:
    logprobs = choice.get("logprobs")
    values = None if logprobs is None else [float(entry["logprob"]) for entry in logprobs["content"]]
    message, reason = choice["message"], choice["finish_reason"]
    if reason in ENDS:
        _check_taken(message)
    content = message["content"]
    if content is None and reason not in ENDS:
        return "", values
    return _written(content), values


def _check_taken(found: dict[str, Any]) -> None:
    """Refuse an answer of which a part stands in another field than its text.

    Raises:
        ValueError: names the field.
    """
    for name, value in found.items():
        if name.startswith(TAKEN) and value:
            what = "reasoning" if name.startswith(("reason", "think", "thought")) else name
            raise ValueError(f"the server's {what} parser took text into {name}; start it without one")


def _written(content: Any) -> str:
    """The text of a completion, also where it comes in parts.

    Raises:
        ValueError: it is no text.
    """
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(content, str):
        found = "no content" if content is None else f"content {json.dumps(content)[:60]}"
        raise ValueError(f"found {found} in the message; start the server without reasoning and tool parsers")
    return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # halves of a character have no UTF-8
