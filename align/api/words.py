"""Errors of the functions here in the words of Python: arguments in place of options, rows in place of files."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from align.errors import AlignError

OPTION = re.compile(r"--([a-z][a-z-]*)")
CALLS = {
    "run `align reward score` first": "score the pairs first: reward_models.RewardModel.from_pretrained(...)"
    ".score_pairs(pairs)",
    "score them with `align reward score`": "score them: reward_models.RewardModel.from_pretrained(...)"
    ".score_pairs(pairs)",
    "score all pairs with `align reward score`": "score all pairs: reward_models.RewardModel.from_pretrained(...)"
    ".score_pairs(pairs)",
}
"""Words that name a command -> the call that does the same."""


@contextmanager
def python_words(hints: Mapping[str, str] | None = None, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Let errors name arguments and calls; their type and code stay.

    Args:
        hints: code -> what to do, where the command line has another way out.
        names: what messages call something -> what the caller knows it by.
    """
    try:
        yield
    except AlignError as error:
        error.hint = (hints or {}).get(error.code, _in_python(error.hint))
        error.message = _in_python(error.message)
        for other, name in (names or {}).items():
            error.message = error.message.replace(other, name)
        error.args = (error.message,)
        raise


def _in_python(text: str) -> str:
    """``--max-length`` becomes ``max_length``, a command the call that does the same."""
    for command, call in CALLS.items():
        text = text.replace(command, call)
    return OPTION.sub(lambda found: found[1].replace("-", "_"), text)
