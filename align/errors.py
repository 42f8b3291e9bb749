"""Errors that the user can fix. Each has a stable code; docs/errors.md lists its cause and its fix."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

SHOWN = 20
OPTION = re.compile(r"(?<!['\w])--([a-z][a-z-]*)")
SCORE_PAIRS = "reward_models.RewardModel.from_pretrained(...).score_pairs(pairs)"
CALLS = {
    "run `align reward score` first": f"score the pairs first: {SCORE_PAIRS}",
    "score them with `align reward score`": f"score them: {SCORE_PAIRS}",
    "score all pairs with `align reward score`": f"score all pairs: {SCORE_PAIRS}",
    "reward.max_length": "max_length",
    "`reward.pairs.columns`": "columns of `pairs_from_dataset`",
    "`reward.objective`": "`objective`",
    "reward.objective.name": "objective",
    "reward.objective.parameters": "objective_kwargs",
}
"""Words of messages that name a command or a YAML key -> what they are called in Python."""
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
    (
        r"train\.(layout|turns|max_tokens_per_device|group_by_prompt|pairs_per_step|async_checkpoints)",
        r"PreferenceConfig.\1",
    ),
    (r"train\.entanglement", "the measurement during training"),
    (r"train\.reference", "ref_model"),
    (r"train\.eval_pairs", "eval_dataset"),
    (r"train\.(keep|early_stopping|eval_samples)", r"a run file's \1"),
    (r"\b(the loss|loss) under PreferenceConfig\.loss\b", r"\1 as PreferenceConfig.loss"),
    (r"`weights(?=[.`])", "`PreferenceConfig.pair_weights"),
    (r"map the column in `pairs\.columns`", "rename the column that holds it (Dataset.rename_column)"),
    (r"found true\b", "found True"),
    (r"found false\b", "found False"),
    (r"`([a-z_]+): (true|false)`", lambda found: f"`{found[1]}={found[2].capitalize()}`"),
    (r"`([a-z_]+): ([a-z_]+)`", r'`\1="\2"`'),
)
"""Pattern of a place in a run file -> what the same is called in Python, applied in this order, before ``CALLS``."""


class AlignError(Exception):
    """An error that the user can fix: exit code 2, one message, no traceback.

    Args:
        message: the place of the error, what was found, what was expected.
        code: stable short code such as ``config-key``; listed in docs/errors.md.
        hint: one thing to do next, or an empty string.
    """

    def __init__(self, message: str, *, code: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.code, self.hint))

    def __str__(self) -> str:
        tail = f"\n  do: {self.hint}" if self.hint else ""
        return f"[{self.code}] {self.message}{tail}"


class ConfigError(AlignError, ValueError):
    """A configuration file or an override is wrong."""


class DataError(AlignError, ValueError):
    """A dataset is missing or unreadable, or has rows that cannot be used."""


class ModelError(AlignError, ValueError):
    """A model folder or id cannot be used as requested."""


class NumericsError(AlignError, ArithmeticError):
    """A loss, gradient or weight is not finite."""


class EnvironmentProblem(AlignError, RuntimeError):
    """Something outside the configuration is missing: a package, the network, disk space."""


def _rebuild(kind: type[AlignError], message: str, code: str, hint: str) -> AlignError:
    return kind(message, code=code, hint=hint)


def listed(problems: Sequence[str], *, shown: int = SHOWN) -> str:
    """The first ``shown`` problems, one per line, then the number of the others."""
    lines = [f"  {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  ... and {len(problems) - shown} more")
    return "\n".join(lines)


@contextmanager
def from_yaml() -> Iterator[None]:
    """Keep the paths of the run file in errors that are raised within the block."""
    token = FROM_YAML.set(True)
    try:
        yield
    finally:
        FROM_YAML.reset(token)


@contextmanager
def python_words(hints: Mapping[str, str] | None = None, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Let errors of the block name arguments and calls in place of run-file paths, options and commands.

    Type and code stay. Within ``from_yaml`` the message stays too, since a run file was read.

    Args:
        hints: code -> what to do, where the command line has another way out.
        names: what messages call something -> what the caller knows it by.
    """
    try:
        yield
    except AlignError as error:
        if not FROM_YAML.get():
            error.hint = (hints or {}).get(error.code, in_python(error.hint))
            error.message = in_python(error.message)
            for other, name in (names or {}).items():
                error.message = error.message.replace(other, name)
            error.args = (error.message,)
        raise


def in_python(text: str) -> str:
    """The text in the words of Python: ``--max-length`` becomes ``max_length``, a command the call like it."""
    for pattern, name in NAMES:
        text = re.sub(pattern, name, text)
    for command, call in CALLS.items():
        text = text.replace(command, call)
    return OPTION.sub(lambda found: found[1].replace("-", "_"), text)
