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
    made.filters.update({"interval": interval, "number": number, "method": name, "json": _json})
    return made


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, default=str)
