"""Answers of a server by key, kept in a file so that a stopped evaluation asks for none of them twice."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any


class Answers(dict[str, dict[str, Any]]):
    """Answer of each key; what is added is appended to the file at once, one JSON object per line.

    Args:
        file: the file, which may not exist yet; a line that a killed process left unfinished is skipped. None: the
            answers are kept in memory.
    """

    def __init__(self, file: Path | None) -> None:
        super().__init__()
        self.file = file
        if file is not None and file.exists():
            for line in file.read_text(encoding="utf-8").split("\n"):
                with suppress(ValueError):
                    answer = json.loads(line)
                    self[answer.pop("key")] = answer

    def add(self, key: str, answer: dict[str, Any]) -> None:
        """Keep an answer."""
        self[key] = answer
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write("\n" + json.dumps({"key": key, **answer}) + "\n")
