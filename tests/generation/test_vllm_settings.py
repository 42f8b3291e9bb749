"""What the vllm engine hands to vLLM on a CPU, without vLLM: the size of the cache, dtype, what the user gives."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.errors import ModelError
from align.generation import vllm_engine
from align.generation.vllm_engine import VllmEngine
from tests.helpers.builders import causal

SPACE = "VLLM_CPU_KVCACHE_SPACE"
WANTED = 0.92
"""Share of all memory that vLLM wants to be free, without a size of the cache."""


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, dict[str, Any]]]:
    """(size of the cache, settings) of each engine, on a machine with three quarters of its memory free."""
    found: list[tuple[str | None, dict[str, Any]]] = []

    def load(model: str, **settings: Any) -> Any:
        found.append((os.environ.get(SPACE), settings))
        if SPACE not in os.environ and settings.get("gpu_memory_utilization", WANTED) > 0.75:
            raise ValueError("Available memory on node 0 is less than desired CPU memory utilization (0.92)")
        return SimpleNamespace()

    platform = SimpleNamespace(is_cpu=lambda: True)
    fake = SimpleNamespace(LLM=load, exceptions=SimpleNamespace(), platforms=SimpleNamespace(current_platform=platform))
    monkeypatch.setattr(vllm_engine, "import_vllm", lambda: fake)
    for name in (*vllm_engine.ENVIRONMENT, SPACE):
        monkeypatch.setenv(name, "kept")  # so that what the engine sets is undone
        monkeypatch.delenv(name)
    return found


def test_the_documented_command_starts_with_a_quarter_of_the_memory_in_use(
    given: list[tuple[str | None, dict[str, Any]]], tmp_path: Path
) -> None:
    VllmEngine(str(causal(tmp_path / "policy")))
    ((space, settings),) = given
    assert space == "4" and settings["dtype"] == "float32" and "gpu_memory_utilization" not in settings


def test_what_the_user_gives_is_kept(
    given: list[tuple[str | None, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = str(causal(tmp_path / "policy"))
    VllmEngine(policy, options={"gpu_memory_utilization": 0.5})
    assert given[-1][0] is None and given[-1][1]["gpu_memory_utilization"] == 0.5
    with pytest.raises(ModelError) as error:
        VllmEngine(policy, options={"gpu_memory_utilization": 0.9})
    assert "--option gpu_memory_utilization=0.5" in str(error.value.hint)
    monkeypatch.setenv(SPACE, "1")
    VllmEngine(policy)
    assert given[-1][0] == "1"
