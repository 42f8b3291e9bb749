"""Losses that compare the pairs of a step: against plain Python, their limits, gradients of the whole step, states."""

import math
from typing import Any

import pytest
import torch

from align.losses.pairwise import PairLogps, gradient_weights
from align.losses.registry import LOSSES, resolve
from align.losses.step_statistics import QUEUE, AlphaDpoScore, BcoShift, gamma_targets, ranks
from tests.losses.inputs import evaluate, make, statistics_of

PAIRS = [(1.0, -1.0), (-2.0, 3.0), (4.0, 3.5), (0.5, -2.0), (-1.0, -1.5)]
COUPLED = [name for name, spec in LOSSES.items() if spec.coupled]


def softplus(z: float) -> float:
    """-log sigmoid(-z) in plain Python."""
    return math.log1p(math.exp(z)) if z < 30 else z


def test_ranks() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 2.0, 1.0])).tolist() == [3, 0, 2, 1]


def test_aot_against_plain_python() -> None:
    """The sorted log-ratios of the policy against the sorted ones of the reference."""
    logps = make(PAIRS)
    logps = PairLogps(
        logps.chosen, logps.rejected, torch.tensor([-50.0, -47, -49, -52, -50]).double(), logps.ref_rejected,
        logps.chosen_length, logps.rejected_length,
    )  # fmt: skip
    policy = (logps.chosen - logps.rejected).tolist()
    reference = (logps.ref_chosen - logps.ref_rejected).tolist()
    expected = [softplus(-0.1 * (a - b)) for a, b in zip(sorted(policy), sorted(reference), strict=True)]
    order = sorted(range(5), key=lambda k: policy[k])
    assert evaluate("aot", logps)[order].tolist() == pytest.approx(expected)


def test_aot_unpaired_is_the_loss_of_the_sorted_sides_with_its_gradient() -> None:
    """The sum over the step and its gradient are those of -log sigmoid(beta (sorted chosen - sorted rejected))."""
    found, expected = make(PAIRS), make(PAIRS)
    value = evaluate("aot_unpaired", found, label_smoothing=0.2)
    z = 0.1 * (expected.chosen_ratio.sort().values - expected.rejected_ratio.sort().values)
    plain = 0.8 * torch.nn.functional.softplus(-z) + 0.2 * torch.nn.functional.softplus(z)
    assert float(value.sum()) == pytest.approx(float(plain.sum()))
    for a, b in zip(gradient_weights(value, found), gradient_weights(plain, expected), strict=True):
        assert torch.allclose(a, b) and float(a.abs().max()) > 0


def test_amapo_golden_of_two_pairs() -> None:
    """x = 0.1 and 0.3 at beta 2: 2.218923 and 0.437488; the pair below the mean has the offset."""
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    chosen = torch.tensor([-1.9, -1.7], dtype=torch.float64)
    found = evaluate("amapo", PairLogps(chosen, -2 * one, zero, zero, one, one))
    assert found.tolist() == pytest.approx([2.218923, 0.437488], abs=1e-6)


def test_amapo_of_equal_pairs_has_no_offset() -> None:
    logps = make([PAIRS[0]] * 3)
    expected = evaluate("simpo", logps, beta=2.0, gamma_beta_ratio=0.0)
    assert torch.allclose(evaluate("amapo", logps), expected)


@pytest.mark.parametrize("normalized", [True, False])
def test_alpha_dpo_against_plain_python(normalized: bool) -> None:
    """The second step of a training: running statistics hold 0.9 of the first step's and 0.1 of its own."""
    bound = resolve("alpha_dpo", {"length_normalize": normalized})
    statistic, mean, spread = AlphaDpoScore(bound.parameters, 0), 0.0, 0.0
    for step, pairs in enumerate((PAIRS[:3], PAIRS[2:])):
        logps = make(pairs)
        w, r = (logps.chosen_length, logps.rejected_length) if normalized else (torch.ones(3), torch.ones(3))
        h = (logps.chosen_ratio / w - logps.rejected_ratio / r).tolist()
        x = (logps.chosen / w - logps.rejected / r).tolist()
        average = sum(h) / 3
        mean = 0.9 * mean + 0.1 * average
        spread = 0.9 * spread + 0.1 * math.sqrt(sum((value - average) ** 2 for value in h) / 2)
        expected = [softplus(-2.5 * (a - 0.2 * (b - mean) / spread - 0.6)) for a, b in zip(x, h, strict=True)]
        values = {"alpha_dpo": statistic(statistic.columns(logps).detach(), step, update=True)[0]}
        assert bound(logps, statistics=values).tolist() == pytest.approx(expected)


def test_alpha_dpo_at_the_start_is_simpo() -> None:
    """Before the first step all h are 0 up to rounding, and no pair stands out."""
    logps = make([(1e-6, -2e-6), (-3e-6, 0.0), (2e-6, 2e-6)])
    expected = evaluate("simpo", logps, beta=2.5, gamma_beta_ratio=0.6)
    assert torch.allclose(evaluate("alpha_dpo", logps), expected)


def test_bco_has_the_mean_reward_of_all_pairs_so_far() -> None:
    bound = resolve("bco", {"beta": 0.5})
    statistic = BcoShift(bound.parameters, 0)
    first, second = make(PAIRS[:1]), make(PAIRS[1:3])
    statistic(statistic.columns(first).detach(), 0, update=True)
    values, logged = statistic(statistic.columns(second).detach(), 1, update=False)
    delta = 0.5 * (1 - 1 - 2 + 3 + 4 + 3.5) / 6
    assert logged["delta"] == pytest.approx(delta)
    expected = [softplus(-0.5 * c + delta) + softplus(0.5 * r - delta) for c, r in PAIRS[1:3]]
    assert bound(second, statistics={"bco": values}).tolist() == pytest.approx(expected)
    assert statistic.state_dict() == {"mean": pytest.approx(0.0), "pairs": 1}


def test_gamma_targets_against_plain_python() -> None:
    gaps, whole, tau = [0.3, -1.0, 2.0], 1.25, 5.0
    p, rate = [1 / 3] * 3, min(0.5 / tau, 1)
    for _ in range(20):
        gradient = [
            tau * (1 + math.log(3 * share)) + whole / (1 + math.exp(gap - whole * 3 * share))
            for share, gap in zip(p, gaps, strict=True)
        ]
        unnormalized = [share * math.exp(-rate * g) for share, g in zip(p, gradient, strict=True)]
        p = [value / sum(unnormalized) for value in unnormalized]
    found = gamma_targets(torch.tensor(gaps, dtype=torch.float64), whole=whole, tau=tau)
    assert found.tolist() == pytest.approx([whole * 3 * share for share in p])
    assert float(found.mean()) == pytest.approx(whole) and found.tolist()[1] < found.tolist()[0] < found.tolist()[2]


def test_gamma_po_of_equal_pairs_is_simpo_and_its_dpo_form_dpo() -> None:
    logps = make([PAIRS[2]] * 4)
    expected = evaluate("simpo", logps, beta=2.5, gamma_beta_ratio=0.5)
    assert torch.allclose(evaluate("gamma_po", logps), expected)
    assert torch.allclose(evaluate("gamma_dpo", logps), evaluate("dpo", logps))


def test_gamma_po_remembers_the_latest_gaps() -> None:
    bound = resolve("gamma_po", {})
    assert bound.spec.statistics is not None
    statistic: Any = bound.spec.statistics(bound.parameters, 0)
    values = torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None]
    first, _ = statistic(values, 0, update=True)
    again, _ = statistic(values, 1, update=True)
    assert not torch.allclose(first, again) and len(statistic.queue) == QUEUE
    whole = torch.cat([values[-56:], values])[:, 0]
    assert torch.allclose(again[:, 0], gamma_targets(whole, whole=1.25, tau=10.0)[56:])


@pytest.mark.parametrize("name", COUPLED)
def test_the_state_continues_from_a_checkpoint(name: str) -> None:
    """A statistic that is restored computes what the first one computes, and looking alone changes nothing."""
    bound = resolve(name, {})
    assert bound.spec.statistics is not None
    first, restored = (bound.spec.statistics(bound.parameters, 1) for _ in range(2))
    columns = first.columns(make(PAIRS)).detach()
    first(columns, 0, update=True)
    restored.load_state_dict(first.state_dict())
    first(2 * columns, 1, update=False)
    assert torch.equal(first(columns, 1, update=True)[0], restored(columns, 1, update=True)[0])


@pytest.mark.parametrize("name", COUPLED)
def test_statistics_carry_no_gradient_and_are_needed(name: str) -> None:
    logps = make(PAIRS)
    assert not statistics_of(resolve(name, {}), logps)[name].requires_grad
    with pytest.raises(TypeError, match=f"{name} has no loss for a single pair"):
        resolve(name, {})(logps)
