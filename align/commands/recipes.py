"""`align recipes`: run files that come with the program."""

from pathlib import Path

from align.config import nearest
from align.errors import ConfigError
from align.io.shipped import shipped

FOLDER = "configs"


def recipes() -> dict[str, str]:
    """Name of each recipe -> what it is for: the comment that begins the file."""
    return {file.stem: _purpose(file) for file in sorted(shipped(FOLDER).glob("*.yaml"))}


def recipe(name: str) -> str:
    """The text of a recipe.

    Raises:
        ConfigError: there is none of this name.
    """
    file = shipped(FOLDER) / f"{name}.yaml"
    known = list(recipes())
    if name not in known:
        raise ConfigError(f"{name}: no recipe has this name{nearest(name, known)}", code="config-option")
    return file.read_text(encoding="utf-8")


def _purpose(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# ").rstrip())
    return " ".join(one for one in head if one)
