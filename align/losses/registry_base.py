"""The registry that losses of a policy and objectives of a reward model share: a name in YAML -> a function of tensors.

A spec describes one function; ``Registry.bind`` checks the parameters that a user wrote and fills in the defaults.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from align.config import nearest
from align.config.parameters import POSITIVE, Range, parameter_problems
from align.errors import ConfigError, listed


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """One entry of a registry."""

    name: str
    function: Callable[..., Tensor]
    """(tensors of B pairs, **parameters) -> one loss per pair [B]."""
    defaults: Mapping[str, float | bool]
    summary: str
    ranges: Mapping[str, Range] = field(default_factory=dict)
    """Parameter -> open interval. A number without one must be above 0, or is left to ``check`` if there is one."""
    columns: tuple[str, ...] = ()
    """Columns of the pair table that the function reads."""
    check: Callable[..., list[str]] | None = None
    """Checks parameters that depend on each other: raises ConfigError, returns warnings."""


S = TypeVar("S", bound=FunctionSpec)


@dataclass(frozen=True, slots=True)
class BoundFunction(Generic[S]):
    """A function with all its parameters."""

    spec: S
    parameters: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


class Registry(dict[str, S]):
    """Specs by name, in the order in which they are shown.

    Args:
        kind: what the functions are; the error codes are ``<kind>-name`` and ``<kind>-parameter``.
        specs: the entries.
        section: dotted YAML path that holds ``name`` and ``parameters``, for messages; None if the caller names it.
    """

    def __init__(self, kind: str, specs: Iterable[S], *, section: str | None = None) -> None:
        super().__init__({spec.name: spec for spec in specs})
        self.kind = kind
        self.section = section

    def bind(self, name: str, parameters: Mapping[str, Any]) -> tuple[S, dict[str, Any], tuple[str, ...]]:
        """Return the spec called ``name``, its defaults updated by ``parameters``, and warnings about their values.

        Raises:
            ConfigError: unknown name or parameter (with the nearest known), wrong type, value out of range; all
                problems of the parameters at once.
        """
        if name not in self:
            where = f"{self.section}.name:" if self.section else self.kind
            raise ConfigError(f"{where} {name!r} is not known{nearest(name, list(self))}", code=f"{self.kind}-name")
        spec = self[name]
        ranges = {
            key: spec.ranges.get(key, POSITIVE) for key in spec.defaults if spec.check is None or key in spec.ranges
        }
        problems = parameter_problems(name, parameters, spec.defaults, ranges)
        if problems:
            where = f"{self.section}.parameters" if self.section else f"parameters of {name}"
            raise ConfigError(f"{where}:\n{listed(problems)}", code=f"{self.kind}-parameter")
        bound = {**spec.defaults, **parameters}
        return spec, bound, tuple(spec.check(**bound)) if spec.check else ()
