"""One entry of the registry of losses, and a loss bound to its parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from align.config.columns import THUMB
from align.errors import ConfigError
from align.losses.pairwise import PairLogps
from align.losses.registry_base import BoundFunction, FunctionSpec
from align.losses.step_statistics import StepStatistic
from align.losses.token_losses import PairTokens

TokenSource = Literal["none", "policy", "reference"]
"""Which models' tokens a loss reads one by one; ``reference`` includes the policy's."""
NO_BETA = 1.0
"""Scale of the logged implicit rewards of a loss without beta: they are log-ratios in nats."""


@dataclass(frozen=True, slots=True)
class LossSpec(FunctionSpec):
    """One loss; ``function`` is (logps, [margin,] [tokens,] [statistics,] **parameters) -> [B]."""

    formula: str = ""
    """The loss of a pair; docs/losses.md explains the letters."""
    source: str = ""
    """Paper with the equation, or the code that the formula was read in."""
    when: str = ""
    """When to use it."""
    reads_reference: bool = True
    """Whether the value depends on the reference policy."""
    tokens: TokenSource = "none"
    """The function gets ``PairTokens``, because sums over the tokens of a response are not enough."""
    statistics: Callable[[Mapping[str, Any], int], StepStatistic] | None = None
    """(parameters, seed) -> statistics over all pairs of an optimizer step, of which each pair gets its row."""

    @property
    def needs_margin(self) -> bool:
        """Whether every pair must have a reward margin."""
        return "margin" in self.columns

    @property
    def unpaired(self) -> bool:
        """Whether it is a loss of single responses with thumbs, not of pairs."""
        return THUMB in self.columns

    @property
    def coupled(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of its step, so that a single pair has no loss."""
        return self.statistics is not None

    @property
    def from_logps(self) -> bool:
        """Whether the log-probs of a single pair, and its margin, are all that the loss needs."""
        return not self.coupled and self.tokens == "none"


@dataclass(frozen=True, slots=True)
class BoundLoss(BoundFunction[LossSpec]):
    """A loss with all its parameters: (logps, margin) -> loss [B]."""

    @property
    def beta(self) -> float:
        """Strength of the pull to the reference; 1 / beta scales the implicit margin. 1 for a loss without beta."""
        return float(self.parameter("beta", NO_BETA))

    @property
    def parts(self) -> tuple["BoundLoss", ...]:
        """The losses of the registry that this one consists of."""
        return (self,)

    def parameter(self, name: str, default: float) -> float:
        """Value of a parameter, ``default`` if the loss has none of this name."""
        return float(self.parameters.get(name, default))

    def __call__(
        self,
        logps: PairLogps,
        margin: Tensor | None = None,
        trust: Tensor | None = None,
        *,
        tokens: PairTokens | None = None,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Compute the loss [B].

        Args:
            logps: log-probs of B pairs.
            margin: reward margins [B], for a loss that needs them.
            trust: trust of each pair [B], which replaces the parameter of that name; None: the parameter.
            tokens: scores token by token, for a loss that needs them.
            statistics: name of a loss -> its statistics over the step [B, K], for a coupled loss.

        Raises:
            ConfigError: the loss needs a margin and there is none.
            TypeError: the loss needs tokens or statistics and there are none.
        """
        return self.with_terms(logps, margin, trust, tokens=tokens, statistics=statistics)[0]

    def with_terms(
        self,
        logps: PairLogps,
        margin: Tensor | None = None,
        trust: Tensor | None = None,
        *,
        tokens: PairTokens | None = None,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss [B], and for a sum the value [B] of each term before its weight; see ``__call__``."""
        spec, parameters = self.spec, dict(self.parameters)
        inputs: list[Tensor | PairTokens] = []
        if spec.needs_margin:
            if margin is None:
                raise ConfigError(f"loss {spec.name} needs a margin for each pair", code="loss-needs-margin")
            inputs.append(margin)
            if trust is not None and "trust" in parameters:
                parameters["trust"] = trust
        if spec.tokens != "none":
            if tokens is None:
                raise TypeError(f"{spec.name} reads the tokens of a response; give `tokens`")
            inputs.append(tokens)
        if spec.coupled:
            if statistics is None or spec.name not in statistics:
                raise TypeError(f"{spec.name} has no loss for a single pair; give `statistics`")
            inputs.append(statistics[spec.name])
        return spec.function(logps, *inputs, **parameters), {}
