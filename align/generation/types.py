"""What every generation engine takes and gives, and the seeds that make a completion independent of its neighbours."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from datasets import Dataset

from align.io.console import progress

SEED_BYTES = 4
"""A 32-bit seed: what torch's generator on a CPU reads of any seed."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    n: int = 1
    """Completions per prompt."""
    seed: int = 0
    logprobs: bool = False
    """Also give the log-probability of every sampled token."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion."""

    text: str
    """So that prompt text + text reads as the model wrote it; special tokens left out."""
    token_ids: list[int]
    """Sampled tokens, the end-of-sequence token included where there is one."""
    finish_reason: Literal["stop", "length"]
    logprobs: list[float] | None = None
    """Log-probability (nats) of each of ``token_ids`` under the model itself: at temperature 1, nothing cut by top-p.
    None unless asked for."""


class Engine(Protocol):
    """Anything that completes prompts."""

    name: str

    def stream(
        self, prompts: Sequence[Any], sampling: Sampling, keys: Sequence[str] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(index of a prompt, its ``sampling.n`` completions), each prompt once, in the order in which they finish.

        Args:
            prompts: text or messages.
            sampling: how to sample.
            keys: what the random numbers of each prompt depend on beside ``sampling.seed`` and the number of the
                sample; ``prompt_keys`` where absent.
        """

    def generate(
        self, prompts: Sequence[Any], sampling: Sampling, keys: Sequence[str] | None = None
    ) -> list[list[Completion]]:
        """``sampling.n`` completions of each prompt, in the order of the prompts; see ``stream``."""


def gather(found: Iterator[tuple[int, list[Completion]]], count: int) -> list[list[Completion]]:
    """The completions of ``count`` streamed prompts in the order of the prompts, with progress."""
    by_index = dict(show_tokens(found, count))
    return [by_index[k] for k in range(count)]


def show_tokens(found: Iterator[tuple[int, list[Completion]]], count: int) -> Iterator[tuple[int, list[Completion]]]:
    """``found`` with progress in prompts and tokens per second."""
    return progress(found, what="generating", total=count, unit="prompts", work=_tokens, work_unit="tokens")


def prompt_keys(prompts: Sequence[Any]) -> list[str]:
    """A key for each prompt from its content and, where it is repeated, the number of its repeat; the order and the
    other prompts do not matter."""
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        content = json.dumps(prompt, sort_keys=True, ensure_ascii=False)
        seen[content] += 1
        keys.append(f"{content}#{seen[content]}")
    return keys


def keyed_prompts(prompts: Sequence[Any]) -> Dataset:
    """A table to complete in shards: ``prompt`` (JSON) and ``key``."""
    return Dataset.from_dict({"prompt": [json.dumps(prompt) for prompt in prompts], "key": prompt_keys(prompts)})


def sample_seed(seed: int, key: str, sample: int) -> int:
    """Seed, in [0, 2**32), of sample number ``sample`` of the prompt called ``key``."""
    state = hashlib.sha256(f"{seed}\n{sample}\n{key}".encode()).digest()
    return int.from_bytes(state[:SEED_BYTES], "big")


def _tokens(found: tuple[int, list[Completion]]) -> int:
    return sum(len(completion.token_ids) for completion in found[1])


def as_completion(prompt: Any, text: str) -> Any:
    """``text`` as a dataset would hold it beside ``prompt``: a message where the prompt is a conversation."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


SAMPLING = 2
"""What the transformers engine samples under a seed."""
