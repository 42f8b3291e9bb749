"""The jinja2 environment of all pages."""

import json
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from align.reports.verdict import name
from align.stats import interval, number


def environment() -> Environment:
    """Environment with the templates and filters of the pages; it escapes every value."""
    made = Environment(
        loader=PackageLoader("align.reports", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update({"interval": interval, "number": number, "method": name, "json": _json, "percent": percent})
    return made


def percent(estimate: dict[str, Any]) -> str:
    """``58.3% (52.1 to 64.4)``: a share and its 95% interval, in percent; ``50% (all equal)`` without one."""
    ends = {key: None if estimate[key] is None else 100 * estimate[key] for key in ("value", "low", "high")}
    value, rest = interval(estimate | ends).split(" ", maxsplit=1)
    return f"{value}% {rest}"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, default=str)
