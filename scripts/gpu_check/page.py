"""The page of the checks: what passed, what failed, what was left out and why, and the numbers of speed."""

from pathlib import Path
from typing import Any

from align.io.files import write_text
from align.reports.html import environment

TEMPLATE = Path(__file__).parent / "page.html.j2"


def write_page(target: Path, report: dict[str, Any]) -> None:
    """Render the report of ``scripts/gpu_check/run.py``."""
    counts = report["counts"]
    sentence = f"{counts['passed']} cases passed, {counts['failed']} failed, {counts['left out']} were left out"
    page = environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    write_text(target, page.render(report=report, sentence=sentence, speed=_speed(report)))


def _speed(report: dict[str, Any]) -> list[dict[str, str]]:
    timed = {
        name.removeprefix("speed of "): case["numbers"]
        for name, case in report["checks"].get("speed", {}).items()
        if "seconds" in case["numbers"]
    }
    base = timed.get("trl")
    return [
        {
            "name": name,
            "seconds": f"{found['seconds']:.3g}",
            "rate": f"{found['tokens a second']:,.0f}",
            "ratio": f"{base['seconds'] / found['seconds']:.2f} times as fast" if base else "",
            "peak": "not measured" if found["peak GiB"] is None else f"{found['peak GiB']:.2f}",
        }
        for name, found in timed.items()
    ]
