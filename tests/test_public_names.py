"""The face of the package: what `import align` costs, which names it has, that type checkers read it."""

import ast
import importlib
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import align
import reward_models

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "datasets", "transformers", "trl", "pydantic")
COST = """
import sys, time
start = time.perf_counter()
import align
seconds = time.perf_counter() - start
names = dir(align)
print(seconds, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_the_import_is_light() -> None:
    """The fastest of three fresh processes, because the machine does other work too."""
    found = [
        subprocess.run(
            [sys.executable, "-c", COST], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert min(float(seconds) for seconds, *_ in found) < 0.05
    assert not {name for _, *names in found for name in names} & set(HEAVY)


@pytest.mark.parametrize("name", align.__all__)
def test_every_public_name_is_there(name: str) -> None:
    module = align._NAMES[name]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not part of this build")
    assert set(align.__all__) == set(align._NAMES) and name in dir(align)
    assert getattr(align, name) is getattr(importlib.import_module(module), name)


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="module 'align' has no attribute 'PreferenceTrainr'"):
        getattr(align, "PreferenceTrainr")  # noqa: B009
    assert importlib.util.find_spec("align.training") is not None


def test_the_typed_script_uses_every_public_name() -> None:
    """mypy, which reads that script, then sees the types of each."""
    tree = ast.parse((ROOT / "tests" / "helpers" / "typed_script.py").read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert {*align.__all__, *reward_models.__all__} - used == set()
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert "tests/helpers/typed_script.py" in checked["files"] and checked["strict"]


def test_both_packages_are_typed() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in ("align", "reward_models"):
        assert (ROOT / package / "py.typed").exists() and "py.typed" in data[package]
