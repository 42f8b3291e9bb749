"""The judged pairs of a table as a table of their own, for `pairs.checked` of a training."""

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from align.config.columns import RESPONSES, TEXT
from align.data.messages import text_array, without_nulls
from align.errors import DataError
from align.io.disk import disk_problems
from align.io.files import atomic_write
from align.io.parquet import write_parquet

if TYPE_CHECKING:
    from align.viewer.session import OpenTable

CHECKED = "checked.parquet"
CLEAR = ("keep", "flip")
SHARES = ((200, 0.25), (0, 0.1))
"""From this number of pairs on, the share of the weight that they are given in a training."""


def write_checked(table: "OpenTable") -> dict[str, Any]:
    """Write ``checked.parquet`` beside the decisions: the pairs that a person kept or flipped, as the person sees them.

    Its columns are those of a pair table (id, prompt, chosen, rejected, edits included) and ``checked_label``: keep or
    flip. Ties and dropped pairs say nothing about which response is better, and are left out.

    Raises:
        DataError: no pair is judged yet.
        EnvironmentProblem: the disk does not take it.
    """
    rows = []
    for row, state in sorted(table.judged().items()):
        if state["label"] in CLEAR:
            texts = {**table.texts.values(row), **state["edits"]}
            if state["label"] == "flip":
                texts |= dict(zip(RESPONSES, (texts[name] for name in reversed(RESPONSES)), strict=True))
            rows.append({"id": table.cell(row, "id"), **texts, "checked_label": state["label"]})
    if not rows:
        raise DataError("export: no pair is kept or flipped yet", code="decision", hint="judge some pairs first")
    file = table.file.path.with_name(CHECKED)
    made = pa.table(
        {name: pa.array([row[name] for row in rows], pa.string()) for name in ("id", "checked_label")}
        | {name: text_array([without_nulls(row[name]) for row in rows]) for name in TEXT}
    ).select(["id", *TEXT, "checked_label"])
    with disk_problems(file.parent), atomic_write(file) as temporary:
        write_parquet(made, temporary)
    share = next(part for fewest, part in SHARES if len(rows) >= fewest)
    config = f"pairs:\n  checked: {{path: {file}, share: {share}}}\n"
    return {"path": str(file), "pairs": len(rows), "config": config}
