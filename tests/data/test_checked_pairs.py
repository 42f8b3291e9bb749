"""Checked pairs among the training pairs: shares, replaced pairs, held-out pairs, what is refused."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from align import with_checked_pairs
from align.data.checked_pairs import checked_share, checked_weight, default_share, divided, together, without_held_out
from align.errors import AlignError


def pair(name: str, prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "prompt": prompt, "chosen": chosen, "rejected": rejected} | more


NOISY = [pair(f"n{k}", f"question {k}", f"good {k}", f"bad {k}") for k in range(8)]
CHECKED = [pair("c0", "fresh 0", "yes 0", "no 0"), pair("c1", "fresh 1", "yes 1", "no 1")]


def test_the_default_share_goes_through_the_measured_points() -> None:
    """0.1 for 50, 0.25 for 200, linear between and below, constant beyond, never less than the share of the pairs."""
    assert [default_share(k, 100_000) for k in (25, 50, 125, 200, 1000)] == pytest.approx(
        [0.05, 0.1, 0.175, 0.25, 0.25]
    )
    assert default_share(200, 200) == pytest.approx(0.5)
    assert default_share(50, 50_000) * 50_050 / 50 > 1


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_the_checked_pairs_have_their_share_of_the_weight(share: float) -> None:
    weighted = [one | {"weight": float(k % 3)} for k, one in enumerate(NOISY)]
    table = with_checked_pairs(weighted, CHECKED, share=share)
    weights = np.array(table["weight"])
    assert weights[:8].tolist() == [float(k % 3) for k in range(8)]
    assert weights[8:].sum() / weights.sum() == pytest.approx(share)
    assert checked_share(table) == pytest.approx(share)
    assert table["checked"] == [False] * 8 + [True] * 2
    assert checked_weight(2, 7.0, share) == pytest.approx(weights[8])


@pytest.mark.parametrize("flipped", [False, True])
def test_a_checked_pair_replaces_the_same_training_pair(flipped: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever label and whatever case and white space it has there; another pair of the prompt stays."""
    own = pair("n3", " QUESTION  3", "Bad 3" if flipped else "Good 3", "good 3" if flipped else "bad 3")
    other = pair("n9", "question 3", "good 3", "another answer")
    table = with_checked_pairs([*NOISY, other], [own])
    assert table["id"] == ["n0", "n1", "n2", "n4", "n5", "n6", "n7", "n9", "n3"]
    assert table[8]["chosen"] == own["chosen"]
    assert f"1 of 9 training pairs are replaced by checked ones, of which {int(flipped)} have the other" in caplog.text


def test_columns_go_together() -> None:
    """Gaps where the checked pairs lack a column; what only they have is left out; equal ids get a prefix."""
    noisy = [one | {"margin": 1.5, "group": "a"} for one in NOISY]
    table = with_checked_pairs(noisy, [CHECKED[0] | {"id": "n1", "bag": "b"}])
    assert table[8]["id"] == "checked:n1"
    assert table[8]["margin"] is None
    assert "bag" not in table.column_names


def test_a_filter_leaves_the_share_as_it_was() -> None:
    table = with_checked_pairs(NOISY, CHECKED, share=0.4)
    others, checked = divided(table)
    again = together(others.select(range(3)), checked, checked_share(table) or 0.0, "filter")
    assert checked_share(again) == pytest.approx(0.4)
    assert len(again) == 5


def test_held_out_pairs_are_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    held = Dataset.from_list([pair("h", "fresh 0", "yes 0", "something else")])
    checked = Dataset.from_list(CHECKED)
    assert without_held_out(checked, held, "checked")["id"] == ["c1"]
    assert "1 of 2 pairs, or their responses, are held out and were left out: 'c0'" in caplog.text
    with pytest.raises(AlignError, match=r"\[checked-pairs\] checked: all 1 pairs, or their responses, are held out"):
        without_held_out(checked.select([0]), held, "checked")


MESSAGES = [{"role": "user", "content": "hello"}]
ANSWER, OTHER = [{"role": "assistant", "content": "hi"}], [{"role": "assistant", "content": "no"}]


@pytest.mark.parametrize(
    ("checked", "share", "message"),
    [
        ([{"prompt": "p", "better": "a"}], None, r"\[data-column\] checked: "),
        (CHECKED, 0.0, r"\[config-option\] share: found 0.0, expected a number between 0 and 1"),
        (CHECKED, 1, r"\[config-option\] share: found 1,"),
        (CHECKED, float("nan"), r"\[config-option\] share: found nan"),
        ([CHECKED[0] | {"weight": 2.0}], None, r"\[checked-pairs\] checked: found a column `weight`"),
        (NOISY, None, r"\[checked-pairs\] checked: all 8 training pairs are checked ones"),
        ([CHECKED[0], pair("x", "fresh 0", "no 0", "yes 0")], None, r"'c0' and 'x' are the same with opposite labels"),
        ([{"prompt": MESSAGES, "chosen": ANSWER, "rejected": OTHER}], None, r"\[checked-pairs\] .*column 'prompt'"),
        ([], None, r"\[data-empty\]"),
    ],
)
def test_what_cannot_be_used_is_one_message(checked: Any, share: Any, message: str) -> None:
    with pytest.raises(AlignError, match=message):
        with_checked_pairs(NOISY, checked, share=share)


def test_without_weight_there_is_no_share() -> None:
    with pytest.raises(AlignError, match=r"the weights of the 8 other pairs sum to 0"):
        with_checked_pairs([one | {"weight": 0.0} for one in NOISY], CHECKED)


def test_a_pair_that_is_checked_twice_counts_once(caplog: pytest.LogCaptureFixture) -> None:
    assert len(with_checked_pairs(NOISY, [CHECKED[0], CHECKED[0] | {"id": "again"}])) == 9
    assert "1 of 2 pairs are there twice" in caplog.text
