"""``group_by_prompt``: the pairs of a prompt meet in a batch, each once an epoch, in an order of seed and epoch."""

import itertools
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from align.errors import ConfigError
from align.training.preference_config import PreferenceConfig
from align.training.prompt_order import PromptOrder
from align.training.trainer import PreferenceTrainer
from tests.helpers.builders import rows
from tests.training.test_trainer import BASE, ours


def several(prompts: int, of_each: int) -> list[dict[str, object]]:
    """Pairs of which each prompt has several, far from each other in the table."""
    return [
        pair | {"id": f"{pair['id']}-{k}", "chosen": f"{pair['chosen']}{' very' * k} good"}
        for k in range(of_each)
        for pair in rows(prompts)
    ]


def test_the_pairs_of_a_prompt_follow_each_other_in_an_order_of_the_seed() -> None:
    prompts = [[1], [2], [1], [3], [2], [1]]
    order = PromptOrder(prompts)
    drawn = set()
    for seed in range(40):
        order.generator = torch.Generator().manual_seed(seed)
        rows_of_epoch = list(order)
        order.generator = torch.Generator().manual_seed(seed)
        assert list(order) == rows_of_epoch and sorted(rows_of_epoch) == list(range(6)) and len(order) == 6
        runs = [prompts[row][0] for row in rows_of_epoch]
        assert len([1 for a, b in itertools.pairwise(runs) if a != b]) == 2
        drawn.add(tuple(rows_of_epoch))
    assert len(drawn) > 20


def test_a_training_takes_them_in_a_batch_and_trains_every_pair_once(tiny_policy: Path, tmp_path: Path) -> None:
    """The mean loss of an epoch at a rate of nearly 0 does not depend on the order."""
    table = Dataset.from_list(several(4, 4))
    losses = {}
    for grouped in (True, None):
        trainer = ours(tiny_policy, tmp_path / str(grouped), pairs=table, group_by_prompt=grouped, learning_rate=1e-12)
        batches: list[list[int]] = []
        step = trainer.training_step
        trainer.training_step = lambda model, inputs, items=None, s=step, b=batches: (  # type: ignore[method-assign]
            b.append(inputs["row"].tolist()), s(model, inputs, items))[1]  # fmt: skip
        trainer.train()
        assert sorted(row for batch in batches for row in batch) == list(range(16))
        if grouped:
            assert all(len({row % 4 for row in batch}) == 1 for batch in batches)
        losses[grouped] = sum(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert losses[True] == pytest.approx(losses[None], rel=1e-5)


def test_another_order_next_to_it_is_refused(tiny_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another order"):
        ours(tiny_policy, tmp_path, group_by_prompt=True, train_sampling_strategy="group_by_length")
    args = PreferenceConfig(str(tmp_path), **BASE, group_by_prompt=True)
    stream = Dataset.from_list(rows(8)).to_iterable_dataset()
    with pytest.raises(ConfigError, match="group_by_prompt"):
        PreferenceTrainer(str(tiny_policy), args=args, train_dataset=stream)
