"""What is said of a pair table before anything is trained on it."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from align.commands.data import check_data
from align.config import PairsSection
from align.data.findings import margin_findings, sharing_findings
from align.errors import DataError
from align.trust.measure import check_margins
from tests.helpers.builders import rows
from tests.training.test_trainer import ours


def table(count: int, **columns: Any) -> Dataset:
    return Dataset.from_list(
        [row | {key: values[k] for key, values in columns.items()} for k, row in enumerate(rows(count))]
    )


def test_shared_texts_are_counted() -> None:
    """Copies, swapped or written otherwise; one prompt of most pairs; the groups that intervals are over."""
    assert sharing_findings(table(12)) == []
    copies = Dataset.from_list([*rows(6), *(row | {"prompt": f"{str(row['prompt']).upper()} "} for row in rows(6))])
    equal, groups = sharing_findings(copies)
    assert equal == "6 of 12 pairs have the prompt and both responses of an earlier one"
    assert groups.startswith("6 groups of pairs share no prompt or response")
    swapped = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows(3)]
    kept = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows(3)]
    assert sharing_findings(Dataset.from_list([*kept, *swapped]))[0].startswith("3 of 6 pairs have the prompt and both")
    chain = [{"prompt": f"p {k // 2}", "chosen": f"a {k}", "rejected": f"b {k}"} for k in range(2)]
    assert sharing_findings(Dataset.from_list(chain)) == [
        "shared prompts and responses connect all pairs: they count as one, and nothing can be held out"
    ]
    one = [{"prompt": "Which one?", "chosen": f"a {k}", "rejected": f"b {k}"} for k in range(9)]
    (shared,) = sharing_findings(Dataset.from_list(one))
    assert shared.startswith("9 of 9 pairs have one prompt, 'Which one?': it counts as an instruction")


@pytest.mark.parametrize(
    ("margins", "said"),
    [
        (np.random.default_rng(0).normal(-1, 1, 40), "is their sign reversed"),
        (np.random.default_rng(0).normal(0, 1, 40), None),
        (np.random.default_rng(0).normal(1, 1, 40), None),
        (np.full(40, 2.0), "all 40 margins are 2"),
        (np.where(np.arange(40) < 3, -1.0, 0.0), None),
        (np.full(40, None), None),
    ],
)
def test_margins_against_the_labels_or_without_information(margins: np.ndarray, said: str | None) -> None:
    found = margin_findings(table(40, margin=margins.tolist()))
    assert [said in sentence for sentence in found] == [True] if said else found == []
    assert margin_findings(table(9).remove_columns("margin")) == []


def test_noise_is_seldom_called_reversed() -> None:
    draws = [table(30, margin=np.random.default_rng(seed).normal(size=30).tolist()) for seed in range(200)]
    assert sum(bool(margin_findings(one)) for one in draws) <= 10


def test_they_are_said(tiny_policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    """By `align data check`, and by a training whose loss reads margins; not by one that does not."""
    reversed_ = table(16, margin=[-1.0 - k for k in range(16)])
    reversed_.to_json(str(tmp_path / "p.jsonl"))
    check_data(PairsSection(path=str(tmp_path / "p.jsonl")), drop_to=None)
    assert "is their sign reversed" in capsys.readouterr().out
    with caplog.at_level(logging.WARNING, "align"):
        ours(tiny_policy, tmp_path / "dpo", "dpo", pairs=reversed_)
        assert "is their sign reversed" not in caplog.text
        ours(tiny_policy, tmp_path / "madpo", "madpo", pairs=reversed_)
    assert "train_dataset: the margins agree with" in caplog.text


def test_a_table_that_calls_itself_in_sample_is_not_outside() -> None:
    """What the user says of margins does not overrule what was recorded when they were scored."""
    margins = np.random.default_rng(0).normal(1, 1, 60).tolist()
    pairs = table(60, margin=margins, margin_source=["in-sample"] * 5 + ["outside"] * 55)
    with pytest.raises(DataError, match=r"\[trust-in-sample\].*found in-sample margins in 5 of 60 pairs"):
        check_margins(pairs, "outside", "pairs", allow_in_sample=False)
    check_margins(pairs, "outside", "pairs", allow_in_sample=True)
