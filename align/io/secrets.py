"""Remove tokens and keys from everything that is written or shown."""

import os
import re
from typing import Any

HIDDEN = "***"
NAMES = frozenset(
    {
        *("token", "hub_token", "hf_token", "push_to_hub_token", "use_auth_token", "auth_token", "access_token"),
        *("api_key", "apikey", "wandb_api_key", "secret", "password", "authorization"),
    }
)
"""Keys whose value is always a secret."""
SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|AKIA[A-Z0-9]{16})|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?i:(?<=bearer ))[A-Za-z0-9._-]{16,}"
)
"""Values that are always secrets: keys of well-known services, user and password in an address."""
ASSIGNED = re.compile(rf"(?i)\b((?:{'|'.join(sorted(NAMES))})['\"]?(?:=|:\s*(?:found )?))('?)[^\s,'\"]+")
ENVIRONMENT = re.compile(
    r"(?i)(TOKEN|API_KEY|SECRET|PASSWORD|ACCESS_KEY(_ID)?|ACCOUNT_KEY|STORAGE_KEY|CONNECTION_STRING)$"
)
SHORTEST = 8
"""Characters; hiding shorter values of environment variables would hide ordinary words."""


def redact(value: Any) -> Any:
    """``value`` (JSON) with every secret replaced by ``***``; the result does not depend on the environment."""
    if isinstance(value, dict):
        return {
            key: HIDDEN if str(key).lower() in NAMES and isinstance(item, str) and item else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return SHAPES.sub(HIDDEN, value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """A line for the terminal or a log without secrets, including those in the environment of this process."""
    text = ASSIGNED.sub(rf"\1\2{HIDDEN}", SHAPES.sub(HIDDEN, text))
    for name, value in os.environ.items():
        if ENVIRONMENT.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return text
