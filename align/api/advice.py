"""``measure_trust`` and ``advise``: how far to trust the labels and how far the margins, before any training."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from align.commands.trust import ADVICE, MEASURED
from align.data.in_memory import NAME, pairs_from_dataset
from align.data.training_pairs import SOURCES, source_of
from align.errors import ConfigError, python_words
from align.trust.measure import assess_trust, loss_parameters

HINTS = {
    "trust-origin": 'give margins="outside" (other labels), "cross-fitted" or "in-sample"',
    "trust-in-sample": "use cross-fitted margins, or force it with allow_in_sample=True",
}


@dataclass(frozen=True, slots=True)
class TrustReport:
    """What was measured about labels and margins."""

    decided: bool
    """Whether the proposed setting leads plain DPO beyond the interval; if not, plain DPO is the default."""
    loss_kwargs: dict[str, float]
    """Parameters of the loss ``trust``: slope, trust and strength of the chosen setting."""
    sentences: dict[str, str]
    """Answer to each question: verdict, labels, margin, both, against, source, more, shared."""
    numbers: dict[str, Any] = field(repr=False)
    """All numbers, as `align trust` writes them into trust.json."""
    asked: tuple[str, ...] = field(repr=False, default=MEASURED)
    """Keys of the sentences of the summary."""

    @property
    def summary(self) -> str:
        """The sentences that the command prints, one per line."""
        return "\n".join(self.sentences[key] for key in self.asked)

    def write_page(self, path: str | Path) -> None:
        """Write the page of `align trust`, one HTML file without requests, to ``path``."""
        from align.reports.trust_page import write_trust_page

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_trust_page(target, self.numbers)


def measure_trust(
    pairs: Any,
    model: str | Path,
    *,
    margins: str | None = None,
    allow_in_sample: bool = False,
    max_length: int = 1024,
    seed: int = 0,
    cache: str | Path | None = None,
) -> TrustReport:
    """Measure on held-out labels how far to trust the labels and how far the margins, as `align trust` does.

    Linear stand-ins for the policy are trained on frozen features of ``model`` and evaluated on labels that they have
    not seen, by folds that no prompt and no response crosses.

    Args:
        pairs: what ``pairs_from_dataset`` takes, with a ``margin`` for each of at least 50 pairs.
        model: reference model: folder or hub id.
        margins: where the margins come from: ``outside`` (their reward model was trained on other labels),
            ``cross-fitted`` or ``in-sample``. None: as the column ``margin_source`` says, which
            ``RewardModel.score_pairs`` writes.
        allow_in_sample: accept margins of a model that was trained on these labels.
        max_length: tokens of prompt and response together.
        seed: seed of the folds and the bootstrap.
        cache: folder that keeps the features; None: they are not kept.

    Raises:
        ConfigError: no such origin, or no such model.
        DataError: the pairs cannot be used, or their margins cannot be compared with the labels.
        ModelError: the model cannot be loaded.
    """
    return _report(pairs, model, margins, allow_in_sample, max_length, seed, cache, MEASURED)


def advise(
    pairs: Any,
    model: str | Path,
    *,
    margins: str | None = None,
    allow_in_sample: bool = False,
    max_length: int = 1024,
    seed: int = 0,
    cache: str | Path | None = None,
) -> TrustReport:
    """Advise before the GPU hours, as `align advise` does: best setting, gain, use of more pairs, shared errors.

    Args and errors are those of ``measure_trust``; the numbers are the same, ``summary`` has other sentences.
    """
    return _report(pairs, model, margins, allow_in_sample, max_length, seed, cache, ADVICE)


def _report(
    pairs: Any,
    model: str | Path,
    margins: str | None,
    allow_in_sample: bool,
    max_length: int,
    seed: int,
    cache: str | Path | None,
    asked: tuple[str, ...],
) -> TrustReport:
    if margins is not None and margins not in SOURCES:
        raise ConfigError(f"margins: found {margins!r}, expected one of {', '.join(SOURCES)}", code="config-option")
    if not isinstance(model, str | Path):
        raise ConfigError(
            f"model: found a {type(model).__name__}, expected a folder or hub id",
            code="config-option",
            hint="save it first: model.save_pretrained(folder), tokenizer.save_pretrained(folder)",
        )
    table = pairs_from_dataset(pairs)
    kept = TemporaryDirectory(prefix="trust-") if cache is None else nullcontext(str(cache))
    with python_words(HINTS), kept as folder:
        found = assess_trust(
            table, str(model), Path(folder), where=NAME, origin=margins or source_of(table),
            allow_in_sample=allow_in_sample, max_length=max_length, seed=seed,
        )  # fmt: skip
    return TrustReport(bool(found["decided"]), loss_parameters(found), found["sentences"], found, asked)
