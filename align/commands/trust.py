"""The work of `align trust` and `align advise`: measure the trust of pairs, write JSON and a page."""

from pathlib import Path
from typing import Any

from align.config import PairsSection
from align.data.pairs import load_pairs
from align.data.training_pairs import report_in_sample
from align.io.console import log, out
from align.io.files import write_json
from align.trust.measure import check_known, check_margins, margin_source, measure_trust
from align.trust.sentences import sentences

FILE, PAGE, FEATURES = "trust.json", "trust.html", "features"
MEASURED = ("verdict", "source", "labels", "margin", "both")
ADVICE = ("verdict", "against", "source", "more", "shared")


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
    check_known(origin, source.path)
    report_in_sample(pairs, "trust")
    check_margins(pairs, origin, source.path, allow_in_sample=allow_in_sample)
    found = measure_trust(pairs, model, output / FEATURES, origin=origin, max_length=max_length, seed=seed)
    found |= {"source": source.path, "model": model, "margins": origin, "seed": seed}
    found["sentences"] = sentences(found, origin)
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
