"""Conditions against real gradient steps on small softmax policies, and their algebra."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.entanglement.conditions import Changes, changes, loss_weights, shares, slack
from align.losses.pairwise import PairLogps
from align.losses.registry import LOSSES, resolve

POSITIVE = st.floats(0.05, 20)
REAL = st.floats(-20, 20)
SMALL = 1e-9


def vectors(seed: int, pairs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(pairs, 3, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def tensors(*values: float) -> list[Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


@given(st.integers(0, 10**6), REAL, REAL)
def test_changes_are_those_of_a_step(seed: int, d_w: float, d_l: float) -> None:
    """Log-probs that are linear in the parameters change by exactly the predicted amount."""
    gw, gl = vectors(seed, 1)
    found = changes((gw * gw).sum(1), (gl * gl).sum(1), (gw * gl).sum(1), *tensors(d_w, d_l), noise=SMALL)
    step = d_w * gw - d_l * gl
    assert torch.allclose(found.chosen, (gw * step).sum(1)) and torch.allclose(found.rejected, (gl * step).sum(1))
    assert torch.allclose(found.margin, ((gw - gl) * step).sum(1), atol=1e-9)


@given(st.integers(0, 10**6), POSITIVE, POSITIVE, POSITIVE)
def test_verdict_band_and_weights(seed: int, d_w: float, d_l: float, weight: float) -> None:
    """The slack has the sign of the verdict; a pair's weight changes neither; with d > 0 no pair is reversed."""
    gw, gl = vectors(seed, 1)
    products = ((gw * gw).sum(1), (gl * gl).sum(1), (gw * gl).sum(1))
    (verdict,) = changes(*products, *tensors(d_w, d_l), noise=SMALL).verdicts()
    room = float(slack(*products, *tensors(d_w, d_l)))
    if verdict != "undecided":
        assert (verdict == "separated") == (room > 0)
        assert verdict in {"separated", "both fall", "both rise"}
        assert changes(*products, *tensors(weight * d_w, weight * d_l), noise=SMALL).verdicts() == [verdict]
    if d_w == d_l:
        assert float(changes(*products, *tensors(d_w, d_l), noise=SMALL).margin) >= 0


def test_named_cases() -> None:
    """Equal gradients, no gradient, opposite gradients, a much longer rejected gradient, a negative d."""
    chosen_sq, rejected_sq, inner, d_w, d_l, expected = zip(
        (1.0, 1.0, 1.0, 0.5, 0.5, "undecided"),
        (1.0, 1.0, 0.2, 0.0, 0.0, "no signal"),
        (1.0, 4.0, -1.0, 0.5, 0.5, "separated"),
        (1.0, 25.0, 4.0, 0.5, 0.5, "both fall"),
        (25.0, 1.0, 4.0, 0.5, 0.5, "both rise"),
        (1.0, 1.0, 0.2, -0.5, -0.5, "reversed"),
        strict=True,
    )
    columns = [torch.tensor(values, dtype=torch.float64) for values in (chosen_sq, rejected_sq, inner, d_w, d_l)]
    verdicts = changes(*columns, noise=SMALL).verdicts()
    assert verdicts == list(expected)
    assert shares(verdicts)["both fall"] == pytest.approx(1 / 6) and sum(shares(verdicts).values()) == pytest.approx(1)
    assert shares(["both fall"])["both fall"] == 1.0 and set(shares([]).values()) == {0.0}
    room = slack(*columns).tolist()
    assert room[2] == math.inf and math.isnan(room[5])


@pytest.mark.parametrize("name", sorted(n for n, s in LOSSES.items() if s.from_logps and n != "gated_dpo"))
def test_loss_weights_are_the_derivatives(name: str) -> None:
    """Central differences of every registered loss but the gated one, whose gradient is not that of its value."""
    generator = torch.Generator().manual_seed(0)
    columns = [-10 * torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(4)]
    lengths = [torch.randint(2, 9, (5,), generator=generator) for _ in range(2)]
    margin = 2 * torch.randn(5, generator=generator, dtype=torch.float64)
    loss, weight = resolve(name, {}), torch.rand(5, generator=generator, dtype=torch.float64)

    def value(chosen: Tensor, rejected: Tensor) -> Tensor:
        return weight * loss(PairLogps(chosen, rejected, *columns[2:], *lengths), margin)

    d_w, d_l = loss_weights(loss, PairLogps(*columns, *lengths), margin, weight)
    step = 1e-5
    up, down = value(columns[0] + step, columns[1]), value(columns[0] - step, columns[1])
    assert torch.allclose(d_w, -(up - down) / (2 * step), atol=1e-6)
    up, down = value(columns[0], columns[1] + step), value(columns[0], columns[1] - step)
    assert torch.allclose(d_l, (up - down) / (2 * step), atol=1e-6)
    if name in {"dpo", "madpo", "odpo", "cdpo"}:
        assert torch.allclose(d_w, d_l)
    plain = loss_weights(loss, PairLogps(*columns, *lengths), margin)
    assert torch.allclose(weight * plain[0], d_w) and torch.allclose(weight * plain[1], d_l)


def test_a_sign_within_noise_is_undecided_on_either_side() -> None:
    """One of the two signs is enough; a change of 1e-4 of its terms is decided, one of 1e-6 is not."""
    large, small, noise = (torch.tensor([value], dtype=torch.float64) for value in (1.0, 1e-9, 1e-6))
    assert Changes(large, small, noise, noise).verdicts() == ["undecided"]
    assert Changes(small, -large, noise, noise).verdicts() == ["undecided"]
    assert Changes(large, -large, noise, noise).verdicts() == ["separated"]
    one = torch.ones(1, dtype=torch.float64)
    for inner, expected in ((1 - 1e-4, "separated"), (1 - 1e-6, "undecided")):
        assert changes(one, one, inner * one, one, one, noise=1e-5).verdicts() == [expected]
