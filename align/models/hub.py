"""Loading from the hub where it cannot be reached: from the cache at once, without minutes of retries."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align.io.console import log

TIMEOUT = 10.0
"""Seconds that the hub has to answer."""


@contextmanager
def cache_if_away(model: str) -> Iterator[None]:
    """Within the block, load a hub id from the cache alone if the hub does not answer one request; say so in a warning.

    transformers and huggingface_hub would try each file five times, 23 seconds apart in all, before they look into the
    cache. Nothing changes for a folder, or where ``HF_HUB_OFFLINE`` is set.

    Args:
        model: folder or hub id.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or Path(model).exists():
        yield
        return
    reason = _unreachable(model)
    if not reason:
        yield
        return
    log.warning("%s: the hub cannot be reached (%s); only what is in the cache is loaded", model, reason)
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _unreachable(model: str) -> str:
    """Return why the hub does not answer one request for a model, empty if it does; any answer will do."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    try:
        get_session().head(hf_hub_url(model, "config.json"), timeout=TIMEOUT)
    except HFValidationError:
        return ""  # no id of the hub, which the loader will say
    except Exception as error:  # the packages that send requests have no common error for a failed connection
        return " ".join(str(error).split()) or type(error).__name__
    return ""
