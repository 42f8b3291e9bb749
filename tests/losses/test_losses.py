"""Losses: golden values, gradients, identities between the losses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.errors import ConfigError
from align.losses.margin_weights import madpo_coefficient, madpo_weight
from align.losses.pairwise import PairLogps, gradient_weights, mmpo
from align.losses.registry import ALIASES, LOSSES, resolve
from tests.losses.golden import GOLDEN
from tests.losses.inputs import evaluate, hand_tokens, make, spread, statistics_of

ONE = {"chosen": -20.0, "rejected": -25.0, "ref_chosen": -21.0, "ref_rejected": -24.0}
numbers = st.floats(-30, 30)


@pytest.mark.parametrize(("name", "parameters", "expected"), GOLDEN)
def test_golden(name: str, parameters: dict[str, float], expected: float) -> None:
    """See ``GOLDEN`` for the pair."""
    loss, margin = resolve(name, parameters), torch.tensor([1.5], dtype=torch.float64)
    if loss.spec.tokens != "none":
        logps, tokens = hand_tokens()
        found = loss(logps, margin, tokens=tokens)
    else:
        values = {key: torch.tensor([value], dtype=torch.float64) for key, value in ONE.items()}
        logps = PairLogps(**values, chosen_length=torch.tensor([10.0]), rejected_length=torch.tensor([12.0]))
        found = loss(logps, margin, statistics=statistics_of(loss, logps))
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_every_loss_has_a_golden_value_and_its_page() -> None:
    """A new loss costs a function, an entry and a golden value; without one of them this fails."""
    assert {name for name, *_ in GOLDEN} == set(LOSSES) and len(LOSSES) >= 45
    for spec in LOSSES.values():
        assert all((spec.summary, spec.formula, spec.source, spec.when)), spec.name
    assert not set(ALIASES) & set(LOSSES) and set(ALIASES.values()) <= set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_shape_dtype_and_permutation(name: str) -> None:
    values = [(0.5, -1.0), (-2.0, 3.0), (4.0, 4.0)]
    m = torch.tensor([0.3, -2.0, 5.0])
    found = evaluate(name, make(values, torch.float32), m)
    assert found.shape == (3,) and found.dtype == torch.float32
    if name == "beta_dpo":
        return  # which pairs it draws depends on their order, which a training fixes
    back = evaluate(name, make(values[::-1], torch.float32), m.flip(0))
    assert torch.allclose(found, back.flip(0), atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    """The loss of bfloat16 log-probs is that of the same numbers in float32, bit for bit, if no token is rounded."""
    values = [(0.5, -1.0), (-2.0, 3.0)]
    half, single = make(values, torch.bfloat16), make(values, torch.float32)
    m = torch.tensor([0.5, -2.0])
    if LOSSES[name].tokens != "none":
        return  # its sums are over tokens, see test_token_losses.py
    found = evaluate(name, half, m.bfloat16())
    assert found.dtype == torch.float32 and torch.equal(found, evaluate(name, single, m))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gap", [-1e6, -1e3, 0.0, 1e3, 1e6])
@pytest.mark.parametrize("margin", [-1e6, 0.0, 1e6])
def test_finite_with_gradient_at_extremes(name: str, gap: float, margin: float) -> None:
    logps = make([(gap / 2, -gap / 2), (0.0, 1.0)], torch.float32)
    found = evaluate(name, logps, torch.tensor([margin, 0.0]))
    d_w, d_l = gradient_weights(found, logps)
    assert all(torch.isfinite(value).all() for value in (found, d_w, d_l))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"gated_dpo", "aot_unpaired", "wpo"}))
@settings(max_examples=15)
@given(chosen=numbers, rejected=numbers, margin=st.floats(-8, 8))
def test_gradient_against_finite_differences(name: str, chosen: float, rejected: float, margin: float) -> None:
    """Between the one-sided slopes of the value, its statistics and weights held fixed.

    The gradients of gated_dpo, aot_unpaired and wpo are not those of their values, see test_gate, test_step_losses.py
    and test_token_losses.py.
    """
    loss, m, step = resolve(name, {}), torch.tensor([margin, 0.5], dtype=torch.float64), 1e-5
    other = (1.0, -0.5)
    logps = make([(chosen, rejected), other])
    fixed = statistics_of(loss, logps)

    def value(pairs: PairLogps) -> torch.Tensor:
        tokens = None
        if loss.spec.tokens != "none":
            pairs, tokens = spread(pairs)
        return loss(pairs, m, tokens=tokens, statistics=fixed)[0]

    d_w, d_l = gradient_weights(value(logps), logps)

    def at(shift_w: float, shift_l: float) -> float:
        return float(value(make([(chosen + shift_w, rejected + shift_l), other])))

    for gradient, (w, r) in ((float(-d_w[0]), (step, 0.0)), (float(d_l[0]), (0.0, step))):
        slopes = sorted(((at(w, r) - at(0, 0)) / step, (at(0, 0) - at(-w, -r)) / step))
        near = 2e-4 * (1 + abs(gradient)) + 4e-16 * abs(at(0, 0)) / step
        assert slopes[0] - near <= gradient <= slopes[1] + near


@given(st.lists(st.tuples(numbers, numbers, st.floats(-12, 12)), min_size=1, max_size=8))
def test_p6_p10_madpo_is_dpo_times_a_weight_without_gradient(rows: list[tuple[float, float, float]]) -> None:
    logps = make([(w, r) for w, r, _ in rows])
    m = torch.tensor([margin for *_, margin in rows], dtype=torch.float64, requires_grad=True)
    weighted, plain = resolve("madpo", {})(logps, m), resolve("dpo", {})(logps)
    assert torch.allclose(weighted, madpo_weight(m.detach()) * plain)
    d_w, d_l = gradient_weights(weighted, logps)
    assert torch.allclose(d_w, d_l) and (d_w.abs() <= 2 * 0.1).all()
    total = resolve("madpo", {})(make([(1.0, 0.0)] * len(rows)), m).sum()
    assert torch.autograd.grad(total, m, allow_unused=True) == (None,)


@given(st.tuples(numbers, numbers), st.floats(-6.8, 6.8))
def test_soft_madpo_is_madpo_averaged_over_the_label(pair: tuple[float, float], margin: float) -> None:
    """E over a Bradley-Terry label with margin m; a flipped pair has its responses and its margin swapped."""
    m = torch.tensor([margin], dtype=torch.float64)
    madpo = resolve("madpo", {})
    as_labeled, flipped = madpo(make([pair]), m), madpo(make([pair[::-1]]), -m)
    expected = torch.sigmoid(m) * as_labeled + torch.sigmoid(-m) * flipped
    assert torch.allclose(resolve("soft_madpo", {})(make([pair]), m), expected)


@pytest.mark.parametrize(
    ("true", "believed", "target"),
    [(1.0, 1.0, 1.3641753), (1.0, 1.5, 1.2666912), (3.0, 3.0, 2.9434173), (8.0, 8.0, 7.9824507)],
)
def test_p5_unique_minimizer(true: float, believed: float, target: float) -> None:
    """The population loss at margin ``true`` is convex in beta h with its minimum at the effective target margin."""
    x = torch.linspace(-2, 12, 140001, dtype=torch.float64)
    parameters = {"c_max": 2.0, "c_min": 0.5, "lam": 1.0, "tau": 2.0}
    m = torch.tensor([believed, -believed], dtype=torch.float64)
    w_right, w_wrong = madpo_weight(m, **parameters)
    p = 1 / (1 + math.exp(-true))
    loss = p * w_right * torch.nn.functional.softplus(-x) + (1 - p) * w_wrong * torch.nn.functional.softplus(x)
    assert float(x[loss.argmin()]) == pytest.approx(target, abs=2e-4)
    assert (loss.diff().diff() > -1e-12).all()
    if abs(believed) < 2:
        c = float(madpo_coefficient(m[:1], **parameters))
        assert target == pytest.approx(true + (c - 1) * believed, abs=1e-6)


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_p8_error_of_the_weight_is_bounded_by_the_error_of_the_margin(first: float, second: float) -> None:
    parameters = {"c_max": 2.0, "c_min": 0.5, "lam": 1.0, "tau": 2.0}
    a, b = madpo_weight(torch.tensor([first, second], dtype=torch.float64), **parameters)
    assert abs(float(a - b)) <= 0.5873 * abs(first - second) + 1e-12


@given(st.tuples(numbers, numbers), st.floats(-5, 5))
def test_mmpo_is_backward_kl_plus_the_label_entropy(pair: tuple[float, float], margin: float) -> None:
    m = torch.tensor([margin], dtype=torch.float64)
    p = torch.sigmoid(m)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    assert torch.allclose(resolve("mmpo", {})(make([pair]), m), resolve("rpo_bwd_kl", {})(make([pair]), m) + entropy)


def test_label_smoothing_zero_is_dpo_and_more_is_not() -> None:
    logps = make([(2.0, -1.0)])
    plain = resolve("dpo", {})(logps)
    for name in ("cdpo", "robust"):
        assert torch.allclose(resolve(name, {"label_smoothing": 0.0})(logps), plain)
        assert not torch.allclose(resolve(name, {"label_smoothing": 0.2})(logps), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("trusted", "other", "parameters", "scale"),
    [
        ({"trust": 0.0, "strength": 0.0, "slope": 0.7}, "dpo", {}, 1.0),
        ({"trust": 0.0, "strength": 1.0, "slope": 0.7, "c_max": 4.0}, "madpo", {"c_max": 4.0}, 0.7),
        ({"trust": 1.0, "strength": 0.3, "slope": 0.7}, "mmpo", {"gamma": 0.7}, 1.0),
    ],
)
@given(rows=st.lists(st.tuples(numbers, numbers, st.floats(-12, 12)), min_size=1, max_size=8))
def test_limits_of_trust(
    dtype: torch.dtype,
    trusted: dict[str, float],
    other: str,
    parameters: dict[str, float],
    scale: float,
    rows: list[tuple[float, float, float]],
) -> None:
    """Bit for bit DPO, MADPO on the margin b m, and MMPO with gamma = b: loss and both gradients."""
    m = torch.tensor([margin for *_, margin in rows], dtype=dtype)
    found, expected = make([(w, r) for w, r, _ in rows], dtype), make([(w, r) for w, r, _ in rows], dtype)
    mixed, single = resolve("trust", trusted)(found, m), resolve(other, parameters)(expected, scale * m)
    assert torch.equal(mixed, single)
    for a, b in zip(gradient_weights(mixed, found), gradient_weights(single, expected), strict=True):
        assert torch.equal(a, b)


@given(st.tuples(numbers, numbers), st.floats(-8, 8), st.floats(0, 1), st.floats(0, 3))
def test_trust_without_strength_is_the_mix_of_dpo_and_mmpo(
    pair: tuple[float, float], margin: float, t: float, slope: float
) -> None:
    m, logps = torch.tensor([margin], dtype=torch.float64), make([pair])
    mixed = resolve("trust", {"trust": t, "strength": 0.0, "slope": slope})(logps, m)
    soft = mmpo(logps, m, beta=0.1, gamma=slope)
    assert torch.allclose(mixed, (1 - t) * resolve("dpo", {})(logps) + t * soft)


@given(st.tuples(numbers, numbers), st.floats(0.01, 30), st.floats(0.01, 0.9))
def test_gate(pair: tuple[float, float], sharpness: float, threshold: float) -> None:
    """The value and the chosen gradient are DPO's, the rejected gradient is the gate times DPO's."""
    gated, plain = make([pair]), make([pair])
    found = resolve("gated_dpo", {"sharpness": sharpness, "threshold": threshold})(gated)
    expected = resolve("dpo", {})(plain)
    assert torch.allclose(found, expected)
    (d_w, d_l), (plain_w, plain_l) = gradient_weights(found, gated), gradient_weights(expected, plain)
    probability = math.exp((-50 + pair[1]) / 12)
    gate = 1 / (1 + math.exp(-sharpness * (probability - threshold)))
    assert torch.allclose(d_w, plain_w) and torch.allclose(d_l, gate * plain_l)


@given(st.tuples(numbers, numbers), st.floats(0.1, 1.0))
def test_shift_scales_the_rejected_gradient(pair: tuple[float, float], shift: float) -> None:
    """At shift 1 it is DPO; below, d_l is exactly shift times d_w."""
    logps = make([pair])
    d_w, d_l = gradient_weights(resolve("dpo_shift", {"shift": shift})(logps), logps)
    assert torch.allclose(d_l, shift * d_w)
    assert torch.allclose(resolve("dpo_shift", {"shift": 1.0})(make([pair])), resolve("dpo", {})(make([pair])))


def test_the_gradient_of_cal_dpo_at_and_beyond_its_targets() -> None:
    """At the targets only the margin term remains; beyond them both weights are negative."""
    at, beyond = make([(5.0, -5.0)]), make([(9.0, -9.0)])
    d_w, d_l = gradient_weights(resolve("cal_dpo", {})(at), at)
    assert float(d_w) == pytest.approx(1 / (1 + math.exp(10))) and torch.allclose(d_w, d_l)
    assert all(float(d) < 0 for d in gradient_weights(resolve("cal_dpo", {})(beyond), beyond))


@pytest.mark.parametrize("tau", [0.05, 0.1, 0.105, 0.5])
def test_discopop_says_where_its_first_steps_go_the_wrong_way(tau: float) -> None:
    logps, loss = make([(0.0, 0.0)]), resolve("discopop", {"discopop_tau": tau})
    d_w, _ = gradient_weights(loss(logps), logps)
    assert (float(d_w) < 0) == bool(loss.warnings) == (tau < 0.1023)


@pytest.mark.parametrize(
    ("name", "parameters", "other", "others"),
    [
        ("focalpo", {"gamma": 0.0}, "dpo", {}),
        ("fdpo_alpha", {"alpha": 0.0}, "fdpo_forward_kl", {}),
        ("fdpo_alpha", {"alpha": 1 - 1e-9}, "dpo", {}),
        ("alphapo", {"alpha": 1e-9, "beta": 2.0, "gamma": 0.5}, "simpo", {"beta": 2.0, "gamma_beta_ratio": 0.25}),
        ("cdpo", {"label_smoothing": 0.0}, "dpo", {}),
        ("dpo_shift", {"shift": 1.0}, "dpo", {}),
        ("dpop", {"penalty": 0.0}, "dpo", {}),
        ("orpo", {"lam": 1e-12}, "nll", {}),
    ],
)
@given(pair=st.tuples(st.floats(-5, 5), st.floats(-5, 5)))
def test_limits(
    name: str, parameters: dict[str, float], other: str, others: dict[str, float], pair: tuple[float, float]
) -> None:
    """At the ends of its parameters a loss is another one, to rounding."""
    found, expected = (resolve(*each)(make([pair])) for each in ((name, parameters), (other, others)))
    assert torch.allclose(found, expected, atol=1e-6)


@given(st.tuples(numbers, numbers))
def test_identities_between_losses(pair: tuple[float, float]) -> None:
    """CPO is NLL and DPO without a reference; NCA is BCO and half of both pushes back; RePO bounds SimPO's limit."""
    logps, free = make([pair]), make([pair])
    zero = torch.zeros_like(free.ref_chosen)
    free = PairLogps(free.chosen, free.rejected, zero, zero, free.chosen_length, free.rejected_length)
    cpo, sums = resolve("cpo", {})(free), resolve("dpo", {})(free) + resolve("nll", {})(free)
    assert torch.allclose(cpo, sums)
    sharp = resolve("simpo", {"beta": 1e4, "gamma_beta_ratio": 0.5})(logps) / 1e4
    assert torch.allclose(resolve("repo", {"gamma": 0.5})(logps), sharp, atol=1e-4)
    c_w, c_l = 0.1 * logps.chosen_ratio, 0.1 * logps.rejected_ratio
    back = torch.nn.functional.softplus(c_w) / 2 - torch.nn.functional.softplus(c_l) / 2
    assert torch.allclose(resolve("nca_pair", {})(logps), resolve("bco_pair", {})(logps) + back)
    up, down = resolve("apo_zero", {})(logps), resolve("apo_down", {})(logps)
    assert 0 <= float(up) <= 2 and 0 <= float(down) <= 2


def test_robust_is_unbiased_under_flips() -> None:
    eps, pair = 0.3, (2.0, -1.0)
    loss = resolve("robust", {"label_smoothing": eps})
    mean = (1 - eps) * loss(make([pair])) + eps * loss(make([pair[::-1]]))
    assert torch.allclose(mean, resolve("dpo", {})(make([pair])))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("dpo", {"beta": "0.1"}, "beta: found '0.1', expected a number"),
        ("madpoo", {}, "did you mean `madpo`?"),
        ("dpo", {"betta": 0.1}, "betta: not a parameter of dpo (did you mean `beta`?)"),
        ("dpo", {"beta": 0}, "beta: found 0, expected a number above 0"),
        ("ipo", {"length_normalize": 1.0}, "length_normalize: found 1.0, expected true or false"),
        ("cdpo", {"label_smoothing": 0.5}, "label_smoothing: found 0.5"),
        ("trust", {"trust": 2.0}, "trust: found 2.0, expected a number in [0, 1]"),
        ("trust", {"trust": 1.0, "c_max": 0.5}, "c_max: found 0.5, expected a number above 1"),
        ("madpo", {"c_max": 0.5}, "c_max: found 0.5, expected a number above 1"),
    ],
)
def test_registry_errors(name: str, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(name, parameters)
    assert message in str(caught.value)


def test_a_missing_margin_a_coupled_loss_and_a_wrong_shape_are_errors() -> None:
    with pytest.raises(ConfigError, match="madpo needs a margin"):
        resolve("madpo", {})(make([(1.0, 0.0)]))
    with pytest.raises(TypeError, match="beta_dpo has no loss for a single pair"):
        resolve("beta_dpo", {})(make([(1.0, 0.0)]))
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=r"must be \[B\]"):
        PairLogps(one, one, one, torch.zeros(1, 1), one, one)


def test_odpo_gives_a_margin_of_0_no_offset() -> None:
    """With and without the logarithm, as for margins below 0 with it; a margin of 1 has the logarithm 0."""
    logps = make([(2.0, -1.0), (0.5, 1.0)])
    plain = resolve("dpo", {})(logps)
    for log_offset in (True, False):
        found = resolve("odpo", {"log_offset": log_offset})(logps, torch.zeros(2, dtype=torch.float64))
        assert torch.equal(found, plain)
    logarithm = resolve("odpo", {"log_offset": True, "alpha": 1.0})
    assert torch.equal(logarithm(logps, torch.tensor([-3.0, 1.0], dtype=torch.float64)), plain)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    expected = [math.log1p(math.exp(-0.1 * gap + math.log(0.5))) for gap in (3.0, -0.5)]
    assert logarithm(logps, half).tolist() == pytest.approx(expected)


def test_dpop_by_hand() -> None:
    """A chosen response that has fallen by 1 nat costs ``penalty`` nats of the gap; one that has risen costs none."""
    found = resolve("dpop", {"beta": 0.5, "penalty": 3.0})(make([(-1.0, -2.5), (1.0, -0.5)]))
    expected = [math.log1p(math.exp(-0.5 * (1.5 - 3.0))), math.log1p(math.exp(-0.5 * 1.5))]
    assert found.tolist() == pytest.approx(expected)


def test_responses_of_one_token() -> None:
    """Means over one token are its own log-prob; an empty response is not divided by 0."""
    values = [torch.tensor([value], dtype=torch.float64) for value in (-2.0, -3.0, -1.0, -1.5)]
    one, none = torch.ones(1), torch.zeros(1)
    for lengths in ((one, one), (none, none)):
        simpo = resolve("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.25})(PairLogps(*values, *lengths))
        assert float(simpo) == pytest.approx(math.log1p(math.exp(-2.0 * (1.0 - 0.25))))
        ipo = resolve("ipo", {"beta": 0.5})(PairLogps(*values, *lengths))
        assert float(ipo) == pytest.approx((0.5 - 1.0) ** 2)
        gated = resolve("gated_dpo", {"sharpness": 4.0, "threshold": 0.1})
        logps = PairLogps(*(value.clone().requires_grad_() for value in values[:2]), *values[2:], *lengths)
        d_w, d_l = gradient_weights(gated(logps), logps)
        assert float(d_l / d_w) == pytest.approx(1 / (1 + math.exp(-4.0 * (math.exp(-3.0) - 0.1))))
