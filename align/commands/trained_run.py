"""What a finished training of a run says about itself: its loss, its pairs, its model, and its checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from align.config import LossSection, PairsSection
from align.data.pairs import load_pairs, read_pairs
from align.data.thumbs import refuse_thumbs
from align.entanglement.trace import checkpoints_of
from align.errors import DataError
from align.filtering.tables import KEPT
from align.io.stage import read_manifest
from align.losses.spec import BoundLoss
from align.losses.sums import bind_section
from align.models.folders import is_adapter
from align.models.tokenization import MAX_LENGTH
from align.models.turns import Turns

NOT_PLAIN = ("weights", "remedy", "token_mask")


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A training of a run, with its checkpoints."""

    folder: Path
    base: str
    """The model that training started from."""
    given: str | None
    """The reference model that the run file names; None: what training started from."""
    loss: BoundLoss
    checkpoints: list[tuple[int, Path]]
    """(optimizer step, folder), ascending; at least one."""
    pairs: Path
    """The pairs that it trained on: a file, or a folder of the run."""
    max_length: int
    """Tokens of prompt and response together."""
    turns: Turns
    not_plain: list[str]
    """What else changes its steps, by the names in the run file: weights of the pairs, a remedy, a token mask."""

    @property
    def reference(self) -> str | None:
        """The reference of the loss; None: each checkpoint with its adapter off."""
        return self.given or (None if is_adapter(self.checkpoints[0][1]) and not is_adapter(self.base) else self.base)

    def table(self) -> Dataset:
        """The pairs that it trained on."""
        pairs = load_pairs(PairsSection(path=str(self.pairs))) if self.pairs.is_file() else read_pairs(self.pairs)
        refuse_thumbs(pairs, str(self.pairs))
        return pairs


def read_training(run: Path, method: str, max_length: int | None = None) -> TrainedRun:
    """Read the training of ``method`` in the folder of a run.

    Args:
        run: folder of the run.
        method: name of the method in the run file.
        max_length: tokens of a pair; None: as trained.

    Raises:
        DataError: no such training, or it kept no checkpoint.
    """
    training = run / f"train-{method}"
    manifest = read_manifest(training)
    if manifest is None:
        trained = ", ".join(sorted(path.name.removeprefix("train-") for path in run.glob("train-*"))) or "none"
        raise DataError(f"{training}: no finished training (methods here: {trained})", code="trace-missing")
    inputs = manifest["inputs"]
    settings = inputs["settings"]
    parameters = inputs.get("trust", {}) | inputs["loss"]["parameters"]  # trust: parameters that the run measured
    section = LossSection(**inputs["loss"] | {"parameters": parameters})
    unfiltered = "heldout/train" if "heldout" in inputs["after"] else "margins/pairs"
    return TrainedRun(
        folder=training,
        base=settings["model"],
        given=settings.get("reference"),
        loss=bind_section(section),
        checkpoints=checkpoints_of(training),
        pairs=run / "filter" / KEPT if "filter" in inputs["after"] else run / unfiltered,
        max_length=max_length or settings["trainer"].get("max_length") or MAX_LENGTH,
        turns=settings.get("turns", "all"),  # a training before there was a choice
        not_plain=[name for name in NOT_PLAIN if inputs["loss"].get(name)],
    )
