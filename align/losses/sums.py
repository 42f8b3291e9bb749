"""Weighted sums of losses, and a loss as the configuration of a method gives it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from align.config import LossSection, nearest
from align.errors import ConfigError, listed
from align.losses.pairwise import PairLogps
from align.losses.registry import ALIASES, LOSSES, known_as, resolve
from align.losses.spec import BoundLoss, LossSpec
from align.losses.token_losses import PairTokens

TRL_DEFAULTS = {"beta": 0.1, "label_smoothing": 0.0, "discopop_tau": 0.05}
"""Defaults of trl's DPOConfig that differ from one's own of a loss here; ``loss_type`` gets them."""
TERM_KEYS = ("weight", "parameters")


@dataclass(frozen=True, slots=True)
class SumSpec(LossSpec):
    """What a sum needs: whatever one of its terms needs."""

    parts: tuple[LossSpec, ...] = ()

    @property
    def coupled(self) -> bool:
        """Whether a term is coupled."""
        return any(part.coupled for part in self.parts)


@dataclass(frozen=True, slots=True)
class LossSum(BoundLoss):
    """A sum of weight * loss over several losses; parameters are named ``<loss>.<parameter>``."""

    terms: tuple[tuple[float, BoundLoss], ...] = ()

    @property
    def parts(self) -> tuple[BoundLoss, ...]:
        """The losses of the terms."""
        return tuple(loss for _, loss in self.terms)

    def parameter(self, name: str, default: float) -> float:
        """Value of a parameter in the first term that has it, ``default`` if none has."""
        return next((float(loss.parameters[name]) for loss in self.parts if name in loss.parameters), default)

    def with_terms(
        self,
        logps: PairLogps,
        margin: Tensor | None = None,
        trust: Tensor | None = None,
        *,
        tokens: PairTokens | None = None,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``BoundLoss.with_terms``."""
        values = {
            loss.spec.name: loss(logps, margin, trust, tokens=tokens, statistics=statistics) for loss in self.parts
        }
        total = sum(weight * values[loss.spec.name] for weight, loss in self.terms)
        assert isinstance(total, Tensor)
        return total, values


def bind_section(section: LossSection) -> BoundLoss:
    """Return the loss of a method: of one name, a weighted sum, or a ``loss_type`` of trl's with ``loss_weights``.

    Raises:
        ConfigError: unknown names or parameters, values out of range, weights that are missing or not above 0; all
            problems of a sum at once.
    """
    if section.loss_type is not None:
        names = [section.loss_type] if isinstance(section.loss_type, str) else section.loss_type
        return resolve_trl(names, section.loss_weights, section.parameters)
    if isinstance(section.loss, str):
        return resolve(section.loss, section.parameters)
    assert section.loss is not None
    return resolve_sum(section.loss.terms, section.parameters)


def resolve_trl(names: Sequence[str], weights: Sequence[float] | None, parameters: Mapping[str, Any]) -> BoundLoss:
    """Return the sum that trl's ``loss_type`` and ``loss_weights`` describe, with trl's defaults.

    Args:
        names: trl's names, or names of the registry.
        weights: weight of each; None: 1.
        parameters: beta, label_smoothing and discopop_tau as in trl's DPOConfig, or parameters of the registry.

    Raises:
        ConfigError: see ``bind_section``.
    """
    given = [1.0] * len(names) if weights is None else list(weights)
    problems = []
    if len(given) != len(names):
        problems.append(f"loss_weights: found {len(given)} for {len(names)} names in loss_type")
    repeated = sorted({name for name in names if [known_as(other) for other in names].count(known_as(name)) > 1})
    problems += [f"loss_type: {name!r} stands there more than once" for name in repeated]
    if problems:
        raise _refused(problems)
    terms: dict[str, Any] = {}
    for name, weight in zip(names, given, strict=True):
        spec = LOSSES.get(known_as(name))
        defaults = {} if spec is None else {key: TRL_DEFAULTS[key] for key in spec.defaults if key in TRL_DEFAULTS}
        if spec is not None and spec.name == "exo_pair":  # trl's 0 has no logarithm; it asks for the paper's value
            del defaults["label_smoothing"]
        left = {key: value for key, value in defaults.items() if key not in parameters}
        terms[name] = {"weight": weight, "parameters": left}
    return resolve_sum(terms, parameters)


def resolve_sum(terms: Mapping[str, Any], parameters: Mapping[str, Any]) -> BoundLoss:
    """Return a weighted sum of losses.

    A single term of weight 1 is that loss itself.

    Args:
        terms: name -> weight, or -> {weight, parameters}.
        parameters: parameters of every term that knows them, unless the term has its own.

    Raises:
        ConfigError: see ``bind_section``.
    """
    problems: list[str] = []
    bound: list[tuple[float, BoundLoss]] = []
    specs = [LOSSES[known_as(name)] for name in terms if known_as(name) in LOSSES]
    for key in parameters:
        if specs and not any(key in spec.defaults for spec in specs):
            names = " or ".join(dict.fromkeys(spec.name for spec in specs))
            known = sorted({name for spec in specs for name in spec.defaults})
            problems.append(f"parameters.{key}: not a parameter of {names}{nearest(key, known) if known else ''}")
    seen: dict[str, str] = {}
    for name, value in terms.items():
        own, found = _term(name, value)
        problems += found
        spec = LOSSES.get(known_as(name))
        if spec is None:
            problems.append(f"{name}: not a loss{nearest(name, [*LOSSES, *ALIASES])}")
            continue
        if spec.name in seen:
            problems.append(f"{name}: is the loss {spec.name}, which is there already as {seen[spec.name]}")
        seen[spec.name] = name
        shared = {key: value for key, value in parameters.items() if key in spec.defaults}
        try:
            loss = resolve(name, shared | own["parameters"])
        except ConfigError as error:
            problems.append(f"{name}: {' '.join(error.message.split())}")
            continue
        bound.append((own["weight"], loss))
    if problems:
        raise _refused(problems)
    if len(bound) == 1 and bound[0][0] == 1.0:
        return bound[0][1]
    return _sum(bound)


def _term(name: str, value: Any) -> tuple[dict[str, Any], list[str]]:
    """Weight and own parameters of a term, and what is wrong with them."""
    own: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"weight": value}
    problems = []
    if own.pop("reference", None) is not None:
        problems.append(f"{name}.reference: all terms of a training share one reference, the model that it starts from")
    problems += [
        f"{name}.{key}: unknown key{nearest(str(key), list(TERM_KEYS))}" for key in own if key not in TERM_KEYS
    ]
    weight, parameters = own.get("weight"), own.get("parameters", {})
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is None:
        problems.append(f"{name}: found no weight, expected a number above 0")
    elif not number or not (0 < weight < math.inf):
        problems.append(f"{name}: found the weight {weight!r}, expected a number above 0")
    if not isinstance(parameters, Mapping):
        problems.append(f"{name}.parameters: found {parameters!r}, expected a mapping")
        parameters = {}
    return {"weight": float(weight or 0.0) if number else 0.0, "parameters": dict(parameters)}, problems


def _sum(terms: Sequence[tuple[float, BoundLoss]]) -> LossSum:
    specs = tuple(loss.spec for _, loss in terms)
    if len({spec.unpaired for spec in specs}) > 1:
        single = ", ".join(spec.name for spec in specs if spec.unpaired)
        raise _refused([f"{single}: a loss of single responses, and the other terms are losses of pairs"])
    sources = {spec.tokens for spec in specs}
    spec = SumSpec(
        name=" + ".join(loss.spec.name if weight == 1 else f"{weight:g} {loss.spec.name}" for weight, loss in terms),
        function=_has_no_function,
        defaults={},
        summary="a weighted sum",
        columns=tuple(dict.fromkeys(column for spec in specs for column in spec.columns)),
        reads_reference=any(spec.reads_reference for spec in specs),
        tokens=next(source for source in ("reference", "policy", "none") if source in sources),
        parts=specs,
    )
    parameters = {f"{loss.spec.name}.{key}": value for _, loss in terms for key, value in loss.parameters.items()}
    warnings = tuple(warning for _, loss in terms for warning in loss.warnings)
    return LossSum(spec, parameters, warnings, tuple(terms))


def _has_no_function(*_: Any, **__: Any) -> Tensor:
    raise TypeError("a sum is computed by its terms")


def _refused(problems: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"loss:\n{listed(problems)}",
        code="loss-terms",
        hint="give each loss once, with a weight above 0: `loss: {terms: {dpo: 1.0, nll: 0.1}}`",
    )
