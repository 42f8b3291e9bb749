"""What every section of a configuration is made of."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from align.stores import is_remote

NAME = r"^\w[\w .+=-]{0,99}$"


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=(), allow_inf_nan=False)


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
