"""What a reward model was trained on is recorded in its folder, and margins say whether they are in-sample."""

import logging
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from align.commands import trust as command
from align.config import PairsSection, RewardSection
from align.data.pairs import load_pairs, write_pairs
from align.data.training_pairs import FILE, margin_sources, report_in_sample, source_of, with_source, write_record
from align.errors import DataError
from align.trust.measure import check_margins, margin_source
from reward_models.crossfit import cross_fit
from reward_models.ensemble import members, score_with, train_members
from tests.helpers.builders import bert_reward, rows

BUDGET = {"batch_tokens": 256, "max_length": 64}


def pair(prompt: object, chosen: object, rejected: object) -> dict[str, object]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def test_a_pair_is_in_sample_if_the_model_saw_it_in_whatever_form(tmp_path: Path) -> None:
    """Swapped, with white space, cut elsewhere, with one response in common; not with other texts."""
    write_record(Dataset.from_list([pair("Say:", " yes", " no")]), tmp_path)
    tried = [
        pair("Say:", " yes", " no"),
        pair("Say:", " no", " yes"),
        pair("Say: ", "yes\n", "no"),
        pair("Say: y", "es", "es!"),
        pair("Say:", " yes", " perhaps"),
        pair("SAY: ", "\uff39ES", "other"),
        pair("Say:", " maybe", " perhaps"),
        pair("Tell:", " yes", " no"),
    ]
    expected = ["in-sample"] * 6 + ["outside"] * 2
    assert margin_sources([tmp_path], Dataset.from_list(tried)) == expected
    assert margin_sources([tmp_path, "hub/model"], Dataset.from_list(tried)) == ["in-sample"] * 6 + ["unknown"] * 2
    talk = pair(message("user", "Say:"), message("assistant", "yes"), message("assistant", "no"))
    assert margin_sources([tmp_path], Dataset.from_list([talk])) == ["in-sample"]


def test_another_system_message_makes_no_other_pair(tmp_path: Path) -> None:
    """From a length on; a short question under a system message that holds a document is another one."""
    long = message("user", "Which of the two plans for the garden is the cheaper one?")
    kind, other = message("system", "Be kind."), message("system", "A document of its own.")
    answers = (message("assistant", "yes"), message("assistant", "no"))
    write_record(
        Dataset.from_list([pair(kind + long, *answers), pair(kind + message("user", "So?"), *answers)]), tmp_path
    )
    tried = [pair(long, *answers), pair(other + long, *answers), pair(other + message("user", "So?"), *answers)]
    assert margin_sources([tmp_path], Dataset.from_list(tried)) == ["in-sample", "in-sample", "outside"]


def test_a_model_knows_the_pairs_of_the_model_that_it_started_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trained on, it is in-sample on both tables; cross-fitting from it is in-sample on the first."""
    first = Dataset.from_list(rows(12))
    second = Dataset.from_list(
        [row | {"id": f"other {k}", "prompt": f"another {k}:"} for k, row in enumerate(rows(12))]
    )
    config = RewardSection(model=str(bert_reward(tmp_path / "m")), max_length=64, head="naive-bayes", folds=2)
    train_members(first, config, tmp_path / "one", seed=0)
    further = config.model_copy(update={"model": str(tmp_path / "one")})
    train_members(second, further, tmp_path / "two", seed=0)
    both = Dataset.from_list([*first.select(range(2)), *second.select(range(2))])
    assert margin_sources([tmp_path / "one"], both) == ["in-sample"] * 2 + ["outside"] * 2
    assert margin_sources([tmp_path / "two"], both) == ["in-sample"] * 4
    with caplog.at_level(logging.WARNING):
        crossed = cross_fit(Dataset.from_list([*first, *second]), further, tmp_path / "cv", seed=0)
    assert list(crossed["margin_source"]) == ["in-sample"] * 12 + ["cross-fitted"] * 12
    assert "was trained on 12 of these 24 pairs" in caplog.text and source_of(crossed) == "in-sample"
    assert set(cross_fit(second, config, tmp_path / "clean", seed=0)["margin_source"]) == {"cross-fitted"}


@pytest.mark.parametrize(
    ("found", "source"),
    [
        (["outside", "in-sample"], "in-sample"),
        (["outside", "unknown"], "unknown"),
        (["outside", "cross-fitted"], "cross-fitted"),
        (["outside", "of my own"], "unknown"),
        (["outside", None], "unknown"),
        (["outside", "outside"], "outside"),
    ],
)
def test_the_weakest_source_is_that_of_the_table(found: list[str], source: str) -> None:
    assert source_of(Dataset.from_dict({"margin_source": found})) == source
    assert margin_source(Path("pairs.jsonl"), Dataset.from_dict({"margin_source": found})) == source


def test_a_model_knows_its_training_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every member of an ensemble records its own sample; scored rows are marked one by one."""
    config = RewardSection(model=str(bert_reward(tmp_path / "m")), max_length=64, head="naive-bayes", ensemble=2)
    model = tmp_path / "trained"
    train = Dataset.from_list(rows(12))
    other = Dataset.from_list([row | {"id": f"other {k}", "prompt": f"another {k}:"} for k, row in enumerate(rows(3))])
    train_members(train, config, model, seed=0)
    assert all((Path(member) / FILE).is_file() for member in members(model)) and len(members(model)) == 2
    assert np.load(model / FILE).dtype == np.uint64
    both = Dataset.from_list([*train.select(range(2)), *other])
    scored = score_with(members(model), both, tmp_path / "s", **BUDGET)
    assert list(scored["margin_source"]) == ["in-sample"] * 2 + ["outside"] * 3
    with caplog.at_level(logging.WARNING):
        assert report_in_sample(scored, "train dpo") == 2
    assert "train dpo: 2 of these 5 pairs were trained on by the reward model" in caplog.text
    write_pairs(scored, tmp_path / "out")
    again = load_pairs(PairsSection(path=str(tmp_path / "out" / "pairs.parquet")))
    assert list(again["margin_source"]) == list(scored["margin_source"])


def test_trust_refuses_in_sample_margins_and_asks_where_it_cannot_know(tmp_path: Path) -> None:
    table = Dataset.from_list([{"id": str(k), **row, "margin": float(k % 7) - 2} for k, row in enumerate(rows(60))])
    marked = with_source(table, ["in-sample"] * 3 + ["outside"] * 57)
    with pytest.raises(DataError, match="found in-sample margins in 3 of 60 pairs"):
        check_margins(marked, source_of(marked), "here", allow_in_sample=False)
    write_pairs(table, tmp_path)
    with pytest.raises(DataError, match="expected to know whether their reward model") as caught:
        command.trust(
            PairsSection(path=str(tmp_path / "pairs.parquet")), "model", tmp_path / "out",
            margins=None, allow_in_sample=False, max_length=64, seed=0,
        )  # fmt: skip
    assert caught.value.code == "trust-origin"


def test_the_metrics_of_a_reward_stage_name_each_table(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(
        '{"heldout": {"margins": "outside"}, "in_sample": {"margins": "in-sample"}, "ensemble": 1}'
    )
    assert margin_source(tmp_path / "heldout" / "pairs.parquet") == "outside"
    assert margin_source(tmp_path / "in_sample") == "in-sample"


def test_a_margin_is_derived_from_mapped_rewards(tmp_path: Path) -> None:
    """Only if the scores are mapped; a margin of its own stays."""
    row = pair("Say:", " yes", " no") | {"score_chosen": 7.5, "score_rejected": 5.0, "gap": None}
    Dataset.from_list([row, row | {"chosen": " aye", "gap": -1.0}]).to_json(tmp_path / "p.jsonl")
    columns = {"reward_chosen": "score_chosen", "reward_rejected": "score_rejected"}
    path = str(tmp_path / "p.jsonl")
    assert load_pairs(PairsSection(path=path, columns=columns))["margin"][:] == [2.5, 2.5]
    assert load_pairs(PairsSection(path=path, columns=columns | {"margin": "gap"}))["margin"][:] == [2.5, -1.0]
    assert "margin" not in load_pairs(PairsSection(path=path)).column_names
