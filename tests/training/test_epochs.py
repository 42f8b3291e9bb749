"""Duplicates that only fill the last batch of an epoch do not count: not in weights, nor in the metrics of a step."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.trainer_pt_utils import LengthGroupedSampler

from align.config import TiltSection
from align.errors import ConfigError
from align.losses.pair_weights import LossTilt
from align.losses.pairwise import PairLogps
from align.models.collator import REAL, counted, only_real
from align.models.lm_head import TokenScores
from align.models.logps import SequenceLogps
from align.training.base.epochs import WholeEpochs
from align.training.metrics import PairMetrics, WeightTotals

PROCESSES, ROWS, LEFT = 2, 3, 5
"""The last step of an epoch has room for six pairs and five are left."""
Gather = Callable[[Tensor], Tensor]


def together(work: Callable[[int, Gather], Any]) -> list[Any]:
    """Results of ``work(rank, gather)`` in two threads that stand for processes."""
    shared: list[Any] = [None] * PROCESSES
    results: list[Any] = [None] * PROCESSES
    barrier = threading.Barrier(PROCESSES, timeout=60)

    def run(rank: int) -> None:
        def gather(local: Tensor) -> Tensor:
            shared[rank] = local
            barrier.wait()
            gathered = torch.cat(shared)
            barrier.wait()
            return gathered

        results[rank] = work(rank, gather)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(PROCESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("kind", ["up", "down", "quadratic", "comp_sum"])
def test_weights_from_losses_exclude_duplicates(kind: Any) -> None:
    config = TiltSection(kind=kind, temperature=0.5)
    losses, gap = torch.tensor([0.1, 2.0, 0.7, 0.4, 0.3, 9.0]), torch.tensor([2.0, -2.0, 0.0, 1.0, 1.2, -9.0])
    real = torch.arange(PROCESSES * ROWS) < LEFT
    expected, share = LossTilt(config, lambda local: local, 0)(losses[:LEFT], gap[:LEFT], 0)

    def weigh(rank: int, gather: Gather) -> tuple[Tensor, float]:
        rows = slice(ROWS * rank, ROWS * (rank + 1))
        return LossTilt(config, gather, rank)(losses[rows], gap[rows], 0, real[rows])

    parts = together(weigh)
    assert torch.allclose(torch.cat([part[0] for part in parts]), torch.cat([expected, torch.zeros(1)]))
    assert [part[1] for part in parts] == [pytest.approx(share)] * PROCESSES


def test_metrics_exclude_duplicates() -> None:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    count, real = 3, torch.tensor([True, True, False])
    logps = PairLogps(*(numbers(count) for _ in range(4)), torch.full((count,), 4), torch.full((count,), 5))
    tokens = TokenScores(*(numbers(2 * count, 4) for _ in TokenScores._fields))
    sequences = SequenceLogps(logps.chosen, logps.rejected, logps.chosen_length, logps.rejected_length, tokens)
    both = torch.cat([real, real])
    cut = TokenScores(*(values[both] for values in tokens))
    part = PairLogps(*(None if values is None else values[real] for values in vars_of(logps)))
    less = SequenceLogps(part.chosen, part.rejected, part.chosen_length, part.rejected_length, cut)
    found = []
    for policy, own, keep in ((sequences, logps, real), (less, part, None)):
        metrics = PairMetrics(beta=0.1, tau=2.0)
        size = len(own.chosen)
        metrics.add(policy, own, torch.arange(1.0, size + 1), torch.arange(float(size)), keep)
        totals = WeightTotals()
        found.append(metrics.flush(lambda values: values, totals) | totals.flush())
    assert found[0] == {name: pytest.approx(value) for name, value in found[1].items()}


def vars_of(logps: PairLogps) -> list[Any]:
    """The tensors of ``logps`` in the order of its fields; None for those that it lacks."""
    return [getattr(logps, name) for name in PairLogps.__dataclass_fields__]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 40))
def test_the_pairs_of_the_last_step_are_marked(processes: int, rows: int, pairs: int) -> None:
    """Over all processes, the first places are marked real, as many as pairs are left for the last step."""
    marks = []
    for rank in range(processes):
        trainer: Any = WholeEpochs()
        trainer.accelerator = SimpleNamespace(
            num_processes=processes,
            process_index=rank,
            gradient_state=SimpleNamespace(end_of_dataloader=True),
            gather=lambda local: local,
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


class Sampled:
    """Stands for transformers' Trainer: groups of pairs of similar length."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        return LengthGroupedSampler(3, lengths=[5, 6, 7, 8], model_input_name="input_ids")


class SampledEpochs(WholeEpochs, Sampled):
    """The mixin before the class that it extends."""


@pytest.mark.parametrize(("processes", "size"), [(1, 3), (2, 6), (5, 15)])
def test_length_groups_span_all_processes(processes: int, size: int) -> None:
    trainer: Any = SampledEpochs()
    trainer.accelerator = SimpleNamespace(num_processes=processes)
    assert trainer._get_train_sampler().batch_size == size


@pytest.mark.parametrize(
    ("settings", "strategy", "message"),
    [
        ({"even_batches": False}, "random", "accelerator_config.even_batches: found false"),
        ({"dispatch_batches": True}, "random", "accelerator_config.dispatch_batches: found true"),
        ({}, "batch_rebalance", "train_sampling_strategy: found batch_rebalance"),
        ({}, "group_by_length", None),
    ],
)
def test_settings_that_lose_pairs_are_refused_with_several_processes(
    settings: dict[str, bool], strategy: str, message: str | None
) -> None:
    class Loader:
        def get_train_dataloader(self) -> str:
            return "loader"

    trainer: Any = type("Loading", (WholeEpochs, Loader), {})()
    trainer.train_dataset = range(9)
    config = SimpleNamespace(**({"even_batches": True, "dispatch_batches": None} | settings))
    trainer.args = SimpleNamespace(
        accelerator_config=config, train_sampling_strategy=strategy, train_batch_size=3, dataloader_drop_last=True
    )
    trainer.accelerator = SimpleNamespace(num_processes=1)
    assert trainer.get_train_dataloader() == "loader"
    trainer.accelerator.num_processes = 2
    if message is None:
        assert trainer.get_train_dataloader() == "loader"
    else:
        with pytest.raises(ConfigError, match=message):
            trainer.get_train_dataloader()
    trainer.train_dataset = range(5)
    with pytest.raises(ConfigError, match="found true and 5 pairs, expected at least the 6"):
        trainer.get_train_dataloader()
