"""Numbers that other files hold about the same pairs, joined by id: entanglement, influence, other margins."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ENTANGLEMENT, INFLUENCE, TOKENS = "entanglement.parquet", "influence.parquet", "tokens.json"
IN_SAMPLE, CROSS_FITTED = "margin_in_sample", "margin_cross_fitted"
STAGES = {"reward/in_sample/pairs.parquet": IN_SAMPLE, "crossfit/pairs/pairs.parquet": CROSS_FITTED}
"""File of a run -> name that its margins get in the other tables of the run."""
MEANINGS = {
    IN_SAMPLE: "margin by a reward model that was trained on this pair",
    CROSS_FITTED: "margin by a reward model that has not seen this pair",
    "verdict": "what one step on this pair alone would do to its responses",
    "entangled": "one step on this pair alone would lower its chosen or raise its rejected response",
    "cosine": "cosine of the gradients of the log-probs of both responses",
    "norm_ratio": "norm of the gradient of the rejected response over that of the chosen one",
    "slack": "log units to the nearest failure; negative: entangled",
    "logp_chosen_change": "log-prob of the chosen response, policy minus reference (nats)",
    "logp_rejected_change": "log-prob of the rejected response, policy minus reference (nats)",
    "step_chosen": "predicted change of the chosen log-prob by one step on this pair, per unit of learning rate",
    "step_rejected": "predicted change of the rejected log-prob by one step on this pair, per unit of learning rate",
    "token_difference": "0: equal responses, 1: no common run of tokens",
    "influence": "change of the held-out loss by one step on this pair; below 0: the pair helps",
    "influence_chosen": "part of the influence that comes from the chosen response",
    "influence_rejected": "part of the influence that comes from the rejected response",
}
FROM_ENTANGLEMENT = (
    "verdict", "entangled", "cosine", "norm_ratio", "slack", "logp_chosen_change", "logp_rejected_change",
    "step_chosen", "step_rejected", "token_difference",
)  # fmt: skip
DEEPEST = 4
SKIPPED = (".partial", ".replaced", ".tmp", "checkpoints", "parts", "points")
"""Ends of the names of folders that hold nothing finished, or parts of what their parent holds."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Columns of one file."""

    name: str
    """Where it comes from, as the page says it."""
    file: Path
    columns: Mapping[str, str] = field(default_factory=dict)
    """Name in the file -> name on the page."""


def run_measured(folder: Path) -> list[Measured]:
    """What the stages and measurements of a run know about its pairs.

    Of the checkpoints that `align entangle trace` measured only the last of each training counts.
    """
    found = [
        Measured(f"{folder.name}/{file}", folder / file, {"margin": name})
        for file, name in STAGES.items()
        if {"id", "margin"} <= _names(folder / file)
    ]
    return found + folder_measured(folder)


def folder_measured(folder: Path) -> list[Measured]:
    """The measurements of entanglement and influence below a folder."""
    files: dict[Path, Path] = {}
    for file in _files(folder, DEEPEST):
        place = file.parent.parent if file.parent.name.startswith("step-") else file.parent
        files[place] = file
    return [
        Measured(str(Path(folder.name) / file.relative_to(folder)), file, dict(zip(names, names, strict=True)))
        for file in files.values()
        if (names := _measured_columns(file))
    ]


def without_clashes(found: Sequence[Measured], taken: Sequence[str]) -> list[Measured]:
    """The same with a name of its own for every column: one that is taken gets the name of its file's folder."""
    used, made = {name.lower() for name in taken}, []
    for one in found:
        columns = {}
        for source, name in one.columns.items():
            own = name if name.lower() not in used else f"{name} ({Path(one.name).parent})"
            if own.lower() not in used:
                used.add(own.lower())
                columns[source] = own
        if columns:
            made.append(Measured(one.name, one.file, columns))
    return made


def meaning(name: str) -> str:
    """What a joined column means; empty if it is not known."""
    return MEANINGS.get(name.partition(" (")[0].partition("@")[0], "")


def _measured_columns(file: Path) -> list[str]:
    names = _names(file)
    if "id" not in names:
        return []
    if file.name == ENTANGLEMENT:
        return [name for name in FROM_ENTANGLEMENT if name in names]
    return sorted(name for name in names if name.startswith("influence"))


def _files(folder: Path, depth: int) -> Iterator[Path]:
    for child in sorted(folder.iterdir()):
        if child.is_file() and child.name in (ENTANGLEMENT, INFLUENCE):
            yield child
        elif depth > 1 and child.is_dir() and not child.name.endswith(SKIPPED):
            yield from _files(child, depth - 1)


def _names(file: Path) -> set[str]:
    """Columns of a Parquet file; none if it is missing or unreadable."""
    try:
        return set(pq.read_schema(file).names)
    except (OSError, pa.ArrowException):
        return set()
