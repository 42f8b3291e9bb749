"""What the policies of a run answered to a prompt: samples along a training, completions of its evaluation."""

import json
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.data.text import text_key
from align.viewer.followed import TRAIN
from align.viewer.text_cache import plain_text

COMPLETIONS, SAMPLES, PROMPTS = "completions.parquet", "held-out/samples", "prompts.json"
GENERATE, REFERENCE, PARTIAL = "generate-", "reference", ".partial"
KEPT_FILES = 64
LARGEST = 200_000_000
"""Bytes of a file of samples; a larger one is not read."""
Answer = dict[str, Any]


@dataclass
class Answers:
    """Answers of the policies of runs by the text of their prompts; a file is read again when it has changed."""

    runs: tuple[Path, ...]
    _read: OrderedDict[Path, tuple[tuple[int, int], dict[bytes, list[Answer]]]] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def of(self, prompt: str) -> dict[str, Any]:
        """All answers to a prompt, given as plain text: those of the reference first, then by policy and step."""
        key, found = text_key(prompt), []
        for run in self.runs:
            for policy, step, file in _files(run):
                for answer in self._content(file).get(key, ()):
                    found.append({"run": run.name, "policy": policy, "step": step, **answer})
        found.sort(key=lambda one: (one["run"], one["policy"] != REFERENCE, one["policy"], _order(one["step"])))
        return {"answers": found, "why": "" if found else self._why()}

    def _why(self) -> str:
        if not self.runs:
            return "give the folder of a run: align view RUN"
        if not any(True for run in self.runs for _ in _files(run)):
            return "the run has no samples yet: `train.eval_samples` and `evaluate` write them"
        return "no policy was asked this prompt"

    def _content(self, file: Path) -> dict[bytes, list[Answer]]:
        try:
            state = file.stat()
        except OSError:
            return {}
        stamp = (state.st_mtime_ns, state.st_size)
        with self._lock:
            known = self._read.get(file)
            if known is not None and known[0] == stamp:
                self._read.move_to_end(file)
                return known[1]
        content = {} if state.st_size > LARGEST else _read(file)
        with self._lock:
            self._read[file] = (stamp, content)
            while len(self._read) > KEPT_FILES:
                self._read.popitem(last=False)
        return content


def _order(step: int | None) -> float:
    return math.inf if step is None else step


def _files(run: Path) -> Iterator[tuple[str, int | None, Path]]:
    """(policy, step, file) of all files with answers; step None: the finished policy."""
    for folder in sorted(run.iterdir()) if run.is_dir() else ():
        name = folder.name.removesuffix(PARTIAL)
        if name.startswith(GENERATE) and (folder / COMPLETIONS).is_file():
            yield name.removeprefix(GENERATE), None, folder / COMPLETIONS
        if name.startswith(TRAIN):
            for file in (folder / SAMPLES).glob("step-*.jsonl"):
                number = file.stem.removeprefix("step-")
                if number.isdigit():
                    yield name.removeprefix(TRAIN), int(number), file


def _read(file: Path) -> dict[bytes, list[Answer]]:
    """Key of a prompt -> its answers; nothing if the file cannot be read, or is being written."""
    found: dict[bytes, list[Answer]] = {}
    try:
        for prompt, answer in _completions(file) if file.name == COMPLETIONS else _samples(file):
            found.setdefault(text_key(prompt), []).append(answer)
    except (OSError, ValueError, KeyError, IndexError, TypeError, pa.ArrowException):
        return {}
    return found


def _completions(file: Path) -> Iterator[tuple[str, Answer]]:
    for row in pq.read_table(file, partitioning=None).to_pylist():
        if row["text"] is not None:
            yield plain_text(row["prompt"]), _answer(row)


def _samples(file: Path) -> Iterator[tuple[str, Answer]]:
    prompts = json.loads((file.parent / PROMPTS).read_bytes())
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield prompts[row["prompt"]], _answer(row)


def _answer(row: dict[str, Any]) -> Answer:
    found: Answer = {"text": plain_text(row["text"])}
    for name in ("reward", "tokens", "kl", "finish_reason"):
        value = row.get(name)
        found[name] = None if isinstance(value, float) and not math.isfinite(value) else value
    return found
