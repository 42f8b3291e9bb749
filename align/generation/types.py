"""Sampling settings, completions, the engine interface, and the seed of each sample."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from datasets import Dataset

from align.errors import DataError, listed
from align.io.console import log, progress

if TYPE_CHECKING:
    from align.models.truncation import Truncation

SAMPLING = 7
"""Revision in the stage keys; raise it when an engine gives other completions from the same seed."""
SEED_BYTES = 4
"""A 32-bit seed: torch's CPU generator reads no more of any seed."""
REPLACEMENT = "\ufffd"
"""Stands in decoded text for bytes that are no character."""
ENDS = ("stop", "length")
"""Finish reasons of a completion."""
COMPLETION = "a Completion: text, token_ids (a list of whole numbers, which are counted), finish_reason stop or length"
EngineName = Literal["auto", "vllm", "server", "transformers"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of sampling: what is drawn, and which engine draws it."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    n: int = 1
    """Completions per prompt."""
    seed: int = 0
    logprobs: bool = False
    """Also return the log-probability of every sampled token."""
    engine: EngineName = "auto"
    batch_size: int = 32
    """Rows per forward pass of the transformers engine; the other engines batch by themselves. No completion depends
    on it."""
    base_url: str | None = None
    """Address of a server, ending in ``/v1``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of ``vllm.LLM``, of ``ServerEngine`` or of ``from_pretrained``."""
    top_k: int = 0
    """Number of the most probable tokens that are sampled from; 0: all."""
    min_p: float = 0.0
    """Smallest probability of a token that is sampled, relative to the most probable one; 0: all."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, which ends before the first of them."""

    @property
    def truncation(self) -> "Truncation":
        """The cuts of what is sampled from."""
        from align.models.truncation import Truncation

        return Truncation(self.top_p, self.top_k, self.min_p)

    @property
    def as_it_is(self) -> bool:
        """Whether the model itself is sampled: at temperature 1, without a cut."""
        return self.temperature == 1 and not self.truncation.cuts

    def made_from(self) -> dict[str, Any]:
        """The fields that decide what one engine draws; they are part of stage keys."""
        added = {"top_k": self.top_k, "min_p": self.min_p, "stop": list(self.stop)}
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "n": self.n,
            "seed": self.seed,
            "logprobs": self.logprobs,
        } | {name: value for name, value in added.items() if value}


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion."""

    text: str
    """Without special tokens; prompt text + ``text`` reads as the model wrote it. If the limit of tokens cut it off
    inside a character of several tokens, it ends before that character."""
    token_ids: list[int]
    """Sampled tokens, including the end-of-sequence token if there is one."""
    finish_reason: Literal["stop", "length"]
    logprobs: list[float] | None = None
    """Log-probability (nats) of each of ``token_ids`` under the model itself: at temperature 1, without top-p. None
    unless asked for."""


class Engine(ABC):
    """Completes prompts."""

    name: str

    @abstractmethod
    def stream(
        self, prompts: Sequence[Any], sampling: Sampling, keys: Sequence[str] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (index of a prompt, its ``sampling.n`` completions), each prompt once, in the order they finish.

        An engine may yield no completions for a prompt that it cannot take; it logs the prompt's key.

        Args:
            prompts: text or messages.
            sampling: how to sample.
            keys: one for each prompt; with ``sampling.seed`` and the sample's number it decides the random numbers.
                None: ``prompt_keys(prompts)``.
        """

    def generate(
        self,
        prompts: Sequence[Any],
        sampling: Sampling,
        keys: Sequence[str] | None = None,
        *,
        leaves_out: bool = False,
    ) -> list[list[Completion]]:
        """``sampling.n`` completions of each prompt, in the order of the prompts; see ``stream``.

        Args:
            prompts: text or messages.
            sampling: how to sample.
            keys: see ``stream``.
            leaves_out: whether a prompt that the engine cannot take has no completions; otherwise it is an error.

        Raises:
            DataError: the engine cannot take a prompt, or does not yield what ``stream`` promises.
        """
        by_index: dict[int, list[Completion]] = {}
        stream = self.stream(prompts, sampling, keys)
        if not isinstance(stream, Iterable):
            raise _broken(self.name, f"{stream!r:.60}", "an iterator: write `yield` or return one")
        for index, completions in show_tokens(checked_pairs(self.name, stream), len(prompts)):
            _check_yielded(self.name, index, completions, by_index, len(prompts), sampling)
            by_index[index] = completions
        if len(by_index) < len(prompts):
            missing = next(k for k in range(len(prompts)) if k not in by_index)
            raise _broken(self.name, f"nothing for prompt {missing}", f"each of {len(prompts)} prompts once")
        refused = [k for k, found in by_index.items() if not found]
        if refused and not leaves_out:
            raise DataError(
                f"{len(refused)} of {len(prompts)} prompts are refused by the {self.name} engine, see the log:\n"
                f"{listed([(prompt_keys(prompts) if keys is None else keys)[k][:80] for k in refused])}",
                code="prompt-refused",
                hint="shorten or remove them, or raise the server's --max-model-len",
            )
        return [by_index[k] for k in range(len(prompts))]


def checked_pairs(name: str, stream: Iterable[Any]) -> Iterator[tuple[int, list[Completion]]]:
    """Pass on the items of ``Engine.stream`` that are the number of a prompt and a list of its completions.

    Raises:
        DataError: an item is something else.
    """
    for item in stream:
        pair = isinstance(item, tuple) and len(item) == 2
        if not pair or not isinstance(item[0], Integral) or not isinstance(item[1], list | tuple):
            raise _broken(name, f"{item!r:.80}", "(number of a prompt, list of its completions)")
        if wrong := next((wrong for one in item[1] if (wrong := _wrong(one))), ""):
            raise _broken(name, f"{wrong} for prompt {item[0]}", COMPLETION)
        yield int(item[0]), list(item[1])


def _wrong(completion: Any) -> str:
    """What is wrong with a completion of an engine; empty if it can be used."""
    if not isinstance(completion, Completion):
        return f"a {type(completion).__name__}"
    text: Any = completion.text
    ids: Any = completion.token_ids
    if not isinstance(text, str):
        return f"the text {text!r:.40}"
    if text and (ids is None or len(ids) == 0):
        return "a text without token_ids"
    if not isinstance(ids, list) or not all(isinstance(one, int) for one in ids):
        return f"the token_ids {ids!r:.40}"
    return "" if completion.finish_reason in ENDS else f"the finish_reason {completion.finish_reason!r:.40}"


def _check_yielded(
    name: str, index: int, completions: list[Completion], earlier: Container[int], count: int, sampling: Sampling
) -> None:
    """Check one item of ``Engine.stream``; no completions stand for a prompt that the engine refuses.

    Raises:
        DataError: an index that is none or is there twice, or another number of completions.
    """
    if not 0 <= index < count or index in earlier:
        raise _broken(
            name, f"the index {index}{' twice' if index in earlier else ''}", f"each of 0 to {count - 1} once"
        )
    if completions and len(completions) != sampling.n:
        raise _broken(name, f"{len(completions)} completions for prompt {index}", f"{sampling.n}, or none if refused")


def _broken(name: str, found: str, expected: str) -> DataError:
    return DataError(
        f"engine {name}: found {found}, expected {expected}",
        code="engine-output",
        hint="see align.generation.types.Engine.stream",
    )


def show_tokens(
    completed: Iterator[tuple[int, list[Completion]]], count: int
) -> Iterator[tuple[int, list[Completion]]]:
    """Yield ``completed`` with progress in prompts and tokens per second."""
    return progress(completed, what="generating", total=count, unit="prompts", work=_tokens, work_unit="tokens")


def prompt_keys(prompts: Sequence[Any]) -> list[str]:
    """A key for each prompt: its content, and the number of its repeat if it is repeated.

    A key depends neither on the order nor on the other prompts.
    """
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        content = json.dumps(prompt, sort_keys=True, ensure_ascii=False)
        seen[content] += 1
        keys.append(f"{content}#{seen[content]}")
    return keys


def keyed_prompts(prompts: Sequence[Any], keys: Sequence[str] | None = None) -> Dataset:
    """The table that ``SamplingJob`` reads: ``prompt`` (JSON) and ``key``, which is ``prompt_keys`` by default."""
    return Dataset.from_dict(
        {
            "prompt": [json.dumps(prompt) for prompt in prompts],
            "key": prompt_keys(prompts) if keys is None else list(keys),
        }
    )


def sample_seed(seed: int, key: str, sample: int) -> int:
    """Seed, in [0, 2**32), of sample number ``sample`` of the prompt with this key."""
    state = hashlib.sha256(f"{seed}\n{sample}\n{key}".encode()).digest()
    return int.from_bytes(state[:SEED_BYTES], "big")


def report_broken(texts: Iterable[str], what: str) -> int:
    """Number of completions with ``REPLACEMENT`` in them, with a warning if there are any."""
    count = sum(REPLACEMENT in text for text in texts)
    if count:
        log.warning("%s: %d completions hold U+FFFD: the model sampled tokens that are no characters, and as text they "
                    "are not what it sampled", what, count)  # fmt: skip
    return count


def as_completion(prompt: Any, text: str) -> Any:
    """``text`` in the form of its prompt: text, or one assistant message if the prompt is a list of messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _tokens(completed: tuple[int, list[Completion]]) -> int:
    return sum(len(completion.token_ids) for completion in completed[1])
