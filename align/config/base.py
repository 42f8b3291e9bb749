"""What every section of a configuration is made of."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from align.io.object_store import is_remote

ADDED = frozenset({"pairs_per_step"})
"""Fields that came later: absent, they make no stage stale that was finished without them."""
NAME = r"^\w[\w .+=-]{0,99}$"
OF_THE_MACHINE = frozenset({"async_checkpoints"})
"""Fields that no result depends on."""


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=(), allow_inf_nan=False)

    def made_from(self, *, without: set[str]) -> dict[str, Any]:
        """The values that a stage is made from, without ``OF_THE_MACHINE``; those of ``ADDED`` where they are given."""
        values = self.model_dump(exclude=without | OF_THE_MACHINE)
        return {name: value for name, value in values.items() if name not in ADDED or value is not None}


def _on_disk(folder: str) -> str:
    if is_remote(folder):
        raise ValueError("expected a folder on a disk, which `align push` copies to a store")
    return folder


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=NAME)]
"""Becomes the name of a folder."""
OutputFolder = Annotated[str, AfterValidator(_on_disk)]
