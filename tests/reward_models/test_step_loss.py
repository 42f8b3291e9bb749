"""The loss of a reward model's forward pass: two processes have the loss and gradient of one, duplicates excluded."""

import pytest
import torch
from torch import Tensor

from align.config import ObjectiveSection, TiltSection
from align.losses.pair_weights import LossTilt
from reward_models.registry import resolve_objective
from reward_models.step_loss import StepLoss
from tests.training.test_epochs import PROCESSES, ROWS, Gather, together

PAIRS = PROCESSES * ROWS
COLUMNS = {"bag": torch.tensor([0, 0, 1, 1, 1, 0]), "vote_share": torch.tensor([0.9, 0.9, 0.2, 0.2, 0.2, 0.9])}


def step_loss(name: str, tilted: bool, rank: int, processes: int, gather: Gather) -> StepLoss:
    tilt = LossTilt(TiltSection(kind="down", temperature=0.5), gather, rank) if tilted else None
    objective = resolve_objective(ObjectiveSection(name=name))
    return StepLoss(objective, tilt=tilt, centering=0.1, gather=gather, rank=rank, processes=processes)


@pytest.mark.parametrize("name", ["bradley_terry", "auc", "aggregated"])
@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("count", [PAIRS, PAIRS - 1])
def test_two_processes_have_the_gradient_of_one(name: str, tilted: bool, count: int) -> None:
    """The means over the processes of gradients and of losses, each times its pairs; the sixth may be a duplicate."""
    rewards = torch.randn(2, PAIRS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    real = None if count == PAIRS else torch.arange(PAIRS) < count

    def step(rank: int, gather: Gather) -> tuple[Tensor, Tensor]:
        rows = slice(ROWS * rank, ROWS * (rank + 1))
        loss_of = step_loss(name, tilted, rank, PROCESSES, gather)
        chosen, rejected = rewards[:, rows].clone().requires_grad_()
        columns = {key: COLUMNS[key][rows] for key in loss_of.objective.columns}
        local = None if real is None else real[rows]
        loss, _ = loss_of(chosen, rejected, columns, local, step=0)
        pairs = count if loss_of.objective.spec.coupled else PROCESSES * (ROWS if local is None else int(local.sum()))
        loss = loss * pairs / count
        return loss.detach(), torch.stack(torch.autograd.grad(loss, (chosen, rejected)))

    single = step_loss(name, tilted, 0, 1, lambda local: local)
    chosen, rejected = rewards[:, :count].clone().requires_grad_()
    columns = {key: COLUMNS[key][:count] for key in single.objective.columns}
    expected, _ = single(chosen, rejected, columns, step=0)
    gradient = torch.stack(torch.autograd.grad(expected, (chosen, rejected)))
    parts = together(step)
    assert torch.allclose(sum(loss for loss, _ in parts) / PROCESSES, expected)
    mean = torch.cat([part for _, part in parts], dim=1) / PROCESSES
    assert torch.allclose(mean[:, :count], gradient) and not mean[:, count:].any()


def test_the_tilt_acts_in_training_alone() -> None:
    chosen, rejected = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    loss_of = step_loss("bradley_terry", True, 0, 1, lambda local: local)
    plain = step_loss("bradley_terry", False, 0, 1, lambda local: local)
    evaluated, none = loss_of(chosen, rejected, {})
    trained, share = loss_of(chosen, rejected, {}, step=0)
    assert none is None and torch.equal(evaluated, plain(chosen, rejected, {}, step=0)[0])
    assert share is not None and share < 1 and not torch.allclose(trained, evaluated)
