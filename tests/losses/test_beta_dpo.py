"""beta-DPO: statistics and draws by hand; its state between steps and in a checkpoint."""

import math

import pytest
import torch

from align.losses.beta_dpo import BetaDpoState, beta_dpo, beta_dpo_step
from align.losses.registry import resolve
from align.losses.step_statistics import BetaDpo
from tests.losses.inputs import make

GAPS = [(1.0, 0.0), (2.0, 0.5), (-1.0, 0.0), (0.5, 0.0), (9.0, 1.0), (3.0, 2.0)]


def test_beta_dpo_against_plain_python() -> None:
    """Statistics, beta and mean loss recomputed without tensors for the pairs that were kept."""
    gaps = [1.0, 2.0, -1.0, 0.5, 9.0]
    settings_ = {"beta": 0.1, "alpha": 0.6, "rho": 0.8, "momentum": 0.9}
    beta, keep, state = beta_dpo_step(
        torch.tensor(gaps), BetaDpoState(0.5, 1.0), **settings_, generator=torch.Generator().manual_seed(3)
    )
    average = sum(gaps) / 5
    spread = math.sqrt(sum((gap - average) ** 2 for gap in gaps) / 4)
    assert state == BetaDpoState(pytest.approx(0.45 + 0.1 * average), pytest.approx(0.9 + 0.1 * spread))
    kept = [gap for gap, is_kept in zip(gaps, keep.tolist(), strict=True) if is_kept]
    assert len(kept) == 4
    assert beta == pytest.approx(0.1 * (1 + 0.6 * (sum(kept) / 4 - state.mean)))
    logps = make([(gap, 0.0) for gap in gaps])
    found = beta_dpo(logps, beta=beta, keep=keep, scale=5 / 4).mean()
    assert float(found) == pytest.approx(sum(math.log1p(math.exp(-beta * gap)) for gap in kept) / 4)


def test_beta_dpo_clamps_and_is_reproducible() -> None:
    def step(gaps: list[float]) -> tuple[float, list[bool]]:
        generator = torch.Generator().manual_seed(0)
        beta, keep, _ = beta_dpo_step(
            torch.tensor(gaps), BetaDpoState(), beta=0.1, alpha=0.6, rho=0.8, momentum=0.9, generator=generator
        )
        return beta, keep.tolist()

    assert step([-100.0, -101.0, -99.0])[0] == 1e-3
    assert step([1.0, 2.0, 3.0, 4.0]) == step([1.0, 2.0, 3.0, 4.0])


def test_statistics_start_at_0_and_one_pair_at_least_is_kept() -> None:
    assert BetaDpoState() == BetaDpoState(0.0, 0.0)
    for count, kept in ((4, 1), (10, 1), (20, 2), (1, 1)):
        _, keep, _ = beta_dpo_step(
            torch.arange(float(count)), BetaDpoState(), beta=0.1, alpha=0.6, rho=0.1, momentum=0.9,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert int(keep.sum()) == kept


def test_the_state_of_a_training() -> None:
    """It is updated in training only, the draw depends on the step, and both continue from a checkpoint."""
    parameters = resolve("beta_dpo", {}).parameters
    statistic, columns = BetaDpo(parameters, 3), torch.tensor(GAPS, dtype=torch.float64).diff(dim=1).neg()
    assert statistic.state_dict() == {"mean": 0.0, "std": 0.0}
    evaluated, _ = statistic(columns, 0, update=False)
    assert statistic.state == BetaDpoState()
    assert len({tuple((statistic(columns, step, update=False)[0][:, 1] > 0).tolist()) for step in range(10)}) > 1
    trained, logged = statistic(columns, 0, update=True)
    assert torch.equal(evaluated, trained) and statistic.state.mean == pytest.approx(0.1 * 11 / 6)
    assert (trained[:, 0] == logged["beta"]).all() and float(trained[:, 1].sum()) == pytest.approx(len(GAPS))
    resumed = BetaDpo(parameters, 3)
    resumed.load_state_dict(statistic.state_dict())
    again, other = (item(columns, 1, update=True)[0] for item in (statistic, resumed))
    assert torch.equal(again, other) and not torch.equal(again, trained)
