"""Base class of the sections, and field types that several sections share."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from align.io.object_store import is_remote

ADDED = frozenset(
    {
        "pairs_per_step",
        "group_by_prompt",
        "loss_type",
        "loss_weights",
        "eval_pairs",
        "eval_samples",
        "keep",
        "early_stopping",
        "reference",
        "dtype",
        "covariates",
    }
)
"""Fields added after the first release. Left out of the stage key at None or [], so earlier stages stay up to date."""
NAME = r"^\w[\w .+=-]{0,99}$"
OF_THE_MACHINE = frozenset({"async_checkpoints"})
"""Fields on which no result depends; never part of a stage key."""


class Section(BaseModel):
    """Base of every section: rejects unknown keys and cannot be changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=(), allow_inf_nan=False)

    def made_from(self, *, without: set[str]) -> dict[str, Any]:
        """Values for a stage's key: all but ``without``, ``OF_THE_MACHINE`` and those of ``ADDED`` at None or []."""
        values = self.model_dump(exclude=without | OF_THE_MACHINE)
        return {name: value for name, value in values.items() if name not in ADDED or value not in (None, [])}


def _on_disk(folder: str) -> str:
    if is_remote(folder):
        raise ValueError("expected a folder on a disk, which `align push` copies to a store")
    return folder


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=NAME)]
"""A string that becomes the name of a folder."""
OutputFolder = Annotated[str, AfterValidator(_on_disk)]
