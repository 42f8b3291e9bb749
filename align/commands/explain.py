"""`align explain`: an error code's cause and fix, from the table in docs/errors.md."""

import re

from align.config import nearest
from align.errors import ConfigError
from align.io.shipped import shipped

PAGE = "docs/errors.md"
CELLS = re.compile(r"(?<!\\)\|")


def error_codes() -> dict[str, dict[str, str]]:
    """Code -> its ``cause`` and its ``fix``, in the order of the page.

    Raises:
        EnvironmentProblem: the page is not there.
    """
    found: dict[str, dict[str, str]] = {}
    for line in shipped(PAGE).read_text(encoding="utf-8").splitlines():
        if not line.startswith("| `"):
            continue
        codes, cause, fix = (cell.strip().replace("\\|", "|") for cell in CELLS.split(line)[1:4])
        for code in re.findall(r"`([a-z0-9-]+)`", codes):
            found[code] = {"cause": cause, "fix": fix}
    return found


def explain(code: str) -> dict[str, str]:
    """The code with its ``cause`` and ``fix``.

    Args:
        code: as a message shows it, with or without brackets.

    Raises:
        ConfigError: no error has this code.
    """
    name, known = code.strip().strip("[]"), error_codes()
    if name not in known:
        raise ConfigError(f"{code}: no error has this code{nearest(name, list(known))}", code="config-option")
    return {"code": name} | known[name]
