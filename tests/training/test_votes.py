"""Policies under soft labels from the votes of raters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from align.config import LossSection
from align.data.votes import label_shares, with_majority
from align.errors import ConfigError, DataError
from align.losses.pairwise import PairLogps
from align.losses.registry import LOSSES, resolve
from align.training.columns import ignores_label, prepare_pairs
from align.training.loss_choice import check_parts
from align.training.preference_config import PreferenceConfig
from align.training.trainer import PreferenceTrainer
from tests.helpers.builders import causal, rows
from tests.training.test_trainer import BASE

VOTES = {"votes_chosen": 3.0, "votes_rejected": 1.0, "votes_tie": 0.0}


def voted(*votes: tuple[float, float, float]) -> Dataset:
    names = tuple(VOTES)
    table = [row | dict(zip(names, one, strict=True)) for row, one in zip(rows(len(votes)), votes, strict=True)]
    return Dataset.from_list([row | {"margin": k - 1.0} for k, row in enumerate(table)])


def losses(policy: Path, output: Path, table: Dataset, loss: str, **settings: Any) -> list[float]:
    """The loss of three steps over the whole table."""
    batch = BASE | {"per_device_train_batch_size": len(table), "max_steps": 3}
    args = PreferenceConfig(str(output), loss=loss, **batch | settings)
    trainer = PreferenceTrainer(str(policy), args=args, train_dataset=table)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("loss", ["dpo", "madpo", "ipo"])
def test_votes_n_of_n_are_a_hard_label(loss: str, tmp_path: Path) -> None:
    policy, table = causal(tmp_path / "policy"), voted(*[(4.0, 0.0, 0.0)] * 4)
    hard = losses(policy, tmp_path / "a", table, loss)
    assert losses(policy, tmp_path / "b", table, loss, pair_weights={"votes": True}) == pytest.approx(hard, abs=1e-5)


def test_three_of_four_votes_are_smoothed_labels(tmp_path: Path) -> None:
    policy, table = causal(tmp_path / "policy"), voted(*[(3.0, 1.0, 0.0)] * 4)
    smoothed = losses(policy, tmp_path / "a", table, "cdpo", loss_kwargs={"label_smoothing": 0.25})
    soft = losses(policy, tmp_path / "b", table, "dpo", pair_weights={"votes": True})
    assert soft == pytest.approx(smoothed, abs=1e-5) and soft != pytest.approx(
        losses(policy, tmp_path / "c", table, "dpo")
    )


def test_an_even_pair_pulls_the_policy_nowhere(tmp_path: Path) -> None:
    """At the reference the gradient of half of each label is 0, so dpo's loss stays log 2; under madpo as well."""
    policy = causal(tmp_path / "policy")
    for loss in ("dpo", "madpo"):
        table = voted((1.0, 1.0, 0.0), (0.0, 0.0, 2.0)).remove_columns("margin").add_column("margin", [0.0, 0.0])
        found = losses(policy, tmp_path / loss, table, loss, pair_weights={"votes": True})
        assert found == pytest.approx([found[0]] * 3, abs=1e-6)


def test_shares_count_a_tie_as_half_a_vote() -> None:
    table = voted((3, 1, 0), (0, 0, 2), (2, 1, 1), (0, 4, 0))
    assert label_shares(table, "x").tolist() == [0.75, 0.5, 0.625, 0.0]
    share = table.remove_columns(list(VOTES)).add_column("vote_share", [0.1, 0.2, 1.0, 0.0])
    assert label_shares(share, "x").tolist() == [0.1, 0.2, 1.0, 0.0]
    for wrong in (voted((0, 0, 0)), voted((-1, 2, 0)), share.remove_columns("vote_share")):
        with pytest.raises(DataError) as caught:
            label_shares(wrong, "weights.votes")
        assert caught.value.code == "votes" and "weights.votes" in str(caught.value)


def test_pairs_without_a_majority_are_refused_where_chosen_is_the_better_one() -> None:
    table = voted((3, 1, 0), (1, 1, 4), (0, 2, 0))
    with pytest.raises(DataError, match=r"2 of 3 pairs have no majority for chosen, and the loss dpo reads no votes"):
        prepare_pairs(table, None, resolve("dpo", {}))
    assert len(prepare_pairs(table, None, resolve("mmpo", {}))[0]) == 3, "it reads margins alone"


@pytest.mark.parametrize("name", ["mmpo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"])
def test_losses_that_read_no_label(name: str) -> None:
    assert ignores_label(resolve(name, {}))
    assert not any(ignores_label(resolve(other, {})) for other in ("dpo", "madpo", "odpo", "trust"))


@pytest.mark.parametrize("name", [name for name, spec in LOSSES.items() if spec.from_logps])
def test_swapping_twice_changes_nothing(name: str) -> None:
    logps = PairLogps(*torch.randn(4, 5, dtype=torch.float64), *torch.randint(1, 9, (2, 5)))
    loss, margin = resolve(name, {}), torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(loss(logps.swapped.swapped, margin), loss(logps, margin))


@pytest.mark.parametrize("section", [{"token_mask": {}}, {"remedy": {"kind": "hold_chosen"}}])
def test_what_has_no_mean_over_labels_is_refused(section: dict[str, Any]) -> None:
    config = LossSection(loss="dpo", weights={"votes": True}, **section)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dpo has no mean over the labels"):
        check_parts("m", config, resolve("dpo", {}))
    with pytest.raises(ConfigError, match="beta_dpo has no mean over the labels"):
        check_parts("m", LossSection(loss="beta_dpo", weights={"votes": True}), resolve("beta_dpo", {}))  # type: ignore[arg-type]


def test_only_pairs_with_a_majority_are_judged(caplog: pytest.LogCaptureFixture) -> None:
    table = voted((3, 1, 0), (1, 1, 4), (0, 2, 0))
    with caplog.at_level("INFO"):
        assert with_majority(table, "accuracy")["id"] == table["id"][:1]
    assert "accuracy: 2 of 3 pairs are left out, because no majority prefers their chosen response" in caplog.text
    plain = table.remove_columns(list(VOTES))
    assert with_majority(plain, "accuracy") is plain
    with pytest.raises(DataError, match="accuracy: found no majority for chosen in any of 1 pairs"):
        with_majority(table.select([1]), "accuracy")
