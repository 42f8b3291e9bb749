"""`--cluster`: the option of verbs that can share their work out."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from align.config import ClusterConfig

Cluster = Annotated[
    str | None,
    typer.Option(help="Ray cluster to work on: auto, local or ADDRESS; with ,workers=8,cpus=2,gpus=1 behind it."),
]


def cluster_called(option: str | None) -> "ClusterConfig | None":
    """``auto,workers=8,gpus=1`` as configuration; None where the option is absent.

    Raises:
        ConfigError: something behind the address is not a setting of a cluster.
    """
    if option is None:
        return None
    from pydantic import ValidationError

    from align.config import ClusterConfig
    from align.errors import ConfigError

    address, *settings = option.split(",")
    fields = dict(setting.partition("=")[::2] for setting in settings)
    try:
        return ClusterConfig.model_validate({"address": address, **fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"--cluster {option}: {'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r}",
            code="config-option",
            hint="for example --cluster auto,workers=8,gpus=1",
        ) from None
