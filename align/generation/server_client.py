"""Requests to a running OpenAI-compatible server: retries with exponential backoff, and what an answer means."""

import os
import random
import re
import threading
from typing import Any

import httpx

from align.config import nearest
from align.errors import ConfigError, DataError, EnvironmentProblem, ModelError
from align.io.console import log

DEFAULT_URL = "http://localhost:8000/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT_SECONDS = 60.0
REFUSED = frozenset({400, 413, 422})
"""Statuses of a request that is itself at fault."""
TOO_LONG = re.compile(r"context.{0,9}(length|size|window)|too (long|large|many tokens)|max_model_len", re.I)
"""What servers write of a request that is longer than their window, some of them under another status."""


class ServerClient:
    """Sends requests about one model, each up to ``attempts`` times; the API key is read from ``OPENAI_API_KEY``.

    Args:
        model: the name that the server uses.
        base_url: the server's address, ending in ``/v1``.
        concurrency: requests in flight at once.
        attempts: tries for each request.
        first_wait: seconds before the second try; doubled for each further try, with jitter.
        timeout: seconds that one request may take.

    Raises:
        ConfigError: ``concurrency`` or ``attempts`` is below 1.
    """

    def __init__(
        self, model: str, *, base_url: str = DEFAULT_URL, concurrency: int = 64, attempts: int = 6,
        first_wait: float = 0.5, timeout: float = 600.0,
    ) -> None:  # fmt: skip
        if concurrency < 1 or attempts < 1:
            raise ConfigError(
                f"server engine: found concurrency {concurrency} and attempts {attempts}, expected 1 or more",
                code="engine-option",
            )
        self.model = model
        self.base_url = base_url.strip().rstrip("/")
        self.concurrency = concurrency
        self.attempts = attempts
        self.first_wait = first_wait
        self.stopping = threading.Event()
        """Set when no further try is to be made."""
        self.window: int | None = None
        """Tokens of a prompt and its completion at most; None if the server does not say."""
        key = os.environ.get(KEY_VARIABLE)
        self._client = httpx.Client(
            timeout=timeout,
            limits=httpx.Limits(max_connections=concurrency),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    def check_model(self, *, hint: str = "give --model the name that the server uses") -> None:
        """Ask the server whether it serves the model.

        Args:
            hint: what to do if it does not.

        Raises:
            EnvironmentProblem: the server cannot be reached.
            ModelError: it does not serve the model.
        """
        listed = self.request("GET", "/models").get("data")
        entries = {str(entry.get("id")): entry for entry in listed or () if isinstance(entry, dict)}
        served = list(entries)
        if self.model not in served:
            raise ModelError(
                f"{self.base_url} does not serve {self.model!r}{nearest(self.model, served)}",
                code="server-model",
                hint=hint,
            )
        window = entries[self.model].get("max_model_len")
        self.window = window if isinstance(window, int) else None

    def wait(self, attempt: int) -> bool:
        """Wait after try number ``attempt``; True if no further one is to be made."""
        return self.stopping.wait(min(LONGEST_WAIT_SECONDS, self.first_wait * 2 ** (attempt - 1)))

    def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, at_root: bool = False
    ) -> dict[str, Any]:
        """The JSON object in the server's answer, after up to ``attempts`` tries.

        Args:
            method: GET or POST.
            path: what follows the address.
            body: sent as JSON.
            at_root: the path follows the address without its ``/v1``.

        Raises:
            EnvironmentProblem: the server cannot be reached or refuses every request, or the answer is no object.
            DataError: it refuses this request.
        """
        url = (self.base_url.removesuffix("/v1") if at_root else self.base_url) + path
        for attempt in range(1, self.attempts + 1):
            wait = min(LONGEST_WAIT_SECONDS, self.first_wait * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
            try:
                response = self._client.request(method, url, json=body)
            except httpx.HTTPError as error:
                problem = f"no answer ({type(error).__name__}: {error})"
            except httpx.InvalidURL as error:
                raise self.unreachable(f"not an address ({error})") from None
            else:
                status = _status(response)
                if status < 400:
                    return self._object(response)
                problem = f"status {response.status_code}: {_text(response)}"
                if status not in RETRIED:
                    raise self._refused(status, problem)
                wait = max(wait, _retry_after(response))
            if attempt < self.attempts:
                log.debug("%s: %s; again in %.1f s", url, problem, wait)
                if self.stopping.wait(wait):
                    break
        raise self.unreachable(f"{problem}, after {attempt} tries")

    def _object(self, response: httpx.Response) -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise EnvironmentProblem(
                f"{self.base_url}: found {_text(response)!r}, expected a JSON object",
                code="server-response",
                hint="is this the address of an OpenAI-compatible server, ending in /v1?",
            )
        return answer

    def _refused(self, status: int, problem: str) -> EnvironmentProblem | DataError:
        if status in REFUSED:
            return DataError(
                f"{self.base_url} refuses a request ({problem})",
                code="prompt-refused",
                hint="shorten the prompt, or raise the server's --max-model-len",
            )
        hint = f"set {KEY_VARIABLE}" if status in (401, 403) else "check --base-url; it ends in /v1"
        return EnvironmentProblem(f"{self.base_url} refuses a request ({problem})", code="server-refused", hint=hint)

    def unreachable(self, problem: str) -> EnvironmentProblem:
        """The error of a server that gave no answer."""
        return EnvironmentProblem(
            f"{self.base_url}: {problem}",
            code="server-unreachable",
            hint=f"start it with `vllm serve {self.model}`, or give its --base-url",
        )


def _status(response: httpx.Response) -> int:
    """The status that an answer means: that of an error in its body, and 400 for a prompt that is too long, for which
    some servers answer 500, or 200.
    """
    status = response.status_code
    try:
        answer = response.json()
    except ValueError:
        answer = None
    error = answer.get("error") if isinstance(answer, dict) and "choices" not in answer else None
    if response.is_success and error:
        code = str(error.get("code")) if isinstance(error, dict) else ""
        status = int(code) if re.fullmatch("[45][0-9][0-9]", code) else 500
    return 400 if status >= 500 and TOO_LONG.search(response.text) else status


def _text(response: httpx.Response) -> str:
    return " ".join(response.text.split())[:300]


def _retry_after(response: httpx.Response) -> float:
    value = response.headers.get("Retry-After", "")
    return min(LONGEST_WAIT_SECONDS, float(value)) if value.isdigit() else 0.0
