"""What every generation engine takes and gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol


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


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion."""

    text: str
    """So that prompt text + text reads as the model wrote it; special tokens left out."""
    token_ids: list[int]
    """Sampled tokens, the end-of-sequence token included where there is one."""
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """Anything that completes prompts."""

    def generate(self, prompts: Sequence[Any], sampling: Sampling) -> list[list[Completion]]:
        """``sampling.n`` completions of each prompt (text or messages), in the order of the prompts."""
