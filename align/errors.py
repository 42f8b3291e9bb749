"""Errors that the user can fix. Each has a stable code; docs/errors.md lists its cause and its fix."""

from collections.abc import Sequence

SHOWN = 20


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
