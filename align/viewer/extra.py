"""Packages of the extra `view`, which the viewer alone needs."""

from importlib.util import find_spec

from align.errors import EnvironmentProblem

PACKAGES = ("duckdb", "starlette", "uvicorn")


def require_extra() -> None:
    """Check that the packages of the extra are installed.

    Raises:
        EnvironmentProblem: one is missing.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"align view: found no {', '.join(missing)} in this environment, expected the packages of the extra `view`",
            code="view-extra",
            hint="pip install 'margin-align[view]'",
        )
