"""`align` as a user starts it, and JSONL files for it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def align(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with one thread and no GPU."""
    full = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    command = [sys.executable, "-m", "align.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=full, capture_output=True, text=True, check=False, timeout=900)


def jsonl(path: Path, items: list[dict[str, Any]]) -> str:
    """Write one item a line; returns the file's name."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path.name
