"""Options that several commands share."""

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align.errors import ConfigError
from align.io.object_store import local_path

if TYPE_CHECKING:
    from align.config import ClusterSection, PairsSection
    from reward_models.implicit import ImplicitSource
    from reward_models.loading import LoadOptions

LARGEST_SEED = 2**32 - 1
Cluster = Annotated[
    str | None,
    typer.Option(help="Ray cluster to work on: auto, local or ADDRESS, then settings: auto,workers=8,cpus=2,gpus=1."),
]
Columns = Annotated[list[str] | None, typer.Option("--column", help="Column mapping, e.g. chosen=preferred.")]
Split = Annotated[str, typer.Option(help="Split of a hub dataset or saved dataset.")]
NearCopies = Annotated[
    bool, typer.Option("--near-copies", help="Keep pairs with nearly equal texts together in splits and intervals.")
]
TemplateKwargs = Annotated[
    str | None, typer.Option(help='Arguments of the chat template for all prompts: {"enable_thinking": false}.')
]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of every random draw.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImplicitOptions:
    """A policy in place of a reward model."""

    implicit: Annotated[
        bool, typer.Option("--implicit", help="The model is a policy: beta times its log-ratio to the reference.")
    ] = False
    reference: Annotated[
        str | None, typer.Option(help="--implicit: reference model; default: the one that its run trained it with.")
    ] = None
    beta: Annotated[float | None, typer.Option(help="--implicit: scale; default: that of its run's loss.")] = None

    def source(self, model: str) -> "ImplicitSource | None":
        """The policy with its reference and beta; None: the model is a reward model.

        Raises:
            ConfigError: a reference or a beta of a reward model, or one that is not found.
        """
        if not self.implicit:
            for name, value in (("reference", self.reference), ("beta", self.beta)):
                if value is not None:
                    raise ConfigError(
                        f"--{name}: found {value}, which has a meaning for a policy alone", code="implicit-reward",
                        hint="add --implicit, or leave it out",
                    )  # fmt: skip
            return None
        from reward_models.implicit import ImplicitSource

        return ImplicitSource.find(model, self.reference, self.beta)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingOptions:
    """How a reward model is loaded, and how it reads a prompt and a response."""

    dtype: Annotated[str, typer.Option(help="Reward model's weights: float32, bfloat16, float16 or auto.")] = "float32"
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the reward model.")
    ] = False
    text_pair: Annotated[
        bool, typer.Option("--text-pair", help="Encoders: read prompt and response as a sentence pair.")
    ] = False

    def load_options(self) -> "LoadOptions":
        """The options as reward models take them.

        Raises:
            ConfigError: no such dtype.
        """
        from reward_models.loading import LoadOptions

        return LoadOptions(self.dtype, self.trust_remote_code, self.text_pair)


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses of options; each field becomes an option of the command line.

    typer reads the options of a command from its signature. The signature of the function returned here
    has the fields of each dataclass instead of the parameter that has this dataclass as its type.
    """
    parameters = inspect.signature(command).parameters
    groups: dict[str, Any] = {name: one.annotation for name, one in parameters.items() if is_dataclass(one.annotation)}

    @functools.wraps(command)
    def called(**values: Any) -> None:
        made = {name: kind(**{f.name: values.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        command(**values, **made)

    expanded: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        own = inspect.signature(groups[name]).parameters.values() if name in groups else [parameter]
        expanded += [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
    called.__signature__ = inspect.Signature(expanded)  # type: ignore[attr-defined]
    return called


def cluster_section(option: str | None) -> "ClusterSection | None":
    """``auto,workers=8,gpus=1`` as a section of the configuration; None without the option.

    Raises:
        ConfigError: what follows the address is not a setting of a cluster.
    """
    if option is None:
        return None
    from pydantic import ValidationError

    from align.config import ClusterSection
    from align.errors import ConfigError

    address, *settings = option.split(",")
    given = dict(setting.partition("=")[::2] for setting in settings)
    try:
        return ClusterSection.model_validate({"address": address, **given})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"--cluster {option}: {'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r}",
            code="config-option",
            hint="for example --cluster auto,workers=8,gpus=1",
        ) from None


def template_kwargs(option: str | None) -> dict[str, Any]:
    """The option ``--chat-template-kwargs`` as arguments of the chat template; none without the option.

    Raises:
        ConfigError: it is not a JSON object.
    """
    from align.errors import ConfigError

    try:
        found = json.loads(option or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(
            f"--chat-template-kwargs: found {option!r}, expected a JSON object",
            code="config-option",
            hint="""for example --chat-template-kwargs '{"enable_thinking": false}'""",
        )
    return found


def pair_source(path: str, columns: list[str] | None, split: str, *, near_copies: bool = False) -> "PairsSection":
    """The options that name a table as a section of the configuration.

    Raises:
        ConfigError: a column mapping is not ``name=source``, or names no column of a pair.
    """
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
        return PairsSection(path=path, columns=mapping, split=split, near_copies=near_copies)
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"--column: {reason}", code="config-option") from None


def output_folder(purpose: str) -> Any:
    """The option for a folder to write into, with ``purpose`` as its help."""
    return typer.Option(help=purpose, parser=_folder_on_disk, metavar="FOLDER")


def _folder_on_disk(given: str | Path) -> Path:
    folder = Path(local_path(str(given), what="--output"))
    if folder.is_file():
        raise typer.BadParameter(f"{folder}: found a file, expected a folder")
    return folder
