"""`align data check --deep`: what the pairs can teach, as diagnosis.json and a page."""

from pathlib import Path
from typing import Any

from align.config import PairsSection
from align.data.pairs import check_pairs
from align.data.prompts import read_prompts
from align.data.readers import stream_source
from align.data.thumbs import refuse_thumbs
from align.data.user_columns import user_columns
from align.diagnosis.diagnose import diagnose
from align.errors import AlignError, DataError
from align.io.console import log, out
from align.io.files import write_json
from align.io.source_files import keep_source
from align.io.stage import check_files
from align.reports.diagnosis_page import LEVELS, write_diagnosis_page

FILE = "diagnosis.json"
PAGE = "diagnosis.html"


def diagnose_source(
    source: PairsSection,
    output: Path,
    *,
    model: str | None = None,
    loss: str = "dpo",
    held_out: str | None = None,
    max_length: int = 1024,
    probe: bool = True,
) -> dict[str, Any]:
    """Diagnose the valid pairs of a source, print the findings, and write ``diagnosis.json`` and its page.

    Args:
        source: where the pairs come from.
        output: folder.
        model: folder or hub id of the model that would be trained.
        loss: name of the loss whose first step is predicted.
        held_out: evaluation pairs or prompts that training must not have seen.
        max_length: tokens of prompt and response together.
        probe: also measure seconds and memory of a few training steps.

    Raises:
        AlignError: the pairs or the model cannot be used.
    """
    check_files(output, [PAGE], own=[FILE])
    keep_source(source.path, [output / FILE, output / PAGE])
    checked = check_pairs(source, carry=True)
    if not len(checked.pairs):
        raise DataError(f"{source.path}: no valid pair", code="data-empty", hint="look at `align data check`")
    refuse_thumbs(checked.pairs, source.path)
    found = diagnose(
        checked.pairs,
        model=model,
        loss=loss,
        held_out=None if held_out is None else _held_out(held_out),
        max_length=max_length,
        probe=probe,
        own=user_columns(set(checked.pairs.column_names)),
    )
    found = {"source": source.path, "model": model, "invalid_rows": len(checked.invalid)} | found
    for one in found["findings"]:
        out.print(f"[{LEVELS[one['level']]}] {one['says']}", markup=False)
    if found["first"]:
        out.print("\nfirst:", markup=False)
        for number, one in enumerate(found["first"], 1):
            out.print(f"  {number}. {one}", markup=False)
    output.mkdir(parents=True, exist_ok=True)
    write_diagnosis_page(output / PAGE, found)
    write_json(output / FILE, found)
    log.info("look at it: open %s", output / PAGE)
    return found


def _held_out(path: str) -> list[dict[str, Any]]:
    """Rows of an evaluation set: valid pairs, or prompts if the file has no responses."""
    source = PairsSection(path=path)
    try:
        stream_source(source)
    except AlignError as error:
        if error.code != "data-column":
            raise
        return [{"prompt": row.prompt} for row in read_prompts(source)]
    return list(check_pairs(source).pairs)
