"""Fixtures: the small real models, tiny random ones, a workspace. Nothing reaches the network."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: a slow machine is not a failure. CI draws the same examples every time, a developer's machine new ones.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder that `make assets` filled."""
    folder = Path(os.environ.get("ALIGN_ASSETS", Path(__file__).parents[1] / ".assets"))
    assert (folder / "smollm2" / "asset.json").exists(), "run `make assets` first"
    return folder


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Llama folder."""
    from tests.helpers.builders import causal

    return causal(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder with tiny models, pairs, prompts and a run file."""
    from tests.helpers.small_runs import write_run

    return write_run(tmp_path, ("dpo", "madpo"), {"max_steps": 3}, num_generations=3).parent
