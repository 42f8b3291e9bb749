"""What losses read of a table is checked with the run file, before a stage begins."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.config import load_config
from align.errors import AlignError
from align.run import pipeline
from tests.helpers.builders import rows

PLAIN = [{key: value for key, value in row.items() if key != "margin"} for row in rows(6)]
MARGINS = [row | {"margin": float(k)} for k, row in enumerate(PLAIN)]


def checked(folder: Path, policy: Path, table: list[dict[str, Any]], **train: Any) -> None:
    """Check a run as ``--dry-run`` does."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    run = {
        "name": "r", "output_dir": str(folder / "runs"), "pairs": {"path": str(folder / "pairs.jsonl")},
        "train": {"model": str(policy), "methods": {"dpo": {"loss": "dpo"}, "madpo": {"loss": "madpo"}}} | train,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    pipeline.check(load_config(folder / "run.yaml"), tables=True)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (PLAIN, r"\[loss-needs-margin\] loss madpo needs a `margin` column and the pair table has none"),
        ([*MARGINS[:5], PLAIN[5]], r"\[loss-needs-margin\] margin: 1 of 6 pairs have none"),
        ([row | {"weight": 0.0} for row in MARGINS], r"\[weights-column\] weight: found 0 for each of 6 pairs"),
        ([row | {"weight": w} for row, w in zip(MARGINS, [0.0, None] * 3, strict=True)], r"\[weights-column\] weight"),
    ],
)
def test_columns_that_a_loss_lacks_are_named_by_the_check(
    table: list[dict[str, Any]], message: str, tiny_policy: Path, tmp_path: Path
) -> None:
    with pytest.raises(AlignError, match=message):
        checked(tmp_path, tiny_policy, table)


def test_held_out_pairs_need_them_as_well(tiny_policy: Path, tmp_path: Path) -> None:
    """Pairs with margins and a held-out table without."""
    other = [row | {"id": f"h{k}", "prompt": f"other {k}"} for k, row in enumerate(PLAIN)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    with pytest.raises(AlignError, match=r"\[loss-needs-margin\]"):
        checked(tmp_path, tiny_policy, MARGINS, eval_pairs={"path": str(tmp_path / "held.jsonl")})


def test_what_has_them_passes(tiny_policy: Path, tmp_path: Path) -> None:
    """Margins of every pair and one weight above 0; without MADPO no margin is needed."""
    checked(tmp_path, tiny_policy, [row | {"weight": float(k == 0)} for k, row in enumerate(MARGINS)])
    checked(tmp_path, tiny_policy, PLAIN, methods={"dpo": {"loss": "dpo"}})
