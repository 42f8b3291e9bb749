"""`align filter`: filter a pair table; write the kept pairs, the dropped pairs and a page."""

from pathlib import Path

from align.config import ClusterSection, FilterSection, PairsSection
from align.data.findings import report_margins
from align.data.pairs import load_pairs
from align.data.streaming import REVISION, stream_pairs
from align.data.training_pairs import report_in_sample
from align.filtering.filter_pairs import TooFewPass, filter_pairs, timed
from align.filtering.options import check_options
from align.filtering.tables import DROPPED, KEPT, SUMMARY, write_broken, write_tables
from align.io.console import log
from align.io.files import write_json
from align.io.hashing import digest, fingerprint_source
from align.io.source_files import keep_source
from align.io.stage import check_files
from align.models.message_checks import check_pairs_of

CACHE = "parts"
TABLE = "table.arrow"
"""File of the cache. The ``pairs.arrow`` of an earlier version lacks keys of messages and is not read."""
PAGE = "report.html"


def filter_source(
    source: PairsSection,
    settings: FilterSection,
    output: Path,
    *,
    seed: int,
    cache: Path,
    cluster: ClusterSection | None = None,
) -> None:
    """Write ``kept.parquet``, ``dropped.parquet``, ``filter.json`` and ``report.html`` into ``output``.

    Args:
        source: where the pairs come from.
        settings: which pairs to keep.
        output: folder.
        seed: seed of the nearest-neighbor index.
        cache: folder for intermediate results.
        cluster: the cluster whose workers read texts, embed, measure and search.

    Raises:
        AlignError: the pairs, the settings or a model cannot be used.
    """
    check_options(settings)
    kept = f"{settings.share:g}" if settings.method != "threshold" else f"importance of {settings.minimum} or more"
    log.info("filter %s: keep %s of what passes the rules, seed %d, writes %s", source.path, kept, seed, output)
    keep_source(source.path, [output / KEPT, output / DROPPED])
    check_files(output, [PAGE], own=[KEPT])
    seconds: dict[str, float] = {}
    known = source.model_dump() | {"content": fingerprint_source(source.path)}
    folder = cache / digest(known | {"table": REVISION})[:16]
    with timed(seconds, "reading"):
        pairs = stream_pairs(source, folder / TABLE, carry=True)
    if settings.ood is not None:
        ood = settings.ood
        check_pairs_of(pairs, [ood.model], trust_remote_code=ood.trust_remote_code, text_pair=ood.text_pair)
    report_in_sample(pairs, "filter")
    report_margins(pairs, "filter")
    held_out = [] if settings.held_out is None else load_pairs(PairsSection(path=settings.held_out)).to_list()
    try:
        found = filter_pairs(pairs, settings, folder, held_out=held_out, seed=seed, cluster=cluster)
    except TooFewPass as error:
        write_broken(pairs, error.broken, output)
        raise
    output.mkdir(parents=True, exist_ok=True)
    from align.reports.filter_page import write_filter_page

    with timed(seconds, "writing"):
        write_tables(found, output)
        write_filter_page(output / PAGE, found, source.path)
    summary = found.summary | {"seconds": seconds | found.summary["seconds"]}
    write_json(output / SUMMARY, summary | {"source": known, "settings": settings.model_dump(), "seed": seed})
    log.info("kept %d of %d pairs: %s", found.summary["kept"], len(pairs), output / KEPT)
    log.info("dropped, each with a reason: %s; look at it: open %s", output / DROPPED, output / PAGE)
