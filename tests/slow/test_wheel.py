"""The built wheel, in an empty folder: the console command, recipes, error page, templates, type marker."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_COPIED = (".*", "build", "runs", "mutants", "*.egg-info", "__pycache__")
"""A build within the checkout would take what an earlier one left in build/."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed without its requirements, which this environment has."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    tree = shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*NOT_COPIED))
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(tree)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def run(installed: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, str(installed / "bin" / "align"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_brings_what_the_command_needs(installed: Path, tmp_path: Path) -> None:
    recipe = run(installed, tmp_path, "recipes", "show", "helpfulness")
    assert recipe == (ROOT / "configs" / "helpfulness.yaml").read_text()
    assert "layout: auto" in run(installed, tmp_path, "explain", "layout")
    assert '"problems": []' in run(installed, tmp_path, "doctor", "--json", "--no-self-test")
    (tmp_path / "run.yaml").write_text(recipe)
    pages = {file.name for file in (installed / "align" / "reports" / "templates").iterdir()}
    assert pages == {file.name for file in (ROOT / "align" / "reports" / "templates").iterdir()}
    assert (installed / "align" / "py.typed").exists() and (installed / "reward_models" / "py.typed").exists()
