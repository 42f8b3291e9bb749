"""Object stores by address (s3://, gs://, abfs://), and messages for their failures."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from align.errors import AlignError, ConfigError, DataError, EnvironmentProblem

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
S3, GCS, AZURE = ("s3",), ("gs", "gcs"), ("abfs", "abfss")
SCHEMES = S3 + GCS + AZURE
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
GCS_PATIENCE = timedelta(seconds=20)
MISSING = re.compile(r"NO_SUCH_|Path does not exist|HTTP status 404|NOT_FOUND|NotFound")
DENIED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE|MISSING_AUTH|EXPIRED|TOKEN|InvalidAccessKeyId"
    r"|HTTP status 40[13]|PERMISSION_DENIED|UNAUTHENTICATED|AuthenticationFailed|Authorization|credential",
    re.IGNORECASE,
)
UNREACHABLE = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|THROTTLING|REQUEST_TIMEOUT|curlCode|HTTP status 5"
    r"|INTERNAL_FAILURE|INTERNAL_ERROR|UNAVAILABLE|DEADLINE|InsufficientStorage|Could not resolve"
)
NOISE = re.compile(r"\s*\((?:Request ID|Detail)[^)]*\)|Detail: \[.*|\s*error_info=.*", re.DOTALL)


def is_remote(address: str) -> bool:
    """Whether this is an address such as s3://bucket/pairs.parquet, not a path or hub id."""
    return ADDRESS.match(address) is not None


def connect(address: str) -> "tuple[FileSystem, str]":
    """The store of an address and the path in it, ``bucket/key``; no request is sent.

    Raises:
        ConfigError: not an address of an object store, or one that contains keys.
    """
    scheme, place = _parts(address)
    from pyarrow import fs

    with store_errors(address):
        if scheme in S3:
            return fs.S3FileSystem(**_s3_endpoint()), place
        if scheme in GCS:
            return fs.GcsFileSystem(retry_time_limit=GCS_PATIENCE), place
        filesystem, _ = fs.FileSystem.from_uri(f"{scheme}://{place.partition('/')[0]}/")
        container, _, key = place.partition("/")
        return filesystem, f"{container.partition('@')[0]}/{key}"


def local_path(given: str, *, what: str) -> str:
    """``given``, after a check that it is a path on a disk: results are written to disks only.

    Raises:
        AlignError: it is an address of an object store.
    """
    if is_remote(given):
        raise AlignError(
            f"{what} {_shown(given)}: found an address, expected a folder on a disk",
            code="store-output",
            hint="write into a folder, then `align push FOLDER ADDRESS`",
        )
    return given


@contextmanager
def store_errors(address: str) -> Iterator[None]:
    """Replace an ``OSError`` of a store in the body by an error with a hint.

    Raises:
        AlignError: the store is unreachable or refuses, or the object does not exist.
    """
    try:
        yield
    except AlignError:
        raise
    except OSError as error:
        raise store_problem(address, error) from None


def store_problem(address: str, error: Exception) -> AlignError:
    """The error with a hint for an ``error`` that a store raised."""
    text = str(error) or type(error).__name__
    reason = " ".join(NOISE.sub("", text).split())
    if MISSING.search(text) or isinstance(error, FileNotFoundError):
        return DataError(
            f"{address}: no such object, or no such bucket ({reason})",
            code="data-missing",
            hint="check the address, and which server is asked (AWS_ENDPOINT_URL)",
        )
    if UNREACHABLE.search(text):
        return EnvironmentProblem(
            f"{address}: the object store is unreachable, full or overloaded ({reason})",
            code="store-away",
            hint="check the network and the store's address (AWS_ENDPOINT_URL); the same command resumes from there",
        )
    if DENIED.search(text):
        return EnvironmentProblem(
            f"{address}: the object store refuses the keys, or no keys were given ({reason})",
            code="store-denied",
            hint="set them as for the store's own tools, e.g. AWS_PROFILE, or AWS_ACCESS_KEY_ID with its secret",
        )
    return EnvironmentProblem(
        f"{address}: the object store failed ({reason})",
        code="store-failed",
        hint="status 301: set AWS_REGION to the bucket's region; else ask the operator of the store",
    )


def _parts(address: str) -> tuple[str, str]:
    matched = ADDRESS.fullmatch(address)
    assert matched is not None
    scheme, place = matched[1].lower(), matched[2]
    user, at, _ = place.partition("/")[0].rpartition("@")
    if at and (scheme not in AZURE or ":" in user):
        raise ConfigError(
            f"{_shown(address)}: found keys in the address, expected scheme://bucket/key",
            code="store-address",
            hint="set keys in the environment or the store's configuration file, which no log or manifest contains",
        )
    if scheme not in SCHEMES or not place or place.startswith("/"):
        expected = ", ".join(f"{known}://" for known in ("s3", "gs", "abfs"))
        raise ConfigError(
            f"{address}: found scheme {scheme!r} and place {place!r}, expected {expected} and bucket/key",
            code="store-address",
            hint="copy other files to a disk or a store first",
        )
    return scheme, place


def _shown(address: str) -> str:
    """An address with everything before ``@`` hidden, which may be a key."""
    return re.sub(r"(?<=://)[^/]*@", "***@", address)


def _s3_endpoint() -> dict[str, str]:
    """Settings of pyarrow for a server other than Amazon's, from ``ENDPOINTS``, which pyarrow itself does not read."""
    found = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)
    if found is None:
        return {}
    parts = urlsplit(found)
    try:
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and "@" not in found
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            f"AWS_ENDPOINT_URL: found {_shown(found)!r}, expected http://host:port or https://host",
            code="store-address",
        )
    return {"endpoint_override": parts.netloc + parts.path.rstrip("/"), "scheme": parts.scheme}
