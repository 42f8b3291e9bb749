"""The Dockerfiles copy what an installation reads, and .dockerignore lets it through; they are not built here."""

import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def steps(file: Path) -> list[tuple[str, list[str]]]:
    """(instruction, its words) of a Dockerfile."""
    lines = [line for line in file.read_text().replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], shlex.split(line)[1:]) for line in lines]


def copied(file: Path) -> list[str]:
    return [source for name, words in steps(file) if name == "COPY" for source in words[:-1]]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_copied_is_what_the_installation_reads(file: Path) -> None:
    """Every file that pyproject.toml names, and the packages; .dockerignore keeps none of them out."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"pyproject.toml", settings["project"]["readme"], "LICENSE", "constraints.txt"}
    needed |= {name.rstrip("*") for name in settings["tool"]["setuptools"]["packages"]["find"]["include"]}
    patterns = [one for some in settings["tool"]["setuptools"]["data-files"].values() for one in some]
    needed |= {pattern.split("/")[0] for pattern in patterns}
    assert set(copied(file)) == needed
    assert all((ROOT / name).exists() for name in needed)
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert kept == needed


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_image_runs_the_command_as_a_user(file: Path) -> None:
    found = steps(file)
    names = [name for name, _ in found]
    assert names[0] == "FROM" and found[0][1] == ["python:3.11-slim"]
    assert names.index("USER") < names.index("ENTRYPOINT") and dict(found)["USER"] != ["root"]
    assert dict(found)["ENTRYPOINT"] == ["[align]"]
    for name, words in found:
        assert name != "RUN" or "pip" not in words or "--constraint" in words


def test_there_is_one_for_a_cpu_and_one_for_cuda() -> None:
    assert [file.stem for file in FILES] == ["cpu", "cuda"]
