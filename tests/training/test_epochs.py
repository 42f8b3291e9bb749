"""Pairs that only fill a last batch up count for nothing: not in losses, their weights, or the metrics of a step."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.config import ObjectiveSection, TiltSection
from align.losses.pair_weights import LossTilt
from align.losses.pairwise import PairLogps
from align.models.collator import REAL, counted, only_real
from align.models.lm_head import TokenScores
from align.models.logps import SequenceLogps
from align.training.base.epochs import WholeEpochs
from align.training.metrics import PairMetrics
from reward_models.registry import resolve_objective
from reward_models.trainer import ObjectiveRewardTrainer

PROCESSES, ROWS, LEFT = 2, 3, 5
"""Six places in the last step of an epoch and five pairs."""
Gather = Callable[[Tensor], Tensor]


def together(work: Callable[[int, Gather], Any]) -> list[Any]:
    """What ``work(rank, gather)`` gives in two threads that stand for processes."""
    shared: list[Any] = [None] * PROCESSES
    found: list[Any] = [None] * PROCESSES
    barrier = threading.Barrier(PROCESSES, timeout=60)

    def run(rank: int) -> None:
        def gather(own: Tensor) -> Tensor:
            shared[rank] = own
            barrier.wait()
            every = torch.cat(shared)
            barrier.wait()
            return every

        found[rank] = work(rank, gather)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(PROCESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def trainer_of(name: str, tilted: bool, rank: int, processes: int, gather: Gather) -> Any:
    """As much of a reward trainer as its loss reads."""
    trainer: Any = ObjectiveRewardTrainer.__new__(ObjectiveRewardTrainer)
    trainer.accelerator = SimpleNamespace(
        gather=gather, process_index=rank, num_processes=processes, device=torch.device("cpu")
    )
    trainer.objective = resolve_objective(ObjectiveSection(name=name))
    trainer.model, trainer.state = SimpleNamespace(training=True), SimpleNamespace(global_step=0)
    trainer.args = SimpleNamespace(center_rewards_coefficient=0.1)
    trainer._metrics = {"train": {"weight/ess_share": []}}
    trainer.tilt = LossTilt(TiltSection(kind="down", temperature=0.5), gather, rank) if tilted else None
    return trainer


@pytest.mark.parametrize("name", ["bradley_terry", "auc", "aggregated"])
@pytest.mark.parametrize("tilted", [False, True])
def test_a_filled_up_batch_has_the_gradient_of_the_pairs_in_it(name: str, tilted: bool) -> None:
    rewards = torch.randn(2, PROCESSES * ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    every = {"bag": torch.tensor([0, 0, 1, 1, 1, 0]), "vote_share": torch.tensor([0.9, 0.9, 0.2, 0.2, 0.2, 0.9])}
    real = torch.arange(PROCESSES * ROWS) < LEFT

    def step(rank: int, gather: Gather) -> tuple[Tensor, Tensor]:
        rows = slice(ROWS * rank, ROWS * (rank + 1))
        trainer = trainer_of(name, tilted, rank, PROCESSES, gather)
        chosen, rejected = rewards[:, rows].clone().requires_grad_()
        columns = {key: every[key][rows] for key in trainer.objective.columns}
        loss = trainer._mean_loss(chosen, rejected, columns, real[rows])
        loss = loss * trainer._counts({"input_ids": torch.zeros(2 * ROWS, 4), REAL: real[rows]}) / LEFT
        return loss.detach(), torch.stack(torch.autograd.grad(loss, (chosen, rejected)))

    alone = trainer_of(name, tilted, 0, 1, lambda own: own)
    chosen, rejected = rewards[:, :LEFT].clone().requires_grad_()
    loss = alone._mean_loss(chosen, rejected, {key: every[key][:LEFT] for key in alone.objective.columns})
    gradient = torch.stack(torch.autograd.grad(loss, (chosen, rejected)))
    parts = together(step)
    assert torch.allclose(sum(part[0] for part in parts) / PROCESSES, loss)
    mean = torch.cat([part[1] for part in parts], dim=1) / PROCESSES
    assert torch.allclose(mean[:, :LEFT], gradient) and not mean[:, LEFT:].any()


@pytest.mark.parametrize("kind", ["up", "down", "quadratic", "comp_sum"])
def test_weights_from_losses_do_not_see_what_fills_up(kind: Any) -> None:
    config = TiltSection(kind=kind, temperature=0.5)
    losses, gap = torch.tensor([0.1, 2.0, 0.7, 0.4, 0.3, 9.0]), torch.tensor([2.0, -2.0, 0.0, 1.0, 1.2, -9.0])
    real = torch.arange(PROCESSES * ROWS) < LEFT
    whole, share = LossTilt(config, lambda own: own, 0)(losses[:LEFT], gap[:LEFT], 0)

    def weigh(rank: int, gather: Gather) -> tuple[Tensor, float]:
        rows = slice(ROWS * rank, ROWS * (rank + 1))
        return LossTilt(config, gather, rank)(losses[rows], gap[rows], 0, real[rows])

    parts = together(weigh)
    assert torch.allclose(torch.cat([part[0] for part in parts]), torch.cat([whole, torch.zeros(1)]))
    assert [part[1] for part in parts] == [pytest.approx(share)] * PROCESSES


def test_metrics_do_not_see_what_fills_up() -> None:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    count, real = 3, torch.tensor([True, True, False])
    logps = PairLogps(*(numbers(count) for _ in range(4)), torch.full((count,), 4), torch.full((count,), 5))
    tokens = TokenScores(*(numbers(2 * count, 4) for _ in range(4)))
    sequences = SequenceLogps(logps.chosen, logps.rejected, logps.chosen_length, logps.rejected_length, tokens)
    both = torch.cat([real, real])
    cut = TokenScores(*(values[both] for values in tokens))
    part = PairLogps(*(values[real] for values in vars_of(logps)))
    less = SequenceLogps(part.chosen, part.rejected, part.chosen_length, part.rejected_length, cut)
    found = []
    for policy, own, keep in ((sequences, logps, real), (less, part, None)):
        metrics = PairMetrics(beta=0.1, tau=2.0)
        size = len(own.chosen)
        metrics.add(policy, own, torch.arange(1.0, size + 1), torch.arange(float(size)), keep)
        found.append(metrics.flush(lambda values: values))
    assert found[0] == {name: pytest.approx(value) for name, value in found[1].items()}


def vars_of(logps: PairLogps) -> list[Tensor]:
    """The tensors of ``logps`` in the order of its fields."""
    return [getattr(logps, name) for name in PairLogps.__dataclass_fields__]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 40))
def test_the_pairs_of_the_last_step_are_marked(processes: int, rows: int, pairs: int) -> None:
    """Over all processes as many places are marked real as pairs are left for the last step, the first ones."""
    marks = []
    for rank in range(processes):
        trainer: Any = WholeEpochs()
        trainer.accelerator = SimpleNamespace(
            num_processes=processes,
            process_index=rank,
            gradient_state=SimpleNamespace(end_of_dataloader=True),
            gather=lambda own: own,
        )
        trainer.args = SimpleNamespace(dataloader_drop_last=False)
        trainer.train_dataset = range(pairs)
        batch = {"input_ids": torch.zeros(2 * rows, 3)}
        number = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        assert int(number) == counted(batch) == len(only_real(torch.zeros(rows), batch.get(REAL)))
        marks.append(batch.get(REAL, torch.ones(rows, dtype=torch.bool)))
    left = pairs % (processes * rows) or processes * rows
    if processes > 1:
        assert torch.cat(marks).tolist() == [True] * left + [False] * (processes * rows - left)
