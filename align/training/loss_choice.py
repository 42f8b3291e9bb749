"""The loss of a training: from a run file, or from the arguments and the ``loss`` of a trainer made in Python."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from trl import DPOConfig

from align.config import LossSection, RemedySection, Section, TokenMaskSection, WeightsSection, nearest
from align.config.reading import section_from
from align.errors import ConfigError
from align.losses.pairwise import PairLogps
from align.losses.registry import LOSSES, BoundLoss, LossSpec, known_as, resolve
from align.losses.sums import bind_section
from align.training.columns import check_weights

PairLoss = Callable[[PairLogps, Tensor], Tensor]
"""(log-probs of B pairs, margins [B]) -> one loss per pair [B]."""
DEFAULT = "dpo"
DEFAULT_TYPE = ["sigmoid"]
BETA = 0.1
"""beta of trl.DPOConfig unless it is set."""
OWNER = "PreferenceConfig"
SMOOTHING = "label_smoothing"
OWN = "own_loss"
"""Name of a loss that is a function without a name."""
TRIAL = (
    (-3.0, -5.0, -4.0), (-6.0, -4.0, -9.0), (-3.5, -4.0, -4.5), (-5.0, -5.5, -7.0), (2.0, 3.0, 4.0), (0.5, -1.0, 2.0),
)  # fmt: skip
"""Three pairs on which a function is tried: log-probs chosen, rejected, by the reference; lengths; margins."""
S = TypeVar("S", bound=Section)


def bind(method: str, config: LossSection) -> BoundLoss:
    """Return the loss of ``train.methods.<method>`` with its parameters checked.

    Raises:
        ConfigError: unknown loss or parameter, value out of range, a remedy, mask or weight that does not fit the loss.
    """
    try:
        loss = bind_section(config)
    except ConfigError as error:
        raise ConfigError(f"train.methods.{method}: {error.message}", code=error.code, hint=error.hint) from None
    check_parts(method, config, loss)
    return loss


def check_parts(method: str, config: LossSection, loss: BoundLoss) -> None:
    """Raise if a remedy, a mask or weights do not fit the loss.

    Raises:
        ConfigError: names what does not fit.
    """
    if (config.remedy or config.token_mask) and not loss.spec.from_logps:
        raise ConfigError(
            f"train.methods.{method}: {loss.spec.name} compares pairs or reads tokens, and a remedy or a mask needs a "
            "loss of the log-probs of one pair",
            code="remedy-loss",
            hint="use them with another loss",
        )
    if config.remedy and config.token_mask:
        raise ConfigError(
            f"train.methods.{method}: found `remedy` and `token_mask`, expected at most one of them",
            code="remedy-loss",
            hint="train them as two methods",
        )
    check_weights(method, config, loss)


def choose_loss(args: DPOConfig, given: str | PairLoss | BoundLoss | None = None) -> tuple[BoundLoss, LossSection]:
    """Return the loss that a trainer made in Python trains under, and its weights, remedy and mask as a section.

    Args:
        args: a PreferenceConfig, or trl's arguments, which name the loss by ``loss_type`` and its beta.
        given: ``loss`` of the trainer: a name, a function, a bound loss; None: ``args`` say which.

    Raises:
        ConfigError: unknown loss or parameter, two different losses or betas, a function that is no loss of pairs.
    """
    if isinstance(given, BoundLoss):
        loss = given
    elif callable(given):
        loss = own_loss(given, _beta_of_own(args, given), args.device)
    elif given is None or isinstance(given, str):
        loss = _named(args, given)
    else:
        raise ConfigError(
            f"loss: found {given!r}, expected a name in align.LOSSES or a function of log-probs and margins",
            code="loss-name",
        )
    section = LossSection.model_construct(
        loss=loss.spec.name,
        parameters=dict(loss.parameters),
        weights=_part(args, "pair_weights", WeightsSection),
        remedy=_part(args, "gradient_remedy", RemedySection),
        token_mask=_part(args, "token_mask", TokenMaskSection),
    )
    check_parts("loss", section, loss)
    return loss, section


def _part(args: DPOConfig, name: str, kind: type[S]) -> S | None:
    value = getattr(args, name, None)
    return None if value is None else section_from(value, kind, f"{OWNER}.{name}")


def own_loss(function: PairLoss, beta: float, device: torch.device | str = "cpu") -> BoundLoss:
    """A function of log-probs [B] and margins [B], or of log-probs alone, as a loss; it is tried on three pairs.

    Args:
        function: returns one loss per pair, [B], each by its own pair alone.
        beta: scale of the implicit rewards in the metrics.
        device: where the trial runs.

    Raises:
        ConfigError: it fails, returns something else, or does not depend on the policy.
    """
    name = getattr(function, "__name__", OWN)
    name = name if name.isidentifier() else OWN
    with_margin = _positional(function) != 1

    def call(logps: PairLogps, *margin: Tensor, beta: float) -> Tensor:
        return function(logps, *margin)

    _try(function, name, with_margin, device)
    columns = ("margin",) if with_margin else ()
    spec = LossSpec(name, call, {"beta": beta}, "a function given to the trainer", columns=columns)
    return BoundLoss(spec, {"beta": beta})


def _named(args: DPOConfig, given: str | None) -> BoundLoss:
    """The loss that ``loss`` of the trainer or the arguments name, with its parameters."""
    name = _name(args, given)
    try:
        return resolve(name, _parameters(args, name))
    except ConfigError as error:
        place = f"{OWNER}.loss_kwargs" if error.code != "loss-name" else "loss" if given else f"{OWNER}.loss"
        message = error.message if error.message.startswith(OWNER) else f"{place}: {error.message}"
        raise ConfigError(message, code=error.code, hint=error.hint) from None


def _name(args: DPOConfig, given: str | None) -> str:
    """The one name of the loss.

    Raises:
        ConfigError: two places name different ones, or trl's ``loss_type`` names one that does not exist here.
    """
    named = {"loss": given, f"{OWNER}.loss": _own_name(args), f"{OWNER}.loss_type": _type(args)}
    named = {place: name for place, name in named.items() if name is not None}
    first, *others = named.values() or [DEFAULT]
    if any(name != first for name in others):
        found = ", ".join(f"{place} {name!r}" for place, name in named.items())
        raise ConfigError(f"loss: found {found}, expected one loss", code="loss-name", hint="name it once")
    return str(first)


def _own_name(args: DPOConfig) -> str | None:
    """``loss`` of a PreferenceConfig, if it was set."""
    name = getattr(args, "loss", DEFAULT)
    return None if name == DEFAULT else name


def _type(args: DPOConfig) -> str | None:
    """The loss that trl's ``loss_type`` names, if it was set."""
    types = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    if types == DEFAULT_TYPE:
        return None
    if len(types) != 1:
        raise ConfigError(
            f"{OWNER}.loss_type: found {types}, expected one loss", code="loss-name", hint="name it as `loss`"
        )
    name = known_as(types[0])
    if name not in LOSSES:
        raise ConfigError(
            f"{OWNER}.loss_type: {types[0]!r} is not a loss of this program{nearest(name, list(LOSSES))}",
            code="loss-name",
            hint="align.LOSSES has them all",
        )
    return name


def _parameters(args: DPOConfig, name: str) -> dict[str, Any]:
    """Parameters of the loss ``name``: ``loss_kwargs``, and the fields of DPOConfig that are its parameters.

    Raises:
        ConfigError: two different values of one parameter, or a field that is none.
    """
    kwargs = dict(getattr(args, "loss_kwargs", None) or {})
    known: Mapping[str, Any] = LOSSES[name].defaults if name in LOSSES else {}
    if type(args).__name__ == "DPOConfig" and args.beta == BETA != known.get("beta", BETA) and "beta" not in kwargs:
        raise ConfigError(
            f"args.beta: found {BETA}, trl.DPOConfig's unless it is set; that of {name} is {known['beta']}",
            code="trainer-key",
            hint="use align.PreferenceConfig, whose beta is that of the loss unless it is set",
        )
    for field, value in (("beta", args.beta), (SMOOTHING, args.label_smoothing)):
        if value is None or (field == SMOOTHING and not value and (_type(args) is None or field not in known)):
            continue
        if field == SMOOTHING and field not in known:
            raise ConfigError(
                f"{OWNER}.{field}: {value!r} has no meaning for the loss {name}",
                code="trainer-key",
                hint="leave it out, or take the loss cdpo or robust",
            )
        if kwargs.get(field, value) != value:
            raise ConfigError(
                f"{OWNER}.{field}: found {value:g} there and {kwargs[field]:g} in loss_kwargs, expected one {field}",
                code="loss-parameter",
                hint="leave one of them out",
            )
        kwargs[field] = value
    return kwargs


def _beta_of_own(args: DPOConfig, function: PairLoss) -> float:
    """Scale of the rewards that are logged for a function.

    Raises:
        ConfigError: the arguments name another loss, or parameters, which a function has itself.
    """
    _name(args, None)
    others = {key: value for key, value in (getattr(args, "loss_kwargs", None) or {}).items() if key != "beta"}
    named = _own_name(args) or _type(args)
    if named is not None or others or args.label_smoothing:
        found = f"the loss {named}" if named else ", ".join(others) or SMOOTHING
        raise ConfigError(
            f"loss: found a function and, in the arguments, {found}, expected one of them",
            code="loss-name",
            hint="give parameters to the function itself (functools.partial)",
        )
    beta = _parameters(args, DEFAULT).get("beta")
    return BETA if beta is None else float(beta)


def _positional(function: PairLoss) -> int:
    """Number of positional arguments that a function takes; 2 if it does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 2
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        return 2
    return sum(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in parameters)


def _try(function: PairLoss, name: str, with_margin: bool, device: torch.device | str) -> None:
    """Call a function on three pairs, together and one by one.

    Raises:
        ConfigError: see ``own_loss``.
    """
    rows = torch.tensor(TRIAL, device=device)
    policy, reference, (lengths, margin) = rows[:2].requires_grad_(), rows[2:4], rows[4:]

    def at(pairs: slice) -> Any:
        sides = (*policy[:, pairs], *reference[:, pairs], lengths[pairs], lengths[pairs] + 1)
        return function(PairLogps(*sides), *((margin[pairs],) if with_margin else ()))

    try:
        both = at(slice(None))
        single = [at(slice(k, k + 1)) for k in range(3)] if _is_loss(both, 3) else []
    except Exception as error:
        raise ConfigError(
            f"loss: {name} failed on three pairs: {type(error).__name__}: {error}", code="loss-function",
            hint="it gets align.PairLogps and, as a second argument, the margins [B]",
        ) from error  # fmt: skip
    if not _is_loss(both, 3):
        found = f"a tensor {list(both.shape)} of {both.dtype}" if isinstance(both, Tensor) else type(both).__name__
        problem = f"returned {found}, expected one loss per pair: a float tensor [3] for three pairs"
    elif not both.requires_grad:
        problem = "does not depend on the policy's log-probs (chosen, rejected), so that nothing would be trained"
    elif not all(_is_loss(one, 1) for one in single) or not torch.allclose(
        both, torch.cat(single), rtol=1e-3, atol=1e-5
    ):
        problem = "gives a pair another loss if other pairs are in its batch, expected the loss of a pair by itself"
    else:
        return
    raise ConfigError(f"loss: {name} {problem}", code="loss-function", hint="the trainer takes the mean over the pairs")


def _is_loss(value: Any, pairs: int) -> bool:
    return isinstance(value, Tensor) and value.shape == (pairs,) and value.is_floating_point()
