"""A case of a check: it passes, fails or is left out by name, and never stops the others."""

import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from align.io.files import write_json

PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the checks run on."""

    model: str
    """Folder or hub id."""
    pairs: int
    """Pairs of a training step."""
    prompt: int
    """Words of a prompt; a word is about one token."""
    completion: int
    """Words of a response."""
    steps: int
    """Steps that are timed."""
    work: str
    """Folder for what the checks write."""
    lora: bool
    """Time the training of an adapter in place of all weights."""

    @property
    def gpu(self) -> bool:
        """Whether there is a GPU."""
        return torch.cuda.is_available()

    def save(self, file: Path) -> None:
        """Write the settings for another process."""
        write_json(file, asdict(self))

    @classmethod
    def read(cls, file: Path) -> "Settings":
        """Read what ``save`` wrote."""
        return cls(**json.loads(file.read_text()))


class NotHere(Exception):
    """Raised by a case that this machine cannot run; the text says what is missing."""


class Wrong(Exception):
    """Raised by a case whose result is wrong, with its numbers."""

    def __init__(self, reason: str, numbers: Mapping[str, Any]) -> None:
        super().__init__(reason)
        self.numbers = dict(numbers)


Case = Callable[[Settings], dict[str, Any]]
"""Returns the numbers of a case that passed; raises NotHere, Wrong or any other error."""


def need(met: bool, what: str) -> None:
    """Leave the case out unless ``met``.

    Raises:
        NotHere: with ``what`` the case needs.
    """
    if not met:
        raise NotHere(what)


def judge(numbers: dict[str, Any], limits: Mapping[str, float]) -> dict[str, Any]:
    """Return the numbers with their limits, each of which has to hold.

    Raises:
        Wrong: a number is above its limit, or is no number.
    """
    full = numbers | {"limits": dict(limits)}
    for name, limit in limits.items():
        if not numbers[name] <= limit:  # NaN is not below anything
            raise Wrong(f"{name}: found {numbers[name]:.3g}, expected at most {limit:.3g}", full)
    return full


def run_case(case: Case, settings: Settings) -> dict[str, Any]:
    """Run one case; return its outcome, reason, numbers and seconds, whatever happens."""
    start = time.perf_counter()
    reason, numbers = "", {}
    try:
        numbers, outcome = case(settings), PASSED
    except NotHere as error:
        outcome, reason = LEFT_OUT, str(error)
    except Wrong as error:
        outcome, reason, numbers = FAILED, str(error), error.numbers
    except Exception as error:
        outcome, reason = FAILED, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:400]}"
        numbers = {"traceback": traceback.format_exc()[-4000:]}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"outcome": outcome, "reason": reason, "numbers": numbers, "seconds": time.perf_counter() - start}


def run_cases(cases: Mapping[str, Case], settings: Settings, file: Path) -> None:
    """Run cases one after another; ``file`` has every outcome as soon as it is known.

    A case that has not begun is there as failed, so that the end of the process leaves no gap.
    """
    found = {name: {"outcome": FAILED, "reason": "not reached", "numbers": {}, "seconds": 0.0} for name in cases}
    write_json(file, found)
    for name, case in cases.items():
        found[name] = found[name] | {"reason": "the process ended in this case"}
        write_json(file, found)
        found[name] = run_case(case, settings)
        write_json(file, found)
