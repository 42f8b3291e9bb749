"""How models read what they score: parts of the keys of scores, changed where the same model gives other scores."""

from collections.abc import Iterable
from typing import Any

ANSWERS = "own logits"
"""Of judges that are asked for a word (reward_models/llm_judge.py)."""
ASKING = frozenset({"rubric", "yes_no"})
"""Quality scorers that are such judges."""
MESSAGES = "special tokens of the template alone"
"""Of reward models that read messages (reward_models/text.py)."""


def reading(prompts: Iterable[Any]) -> list[str]:
    """What else the key of rewards of responses to prompts holds: ``MESSAGES`` if any are messages, else nothing."""
    return [] if all(isinstance(prompt, str) for prompt in prompts) else [MESSAGES]
