"""Errors in the words of Python: fields of PreferenceConfig in place of YAML paths; code and type stay."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from align.errors import AlignError

FROM_YAML: ContextVar[bool] = ContextVar("FROM_YAML", default=False)
"""Whether the training in progress was asked for by a run file, whose paths errors then name."""
NAMES = (
    (r"train\.methods(\.[^\s:.`]+)?\.parameters", "PreferenceConfig.loss_kwargs"),
    (r"train\.methods(\.[^\s:.`]+)?\.weights", "PreferenceConfig.pair_weights"),
    (r"train\.methods(\.[^\s:.`]+)?\.remedy", "PreferenceConfig.gradient_remedy"),
    (r"train\.methods(\.[^\s:.`]+)?\.token_mask", "PreferenceConfig.token_mask"),
    (r"train\.methods\.[^\s:.`]+: parameters of", "PreferenceConfig.loss_kwargs: parameters of"),
    (r"train\.methods(\.[^\s:.`]+)?", "PreferenceConfig.loss"),
    (r"train\.trainer(?=\.)", "PreferenceConfig"),
    (r"train\.trainer", "PreferenceConfig"),
    (r"train\.peft", "peft_config"),
    (r"train\.model", "model"),
    (r"train\.(layout|max_tokens_per_device|pairs_per_step|async_checkpoints)", r"PreferenceConfig.\1"),
    (r"train\.entanglement", "the measurement during training"),
    (r"\b(the loss|loss) under PreferenceConfig\.loss\b", r"\1 as PreferenceConfig.loss"),
    (r"`weights(?=[.`])", "`PreferenceConfig.pair_weights"),
    (r"run `align reward score` first", "score the pairs first (reward_models.RewardModel.score_pairs)"),
    (r"map the column in `pairs\.columns`", "rename the column that holds it (Dataset.rename_column)"),
    (r"found true\b", "found True"),
    (r"found false\b", "found False"),
    (r"`([a-z_]+): (true|false)`", lambda found: f"`{found[1]}={found[2].capitalize()}`"),
    (r"`([a-z_]+): ([a-z_]+)`", r'`\1="\2"`'),
)
"""Pattern of a place in a run file -> what the same is called in Python, applied in this order."""


@contextmanager
def from_yaml() -> Iterator[None]:
    """Keep the paths of the run file in errors that are raised within the block."""
    token = FROM_YAML.set(True)
    try:
        yield
    finally:
        FROM_YAML.reset(token)


@contextmanager
def python_words() -> Iterator[None]:
    """Let errors name what the caller wrote: Python's names, unless a run file was read (``from_yaml``)."""
    try:
        yield
    except AlignError as error:
        if not FROM_YAML.get():
            error.message, error.hint = in_python(error.message), in_python(error.hint)
            error.args = (error.message,)
        raise


def in_python(text: str) -> str:
    """The text with the names of ``NAMES``."""
    for pattern, name in NAMES:
        text = re.sub(pattern, name, text)
    return text
