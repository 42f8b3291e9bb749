"""Small file systems that tests mount."""

import subprocess
from pathlib import Path


def mounted(folder: Path, options: str, *what: str) -> bool:
    """Mount, or remount with other options; whether that worked."""
    done = subprocess.run(["mount", *what, "-o", options, str(folder)], capture_output=True, check=False)
    return done.returncode == 0
