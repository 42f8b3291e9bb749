"""Held-out numbers from which no step can be chosen: values that are not finite, a KL limit without a KL."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from align.config import KeepSection
from align.errors import ConfigError, NumericsError
from align.training import held_out_pass
from align.training.held_out import check_values
from align.training.held_out_choice import check_limit
from align.training.held_out_pass import HeldOutPass
from align.training.train import make_trainer
from tests.training.test_held_out import TRAINED, section, watch


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_pair_without_a_finite_loss_ends_the_training_by_its_name(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    """transformers keeps a first NaN as the best metric for good, because no number is smaller."""
    measure = HeldOutPass.__call__

    def broken(self: HeldOutPass) -> Any:
        values = measure(self)
        if self.trainer.state.global_step == 2:
            values["loss"][3] = bad
        return values

    monkeypatch.setattr(HeldOutPass, "__call__", broken)
    config = section(tiny_policy, keep={"rule": "held_out_loss"})
    trainer = make_trainer(Dataset.from_list(TRAINED), config, "m", tmp_path, seed=0, watch=watch(config))
    name = str(trainer.watch.pairs.pairs["id"][trainer.eval_dataset["row"][3]])
    with pytest.raises(NumericsError, match=rf"held-out pair {name}: found .*loss {bad}.*\(1 of 8 such pairs\)"):
        trainer.train()
    assert not (tmp_path / "held-out" / "step-2.json").exists()


def test_a_kl_that_is_not_measured_is_no_fault() -> None:
    check_values({"loss": np.ones(2), "kl_chosen": np.array([1.0, np.nan])}, ["a", "b"])
    with pytest.raises(NumericsError, match="held-out pair b: found loss 1, chosen -inf, expected"):
        check_values({"loss": np.ones(2), "chosen": np.array([0, -np.inf])}, ["a", "b"])


def test_a_limit_on_a_kl_that_is_not_measured_is_refused(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the states of all but one pair take too much space, the limit held for every step without a word."""
    monkeypatch.setattr(held_out_pass, "STATES_BYTES", 0)
    config = section(tiny_policy, keep={"rule": "held_out_loss", "kl_at_most": 0.5})
    watched = watch(config)
    assert watched.pairs is not None and watched.pairs.choosing is not None
    watched.pairs.choosing[:] = True
    trainer = make_trainer(Dataset.from_list(TRAINED), config, "m", tmp_path, seed=0, watch=watched)
    only = trainer.eval_dataset["row"][int(np.random.default_rng(0).permutation(8)[0])]
    watched.pairs.choosing[only] = False
    with pytest.raises(ConfigError, match="no KL is measured on the pairs that choose"):
        trainer.train()
    check_limit({"choosing": {}}, KeepSection(rule="win_rate", kl_at_most=1))
    check_limit({"choosing": {"kl": {"value": 1.0}}}, KeepSection(rule="held_out_loss", kl_at_most=1))
