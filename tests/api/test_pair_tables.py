"""``pairs_from_dataset``: the same table whatever the container, that of the same rows in a file; what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from align.api import pairs_from_dataset
from align.config import PairsSection
from align.data.pairs import load_pairs
from align.errors import AlignError, DataError
from tests.helpers.builders import rows

GOOD = [{"role": "assistant", "content": "good"}]
BAD = [{"role": "assistant", "content": "bad"}]
ASKED = [{"role": "user", "content": "is it?"}]
TABLES: dict[str, list[dict[str, Any]]] = {
    "plain": [{key: row[key] for key in ("prompt", "chosen", "rejected", "margin")} for row in rows(5)],
    "own ids": [dict(row, group="g", extra=1) for row in rows(3)],
    "implicit": [
        {"chosen": f"Human: {k}?\n\nAssistant: yes", "rejected": f"Human: {k}?\n\nAssistant: no"} for k in "ab"
    ],
    "messages": [{"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "reward_chosen": 2.0, "reward_rejected": 0.5}],
    "tools": [
        {
            "prompt": [{"role": "system", "content": ""}, *ASKED],
            "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
            "rejected": BAD,
        },
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    ],
    "one without a margin": [rows(2)[0], {key: value for key, value in rows(2)[1].items() if key != "margin"}],
}


@pytest.mark.parametrize("name", TABLES)
def test_every_container_gives_the_table_of_the_file(name: str, tmp_path: Path) -> None:
    table = TABLES[name]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in table))
    expected = load_pairs(PairsSection(path=str(file)))
    for made in (table, tuple(table), Dataset.from_list(table), pd.DataFrame(table)):
        found = pairs_from_dataset(made)
        assert found.to_list() == expected.to_list() and found.features == expected.features, type(made)
        assert pairs_from_dataset(found).to_list() == found.to_list(), "a second call changes nothing"
    assert Dataset.from_list(table).with_format("torch").format["type"] == "torch"
    assert pairs_from_dataset(Dataset.from_list(table).with_format("numpy")).to_list() == expected.to_list()


def test_a_frame_with_arrays_and_missing_numbers() -> None:
    """A table that pandas read from Parquet has messages as arrays; NaN stands for a missing value."""
    frame = pd.DataFrame(
        {
            "prompt": [np.array(ASKED, dtype=object)] * 2, "chosen": [np.array(GOOD, dtype=object)] * 2,
            "rejected": [np.array(BAD, dtype=object)] * 2, "margin": [1.5, np.nan],
        },
        index=[7, 7],
    )  # fmt: skip
    found = pairs_from_dataset(frame)
    assert found["margin"] == [1.5, None] and found["prompt"][0] == ASKED
    assert len(set(found["id"])) == 2, "equal pairs have different ids"


def test_an_index_with_a_name_is_a_column() -> None:
    """``set_index("id")`` loses no ids; a level that is a column already, or has no name, is left out."""
    table = [{"id": f"p{k}", "prompt": f"q {k}", "chosen": "a", "rejected": "b", "margin": k} for k in range(3)]
    expected = pairs_from_dataset(table).to_list()
    frame = pd.DataFrame(table)
    for index in ("id", ["id"], ["prompt", "id"]):
        assert pairs_from_dataset(frame.set_index(index)).to_list() == expected
    assert pairs_from_dataset(frame.set_index("id", drop=False)).to_list() == expected


def test_columns_are_mapped() -> None:
    table = [{"question": "a b c", "best": "x", "worst": "y", "score_gap": 2}]
    names = {"prompt": "question", "chosen": "best", "rejected": "worst", "margin": "score_gap"}
    (row,) = pairs_from_dataset(table, columns=names).to_list()
    assert (row["prompt"], row["chosen"], row["rejected"], row["margin"]) == ("a b c", "x", "y", 2.0)


def row(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a film is", "chosen": "good", "rejected": "bad"} | fields


@pytest.mark.parametrize(
    ("table", "columns", "code", "words"),
    [
        ([{"prompt": "a", "chosen": "b"}], None, "data-column", 'no column \'rejected\''),
        ([row()], {"chosen": "best"}, "data-column", "column 'best', mapped to 'chosen', is not there"),
        ([row()], {"chosne": "best"}, "data-column", "did you mean `chosen`?"),
        ([row()], {"chosen": "x", "rejected": "x"}, "data-column", "'x' is given for two columns"),
        ([row()], "chosen", "data-column", "columns: found 'chosen', expected a dict of names"),
        ([row(), row(chosen=3)], None, "pair-type", "row 1, chosen: found 3, expected text"),
        ([row(), row(chosen=None)], None, "pair-missing", "row 1, chosen: found nothing"),
        ([row(margin=float("nan"))], None, "pair-number", "row 0, margin: found nan, expected a finite number"),
        ([row(margin="much")], None, "pair-number", "row 0, margin: found 'much'"),
        ([row(chosen="bad")], None, "pair-equal", "row 0, rejected: found the same as chosen"),
        ([row(id="k"), row(id="m"), row(id="k")], None, "pair-duplicate-id", "row 2, id: found 'k', expected an id "
         "used once (row 0 has it too)"),
        ([row(), row(prompt=ASKED, chosen=GOOD, rejected=BAD)], None, "pair-mixed", "row 1, prompt"),
        ([row(), "text"], None, "data-row", "row 1, (row): found a str, expected a dict"),
        ([], None, "data-empty", "pairs: holds no rows"),
        (Dataset.from_list([]), None, "data-empty", "pairs: holds no rows"),
        (pd.DataFrame(), None, "data-empty", "pairs: holds no rows"),
        (pd.DataFrame([[1, 2]], columns=["chosen", "chosen"]), None, "data-column", "'chosen' is there twice"),
        ({"prompt": ["a"]}, None, "data-type", "found a dict, expected a datasets.Dataset, a list of dicts or"),
        ("pairs.jsonl", None, "data-type", "found a str"),
        (None, None, "data-type", "found a NoneType"),
        (DatasetDict({"train": Dataset.from_list([row()])}), None, "data-type", 'with the splits train'),
        (IterableDataset.from_generator(lambda: iter([row()])), None, "data-type", "found an IterableDataset"),
    ],
)  # fmt: skip
def test_what_is_refused(table: Any, columns: Any, code: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        pairs_from_dataset(table, columns=columns)
    assert caught.value.code == code and words in str(caught.value)
    in_python(caught.value)


def in_python(error: AlignError) -> None:
    """No option, verb or YAML key of the command line in what a Python user reads."""
    assert not any(word in str(error) for word in (" --", "`align ", "`--", ".yaml", "align reward", "align data"))


def test_all_bad_rows_are_counted_and_the_first_named() -> None:
    table = [row(chosen=" ") if k % 2 else row(prompt=f"a film {k} is") for k in range(60)]
    with pytest.raises(DataError, match=r"30 of 60 rows cannot be used \(the first row is row 0\)") as caught:
        pairs_from_dataset(table)
    assert "row 1, chosen" in str(caught.value) and "... and 10 more" in str(caught.value)


def test_importing_the_packages_loads_nothing_heavy() -> None:
    """`import reward_models` and `import align.api` load no torch; dir() has the public names."""
    code = (
        "import sys, align.api, reward_models\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'trl'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert {'RewardModel', 'RewardTrainer', 'RewardConfig', 'OBJECTIVES'} <= set(dir(reward_models))\n"
        "assert set(align.api.WHERE) <= set(dir(align.api))\n"
        "import reward_models as r\n"
        "try: r.RewardModle\n"
        "except AttributeError: pass\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)
