"""Errors that are the user's to mend. Each has a stable code, listed with cause and cure in docs/errors.md."""

from collections.abc import Sequence

SHOWN = 20


class AlignError(Exception):
    """A mistake the user can mend: exit code 2, one message, no traceback.

    Args:
        message: what is wrong and where, what was found, what was expected.
        code: stable short code such as ``config-key``; listed in docs/errors.md.
        hint: one thing to do next, or empty.
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
    """A dataset is missing, unreadable, or holds rows that cannot be used."""


class ModelError(AlignError, ValueError):
    """A model folder or id cannot be used as asked."""


class NumericsError(AlignError, ArithmeticError):
    """A training has left the finite numbers."""


class EnvironmentProblem(AlignError, RuntimeError):
    """Something outside the configuration is missing: a package, the network, disk space."""


def _rebuild(kind: type[AlignError], message: str, code: str, hint: str) -> AlignError:
    return kind(message, code=code, hint=hint)


def listed(problems: Sequence[str], *, shown: int = SHOWN) -> str:
    """The first ``shown`` problems, one a line, then a count of the rest."""
    lines = [f"  {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  ... and {len(problems) - shown} more")
    return "\n".join(lines)
