"""A running object store, and tables to put into it."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from tests.helpers.bad_input_makers import build_workspace
from tests.helpers.builders import rows
from tests.helpers.store_server import FAULT, KEY, PORT, SECRET
from tests.helpers.stores import BUCKET, PARTS


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a running server (tests/helpers/store_server.py); this process's environment points at it."""
    folder = tmp_path_factory.mktemp("server")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.store_server", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (folder / PORT).exists():
        assert process.poll() is None, "the server did not start"
        time.sleep(0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{(folder / PORT).read_text()}")
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        yield folder
    process.kill()
    process.wait()


@pytest.fixture
def store(server: Path) -> Iterator[fs.S3FileSystem]:
    """The store with one empty bucket and no injected faults."""
    address = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    filesystem = fs.S3FileSystem(
        access_key=KEY, secret_key=SECRET, endpoint_override=address, scheme="http", allow_bucket_creation=True
    )
    filesystem.create_dir(BUCKET)
    yield filesystem
    (server / FAULT).unlink(missing_ok=True)
    filesystem.delete_dir_contents(BUCKET)


@pytest.fixture(scope="package")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a run file, pairs as one Parquet file and as parts in a folder."""
    folder = tmp_path_factory.mktemp("built")
    build_workspace(folder)
    table = pa.Table.from_pylist([{**row, "id": f"p{k}"} for k, row in enumerate(rows(12))])
    pq.write_table(table, folder / "pairs.parquet")
    (folder / "parts").mkdir()
    for part in range(PARTS):
        pq.write_table(table.slice(4 * part, 4), folder / "parts" / f"part-{part}.parquet")
    (folder / "parts" / "_SUCCESS").touch()
    return folder


@pytest.fixture
def workspace(built: Path, tmp_path: Path) -> Path:
    """A copy to work in."""
    return Path(shutil.copytree(built, tmp_path / "w"))
