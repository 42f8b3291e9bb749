"""The loss of a training: from a run file, or from the arguments and the ``loss`` of a trainer made in Python."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from trl import DPOConfig

from align.config import LossSection, RemedySection, Section, TokenMaskSection, WeightsSection
from align.config.reading import section_from
from align.errors import ConfigError
from align.losses.pairwise import PairLogps
from align.losses.registry import LOSSES, known_as, resolve
from align.losses.spec import BoundLoss, LossSpec
from align.losses.sums import TRL_DEFAULTS, bind_section, resolve_sum, resolve_trl
from align.training.columns import check_weights

PairLoss = Callable[[PairLogps, Tensor], Tensor] | Callable[[PairLogps], Tensor]
"""(log-probs of B pairs, margins [B]) -> one loss per pair [B]; or of the log-probs alone."""
DEFAULT = "dpo"
DEFAULT_TYPE = ["sigmoid"]
OWNER = "PreferenceConfig"
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


def choose_loss(args: DPOConfig, given: Any = None) -> tuple[BoundLoss, LossSection]:
    """Return the loss that a trainer made in Python trains under, and its weights, remedy and mask as a section.

    Args:
        args: a PreferenceConfig, or trl's arguments, which name the loss by ``loss_type`` and its beta.
        given: ``loss`` of the trainer: a name, terms of a sum, a function, a bound loss; None: ``args`` say which.

    Raises:
        ConfigError: unknown loss or parameter, two different losses or betas, a function that is no loss of pairs.
    """
    if isinstance(given, BoundLoss):
        loss = given
    elif callable(given):
        loss = own_loss(given, _beta_of_own(args), args.device)
    else:
        loss = _named(args, given)
    section = LossSection.model_construct(
        loss=loss.spec.name,
        parameters=dict(loss.parameters),
        weights=_part(args, "pair_weights", WeightsSection),
        remedy=_part(args, "gradient_remedy", RemedySection),
        token_mask=_part(args, "token_mask", TokenMaskSection),
    )
    check_parts("loss", section, loss)
    return loss, section


def reads_reference(loss: BoundLoss, section: LossSection) -> bool:
    """Whether a training reads log-probs of the reference: its loss does, or what weights, masks or corrects it."""
    tilt = section.weights is not None and section.weights.tilt is not None
    return loss.spec.reads_reference or tilt or section.remedy is not None or section.token_mask is not None


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
        ConfigError: it fails, returns something else there or in a step of the training, does not depend on the
            policy, or holds weights of its own, which no optimizer would train.
    """
    name = getattr(function, "__name__", OWN)
    name = name if name.isidentifier() else OWN
    with_margin = _positional(function) != 1
    if isinstance(function, nn.Module) and any(weight.requires_grad for weight in function.parameters()):
        raise ConfigError(
            f"loss: {type(function).__name__} holds weights that no optimizer would train",
            code="loss-function",
            hint="freeze them: loss.requires_grad_(False)",
        )

    given: Callable[..., Tensor] = function

    def call(logps: PairLogps, *margin: Tensor, beta: float) -> Tensor:
        losses = given(logps, *margin)
        if not _is_loss(losses, len(logps.chosen)):
            raise _no_loss(name, losses, len(logps.chosen))
        return losses

    _try(function, name, with_margin, device)
    columns = ("margin",) if with_margin else ()
    spec = LossSpec(name, call, {"beta": beta}, "a function given to the trainer", columns=columns)
    return BoundLoss(spec, {"beta": beta})


def _named(args: DPOConfig, given: Any) -> BoundLoss:
    """The loss that ``loss`` of the trainer or the arguments name, with its parameters."""
    name = _name(args, given)
    names = name if isinstance(name, list) else list(name["terms"]) if isinstance(name, dict) else [name]
    parameters = _parameters(args, names, by_trl=isinstance(name, list))
    place = "loss" if given is not None else f"{OWNER}.loss"
    try:
        if isinstance(name, list):
            place = f"{OWNER}.loss_type"
            return resolve_trl(name, args.loss_weights, parameters)
        return resolve_sum(name["terms"], parameters) if isinstance(name, dict) else resolve(name, parameters)
    except ConfigError as error:
        place = place if error.code in ("loss-name", "loss-terms") else f"{OWNER}.loss_kwargs"
        raise ConfigError(f"{place}: {error.message}", code=error.code, hint=error.hint) from None


def _name(args: DPOConfig, given: Any) -> Any:
    """The loss as it is named: a name, ``{"terms": ...}``, or the list of names in trl's ``loss_type``.

    Raises:
        ConfigError: two places name different losses, or one is neither a name nor terms.
    """
    types = _types(args)
    named = {"loss": given, f"{OWNER}.loss": _own_name(args), f"{OWNER}.loss_type": types}
    named = {place: name for place, name in named.items() if name is not None}
    for place, name in named.items():
        terms = isinstance(name, dict) and set(name) == {"terms"} and isinstance(name["terms"], dict) and name["terms"]
        if not terms and not (isinstance(name, str | list) and name):
            raise ConfigError(
                f'{place}: found {name!r}, expected a name in align.LOSSES or {{"terms": {{name: weight}}}}',
                code="loss-name",
            )
    single = [known_as(one[0]) if isinstance(one, list) and len(one) == 1 else one for one in named.values()]
    first, *others = single or [DEFAULT]
    if any(other != first for other in others):
        found = ", ".join(f"{place} {name!r}" for place, name in named.items())
        raise ConfigError(f"loss: found {found}, expected one loss", code="loss-name", hint="name it once")
    return types if types is not None and len(named) == 1 else first


def _own_name(args: DPOConfig) -> Any:
    """``loss`` of a PreferenceConfig, if it was set."""
    name = getattr(args, "loss", DEFAULT)
    return None if name == DEFAULT else name


def _types(args: DPOConfig) -> list[str] | None:
    """Names in trl's ``loss_type``, if it or ``loss_weights`` was set.

    Raises:
        ConfigError: it is no list of names, or empty.
    """
    types = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    if not isinstance(types, list | tuple) or not types or not all(isinstance(name, str) for name in types):
        raise ConfigError(
            f"{OWNER}.loss_type: found {types!r:.60}, expected the name of a loss or a list of names", code="loss-terms"
        )
    types = list(types)
    return None if types == DEFAULT_TYPE and args.loss_weights is None else types


def _parameters(args: DPOConfig, names: list[str], *, by_trl: bool = False) -> dict[str, Any]:
    """``loss_kwargs``, and those fields of DPOConfig that are parameters of the named losses.

    Args:
        args: the arguments.
        names: the loss, or the terms of a sum.
        by_trl: they come from ``loss_type``, so that trl's beta is theirs unless another is set.

    Raises:
        ConfigError: two different values of one parameter, or a field that is none.
    """
    kwargs = _kwargs(args)
    known: dict[str, Any] = {}
    for name in names:
        known |= LOSSES[known_as(name)].defaults if known_as(name) in LOSSES else {}
    fields = {name: getattr(args, name) for name in TRL_DEFAULTS}
    if not hasattr(args, "loss_kwargs"):  # trl's arguments, which always hold a beta
        if not by_trl and fields["beta"] == TRL_DEFAULTS["beta"] != known.get("beta", TRL_DEFAULTS["beta"]):
            raise ConfigError(
                f"args.beta: found {fields['beta']}, trl.DPOConfig's unless it is set; that of {' and '.join(names)} "
                f"is {known['beta']}",
                code="trainer-key",
                hint="use align.PreferenceConfig, whose beta is that of the loss unless it is set",
            )
        fields["beta"] = fields["beta"] if "beta" in known else None
    for name, value in fields.items():
        if value is None or (name != "beta" and value == TRL_DEFAULTS[name]):
            continue
        if name not in known and known:
            raise ConfigError(
                f"{OWNER}.{name}: {value!r} has no meaning for the loss {' and '.join(names)}",
                code="trainer-key",
                hint="leave it out, or take another loss (docs/losses.md)",
            )
        if name in kwargs and kwargs[name] != value:
            raise ConfigError(
                f"{OWNER}.{name}: found {value!r} there and {kwargs[name]!r} in loss_kwargs, expected one {name}",
                code="loss-parameter",
                hint="leave one of them out",
            )
        kwargs[name] = value
    return kwargs


def _kwargs(args: DPOConfig) -> dict[str, Any]:
    """``loss_kwargs`` of a PreferenceConfig.

    Raises:
        ConfigError: they are no mapping.
    """
    given = getattr(args, "loss_kwargs", None)
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(
            f"{OWNER}.loss_kwargs: found {given!r:.60}, expected a dict of parameters of the loss",
            code="loss-parameter",
            hint='write loss_kwargs={"beta": 0.1}',
        )
    return dict(given or {})


def _beta_of_own(args: DPOConfig) -> float:
    """Scale of the rewards that are logged for a function.

    Raises:
        ConfigError: the arguments name another loss, or parameters, which a function has itself.
    """
    others = [key for key in _kwargs(args) if key != "beta"]
    others += [key for key, value in TRL_DEFAULTS.items() if key != "beta" and getattr(args, key) != value]
    named = _own_name(args) or _types(args)
    if named is not None or others:
        found = f"the loss {named}" if named else ", ".join(others)
        raise ConfigError(
            f"loss: found a function and, in the arguments, {found}, expected one of them",
            code="loss-name",
            hint="give parameters to the function itself (functools.partial)",
        )
    return float(_parameters(args, [DEFAULT]).get("beta", TRL_DEFAULTS["beta"]))


def _positional(function: PairLoss) -> int:
    """Number of positional arguments that a function, or the ``forward`` of a module, takes; 2 if it does not say."""
    try:
        called = function.forward if isinstance(function, nn.Module) else function
        parameters = inspect.signature(called).parameters.values()
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

    call: Callable[..., Any] = function

    def at(pairs: slice) -> Any:
        sides = (*policy[:, pairs], *reference[:, pairs], lengths[pairs], lengths[pairs] + 1)
        return call(PairLogps(*sides), *((margin[pairs],) if with_margin else ()))

    try:
        both = at(slice(None))
        single = [at(slice(k, k + 1)) for k in range(3)] if _is_loss(both, 3) else []
    except Exception as error:
        raise ConfigError(
            f"loss: {name} failed on three pairs: {type(error).__name__}: {error}", code="loss-function",
            hint="it gets align.PairLogps and, as a second argument, the margins [B]",
        ) from error  # fmt: skip
    if not _is_loss(both, 3):
        raise _no_loss(name, both, 3)
    if not both.requires_grad:
        problem = "does not depend on the policy's log-probs (chosen, rejected), so that nothing would be trained"
    elif not bool(both.isfinite().all()):
        problem = f"returned {both.detach().tolist()} for three pairs of ordinary log-probs, expected finite losses"
    elif not all(_is_loss(one, 1) for one in single) or not torch.allclose(
        both, torch.cat(single), rtol=1e-3, atol=1e-5
    ):
        problem = "gives a pair another loss if other pairs are in its batch, expected the loss of a pair by itself"
    else:
        return
    raise ConfigError(f"loss: {name} {problem}", code="loss-function", hint="the trainer takes the mean over the pairs")


def _no_loss(name: str, value: Any, pairs: int) -> ConfigError:
    found = f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    return ConfigError(
        f"loss: {name} returned {found}, expected one loss per pair: a float tensor [{pairs}] for {pairs} pairs",
        code="loss-function",
        hint="the trainer takes the mean over the pairs",
    )


def _is_loss(value: Any, pairs: int) -> bool:
    return isinstance(value, Tensor) and value.shape == (pairs,) and value.is_floating_point()
