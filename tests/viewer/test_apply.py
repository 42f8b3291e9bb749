"""`align data apply` against corrections by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from align.commands.apply_decisions import apply_decisions
from align.config import PairsSection
from align.data.pairs import load_pairs
from align.errors import ConfigError, DataError
from align.viewer.decisions import DecisionFile
from tests.helpers.command_line import align
from tests.viewer.helpers import client, decide, frame, write

ROWS = 24


def table() -> pd.DataFrame:
    made = frame(ROWS)
    draw = np.random.default_rng(5)
    made["reward_rejected"] = draw.normal(size=ROWS)
    made["reward_chosen"] = made["reward_rejected"] + made["margin"].fillna(0)
    made["votes_rejected"], made["votes_tie"] = draw.integers(0, 3, ROWS), 0
    made["chosen_tone"], made["rejected_tone"] = "warm", "cold"
    made["mine"] = range(ROWS)
    return made.drop(columns=["quality", "kept"])


def apply(file: Path, output: Path, **options: Any) -> tuple[dict[str, Any], pd.DataFrame]:
    decisions = options.pop("decisions", [file.parent / "decisions.jsonl"])
    summary = apply_decisions(PairsSection(path=str(file)), decisions, output, **options)
    found = pd.read_parquet(output / "pairs.parquet")
    names = [name for name in found if name.startswith("deci")]
    return summary, found.assign(
        **{name: found[name].astype(object).where(found[name].notna(), None) for name in names}
    )


CHOSEN = dict(
    enumerate(["keep", "flip", "drop", "tie", "edit", "flip+edit", "flip", "drop", "edit+flip", "flip+drop"], 3)
)
"""Row -> what is decided about it; some rows have no margin."""


def test_a_correction_is_the_one_by_hand(tmp_path: Path) -> None:
    folder, chosen, given_table = tmp_path, CHOSEN, table()
    file = write(given_table, folder / "t.parquet")
    before = file.read_bytes()
    with client(file, scratch=folder / "s") as asked:
        for row, action in chosen.items():
            for one in action.split("+"):
                decide(asked, row, one, {"chosen": f"edited {row}"} if one == "edit" else None)
    summary, found = apply(file, folder / "out")
    assert file.read_bytes() == before, "the table itself is never written"
    dropped = [row for row, action in chosen.items() if "drop" in action]
    expected = given_table.drop(index=dropped)
    assert list(found["id"]) == list(expected["id"]) and list(found["mine"]) == list(expected["mine"])
    assert summary["left_out"] == {f"p{row}": "dropped" for row in dropped}
    for (row, old), (_, new) in zip(expected.iterrows(), found.iterrows(), strict=True):
        action = chosen.get(row, "")
        texts = dict(old[["prompt", "chosen", "rejected"]])
        if "edit" in action:
            texts["chosen"] = f"edited {row}"
        if "flip" in action:
            texts["chosen"], texts["rejected"] = texts["rejected"], texts["chosen"]
        assert dict(new[["prompt", "chosen", "rejected"]]) == texts
        label = "flip" if "flip" in action else action
        assert (new["decision"], new["decided_by"]) == ((label, "ann") if label else (None, None))
        if "edit" in action:
            assert np.isnan(new["margin"]) and np.isnan(new["reward_chosen"]), "no longer true of these texts"
        elif action in ("", "keep"):
            pd.testing.assert_series_equal(new[list(given_table)], old, check_names=False, check_dtype=False)
        elif action == "flip":
            assert new["margin"] == -old["margin"] or np.isnan(old["margin"])
            assert (new["reward_chosen"], new["reward_rejected"]) == (old["reward_rejected"], old["reward_chosen"])
            assert (new["chosen_tone"], new["rejected_tone"]) == ("cold", "warm")
            assert (new["votes_chosen"], new["votes_rejected"], new["votes_tie"]) == (1, 0, 0)
        elif action == "tie":
            assert (new["votes_chosen"], new["votes_rejected"], new["votes_tie"]) == (0, 0, 1)
    assert len(load_pairs(PairsSection(path=str(folder / "out" / "pairs.parquet")))) == len(found), (
        "it can be trained on"
    )


def test_flipping_twice_gives_the_table_back(tmp_path: Path) -> None:
    file = write(table().drop(columns=["votes_chosen", "votes_rejected", "votes_tie"]), tmp_path / "t.parquet")
    with client(file, scratch=tmp_path / "s") as asked:
        for row in range(ROWS):
            decide(asked, row, "flip")
    apply(file, tmp_path / "once")
    again = tmp_path / "once" / "pairs.parquet"
    with client(again, scratch=tmp_path / "s2", decisions=tmp_path / "second.jsonl") as asked:
        for row in range(ROWS):
            decide(asked, row, "flip")
    _, found = apply(again, tmp_path / "twice", decisions=[tmp_path / "second.jsonl"])
    old = pd.read_parquet(file)
    pd.testing.assert_frame_equal(found[list(old)], old, check_dtype=False)


def test_the_provenance_of_an_earlier_correction_stays(tmp_path: Path) -> None:
    file = write(table(), tmp_path / "t.parquet")
    with client(file, scratch=tmp_path / "s") as asked:
        decide(asked, 1, "flip")
    apply(file, tmp_path / "once")
    again = tmp_path / "once" / "pairs.parquet"
    with client(again, scratch=tmp_path / "s2", decisions=tmp_path / "second.jsonl", who="bob") as asked:
        decide(asked, 2, "keep")
    _, found = apply(again, tmp_path / "twice", decisions=[tmp_path / "second.jsonl"])
    assert list(found["decided_by"][:4]) == [None, "ann", "bob", None]


def test_messages_are_flipped_and_edited_as_messages(tmp_path: Path) -> None:
    def turn(text: str, **more: Any) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": text, **more}]

    call = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}
    rows = pd.DataFrame(
        {
            "id": list("abc"), "prompt": [[{"role": "user", "content": "hi"}]] * 3,
            "chosen": [turn("1", **call), turn("2"), turn("3")], "rejected": [turn("x"), turn("y"), turn("z")],
        }
    )  # fmt: skip
    file = tmp_path / "t.jsonl"
    rows.to_json(file, orient="records", lines=True)
    with client(file, scratch=tmp_path / "s") as asked:
        decide(asked, 0, "flip")
        decide(asked, 1, "edit", {"rejected": turn("edited")})
    summary, _ = apply(file, tmp_path / "out")
    found = load_pairs(PairsSection(path=str(tmp_path / "out" / "pairs.parquet"))).to_list()
    from align.data.messages import as_messages, without_nulls

    cells = [[without_nulls(as_messages(row[name])) for name in ("chosen", "rejected")] for row in found]
    assert cells == [[turn("x"), turn("1", **call)], [turn("2"), turn("edited")], [turn("3"), turn("z")]]
    assert summary["changed"] == [] and summary["done"] == {"edit": 1, "flip": 1}


def test_ties_without_votes_leave_the_table(tmp_path: Path) -> None:
    file = write(frame(5).drop(columns="votes_chosen"), tmp_path / "t.parquet")
    with client(file, scratch=tmp_path / "s") as asked:
        decide(asked, 2, "tie")
    summary, found = apply(file, tmp_path / "out")
    assert "p2" not in set(found["id"]) and "votes" in summary["left_out"]["p2"]


def test_texts_that_have_changed_are_refused_by_name_or_left_as_they_are(tmp_path: Path) -> None:
    made = table()
    file = write(made, tmp_path / "t.parquet")
    with client(file, scratch=tmp_path / "s") as asked:
        decide(asked, 1, "flip")
        decide(asked, 2, "flip")
    made.loc[1, "chosen"] = "other"
    write(made, file)
    with pytest.raises(DataError, match="p1") as found:
        apply(file, tmp_path / "out")
    assert found.value.code == "decision-other-texts" and not (tmp_path / "out" / "pairs.parquet").exists()
    summary, corrected = apply(file, tmp_path / "out", skip_changed=True)
    assert summary["changed"] == ["p1"] and corrected["chosen"][1] == "other"
    assert corrected["chosen"][2] == made["rejected"][2]


def test_two_people_are_merged_and_their_conflicts_listed(tmp_path: Path) -> None:
    file = write(table(), tmp_path / "t.parquet")
    verdicts = {"ann": {1: "flip", 2: "flip", 3: "drop"}, "bob": {2: "keep", 3: "drop", 4: "flip"}}
    for who, said in verdicts.items():
        with client(file, scratch=tmp_path / "s", decisions=tmp_path / f"{who}.jsonl", who=who) as asked:
            for row, action in said.items():
                decide(asked, row, action)
    files = [tmp_path / f"{who}.jsonl" for who in verdicts]
    summary, found = apply(file, tmp_path / "out", decisions=files)
    assert [one["pair"] for one in summary["conflicts"]] == ["p2"] and summary["people"] == ["ann", "bob"]
    assert {head["who"]: head["after"]["label"] for head in summary["conflicts"][0]["heads"]} == {
        "ann": "flip",
        "bob": "keep",
    }
    by_id = found.set_index("id")
    assert by_id.loc["p2", "chosen"] == table()["chosen"][2] and by_id.loc["p2", "decision"] is None
    assert "p3" not in by_id.index and by_id.loc["p4", "chosen"] == table()["rejected"][4]
    _, same = apply(file, tmp_path / "out2", decisions=files[::-1])
    pd.testing.assert_frame_equal(same, found)
    with client(file, scratch=tmp_path / "s", decisions=tmp_path / "out" / "decisions.jsonl", who="eve") as asked:
        decide(asked, 2, "flip")
    summary, found = apply(file, tmp_path / "settled", decisions=[tmp_path / "out" / "decisions.jsonl", *files])
    assert summary["conflicts"] == [] and found.set_index("id").loc["p2", "decided_by"] == "eve"


def test_a_pair_of_a_bag_cannot_be_flipped(tmp_path: Path) -> None:
    made = frame(6).drop(columns="votes_chosen").assign(bag=["x", "x", "y", "y", "z", "z"], vote_share=[0.5] * 6)
    file = write(made, tmp_path / "t.parquet")
    with client(file, scratch=tmp_path / "s") as asked:
        decide(asked, 2, "flip")
    with pytest.raises(DataError, match="bag 'y'"):
        apply(file, tmp_path / "out")


def test_the_verb(tmp_path: Path) -> None:
    file = write(table(), tmp_path / "t.parquet")
    decisions = tmp_path / "decisions.jsonl"
    missing = align("data", "apply", str(file), str(decisions), "--output", "out", cwd=tmp_path)
    assert missing.returncode == 2 and "[data-missing]" in missing.stderr and "Traceback" not in missing.stderr
    decisions.write_text("")
    empty = align("data", "apply", str(file), str(decisions), "--output", "out", cwd=tmp_path)
    assert empty.returncode == 2 and "no decision" in empty.stderr
    DecisionFile(decisions, "ann").append(
        [{"id": "somebody-1", "pair": "elsewhere", "content": "c", "action": "flip", "base": []}], "t"
    )
    with client(file, scratch=tmp_path / "s") as asked:
        decide(asked, 1, "flip")
    done = align("data", "apply", str(file), str(decisions), "--output", "out", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["done"] == {"flip": 1}
    assert "elsewhere" in done.stderr, "a judged pair that the table does not have is said"
    with pytest.raises(ConfigError):
        apply(file, tmp_path)


def test_an_influence_of_the_label_as_it_was_does_not_stay(tmp_path: Path) -> None:
    """It was measured for a step towards the response that is the rejected one now."""
    given = table().assign(influence=0.5, influence_chosen=0.2, **{"adamw@g": 0.1})
    file = write(given, tmp_path / "t.parquet")
    with client(file, scratch=tmp_path / "s") as asked:
        decide(asked, 4, "flip")
        decide(asked, 5, "keep")
    _, found = apply(file, tmp_path / "out")
    names = ["influence", "influence_chosen", "adamw@g"]
    assert found.loc[4, names].isna().all() and list(found.loc[5, names]) == [0.5, 0.2, 0.1]
