"""Files that come with the program: recipes, the table of error codes, tested versions."""

import site
import sysconfig
from pathlib import Path

from align.errors import EnvironmentProblem

SHARED = "share/margin-align"
"""Where a wheel puts them: below the prefix of the environment, the user's base, or the folder of ``--target``."""


def shipped(name: str) -> Path:
    """Return a file or folder of the checkout that runs, or what the installed wheel brought of it.

    Args:
        name: its path in the repository, such as ``docs/errors.md``.

    Raises:
        EnvironmentProblem: it is not there.
    """
    above = Path(__file__).parents[2]
    roots = [above] if (above / "pyproject.toml").is_file() else []
    roots += [Path(base) / SHARED for base in (above, sysconfig.get_path("data"), site.getuserbase())]
    for root in roots:
        if (root / name).exists():
            return root / name
    raise EnvironmentProblem(
        f"{name}: found in none of {', '.join(map(str, roots))}, expected among the files that come with the program",
        code="install-incomplete",
        hint="install it again: pip install --force-reinstall --no-deps margin-align",
    )
