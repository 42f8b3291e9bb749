"""The work of `align trust` and `align advise`: measure the trust of pairs, write JSON and a page."""

from pathlib import Path
from typing import Any

from align.config import PairsSection
from align.data.pairs import load_pairs
from align.io.console import log, out
from align.io.files import write_json
from align.trust.measure import assess_trust, margin_source

FILE, PAGE, FEATURES = "trust.json", "trust.html", "features"
MEASURED = ("verdict", "source", "labels", "margin", "both")
"""Keys of the sentences that `align trust` prints."""
ADVICE = ("verdict", "against", "source", "more", "shared")
"""Keys of the sentences that `align advise` prints."""


def trust(
    source: PairsSection,
    model: str,
    output: Path,
    *,
    margins: str | None,
    allow_in_sample: bool,
    max_length: int,
    seed: int,
    printed: tuple[str, ...] = MEASURED,
) -> dict[str, Any]:
    """Write ``trust.json`` and ``trust.html`` under ``output``; return the content of the JSON.

    Args:
        source: pairs with a ``margin`` column.
        model: reference, hub id or folder.
        output: folder; the features are cached in it.
        margins: where the margins come from, one of ``SOURCES``; None: as the run that wrote the table recorded it.
        allow_in_sample: accept in-sample margins.
        max_length: tokens of prompt and response together.
        seed: seed of the folds and the bootstrap.
        printed: keys of the sentences that are printed.

    Raises:
        AlignError: the pairs, their margins or the model cannot be used.
    """
    pairs = load_pairs(source)
    origin = margins or margin_source(Path(source.path), pairs)
    found = assess_trust(
        pairs, model, output / FEATURES, where=source.path, origin=origin, allow_in_sample=allow_in_sample,
        max_length=max_length, seed=seed,
    )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / FILE, found)
    from align.reports.trust_page import write_trust_page

    write_trust_page(output / PAGE, found)
    for key in printed:
        out.print(found["sentences"][key], markup=False)
    numbers = ", ".join(f"{name}: {found['chosen'][name]:g}" for name in ("trust", "strength"))
    log.info("to train with it: {loss: trust, parameters: {slope: %.4g, %s}}", found["slope"], numbers)
    log.info("numbers: %s; look at it: open %s", output / FILE, output / PAGE)
    return found
