"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align.io.object_store import local_path

if TYPE_CHECKING:
    from align.config import ClusterSection

Cluster = Annotated[
    str | None,
    typer.Option(help="Ray cluster to work on: auto, local or ADDRESS; with ,workers=8,cpus=2,gpus=1 behind it."),
]


def cluster_called(option: str | None) -> "ClusterSection | None":
    """``auto,workers=8,gpus=1`` as configuration; None where the option is absent.

    Raises:
        ConfigError: something behind the address is not a setting of a cluster.
    """
    if option is None:
        return None
    from pydantic import ValidationError

    from align.config import ClusterSection
    from align.errors import ConfigError

    address, *settings = option.split(",")
    fields = dict(setting.partition("=")[::2] for setting in settings)
    try:
        return ClusterSection.model_validate({"address": address, **fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"--cluster {option}: {'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r}",
            code="config-option",
            hint="for example --cluster auto,workers=8,gpus=1",
        ) from None


def pair_source(path: str, columns: list[str] | None, split: str) -> Any:
    from pydantic import ValidationError

    from align.config import PairsSection
    from align.errors import ConfigError

    mapping = {}
    for item in columns or []:
        name, found, source = item.partition("=")
        if not (name and found and source):
            raise ConfigError(f"--column {item}: expected name=source", code="config-option")
        mapping[name] = source
    try:
        return PairsSection(path=path, columns=mapping, split=split)
    except ValidationError as error:
        said = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"--column: {said}", code="config-option") from None


def output_folder(what: str) -> Any:
    """The option that names a folder to write; ``what`` is its help."""
    return typer.Option(help=what, parser=_on_disk, metavar="FOLDER")


def _on_disk(given: str | Path) -> Path:
    folder = Path(local_path(str(given), what="--output"))
    if folder.is_file():
        raise typer.BadParameter(f"{folder}: found a file, expected a folder")
    return folder


LARGEST = 2**32 - 1
Seed = Annotated[int, typer.Option(min=0, max=LARGEST, help="What is drawn at random depends on it.")]
