"""The jinja2 environment of all pages."""

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from align.reports.verdict import name
from align.stats import interval, number

SEARCH = "search.js"


def search_script() -> dict[str, Any]:
    """The script that searches the samples of a page, and its hash for the page's policy."""
    script = (files("align.reports") / "templates" / SEARCH).read_text(encoding="utf-8")
    return {"script": Markup(script), "script_hash": script_hash(script)}


def script_hash(script: str) -> str:
    """Source expression of a content security policy that allows this script and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


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
