"""Compare reading a pair table from an object store with reading it from a disk: seconds and peak memory.

The store is moto's S3 server on this machine; nothing else reaches the network.

    python -m scripts.bench.object_store --pairs 200000
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PARTS, WORDS, ROW_GROUP = 4, 40, 10_000


def main() -> None:
    """Write a table to the disk and to the store, read it from either in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read(arguments.read)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pairs"
        size = write(folder, arguments.pairs)
        port = free_port()
        os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "any",
                       "AWS_SECRET_ACCESS_KEY": "any", "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            push(folder, port, size)
            for source in (str(folder), "s3://bucket/pairs/"):
                own = [sys.executable, "-m", "scripts.bench.object_store", "--read", source]
                found = json.loads(subprocess.run(own, capture_output=True, text=True, check=True).stdout)
                print(
                    f"{'store' if '://' in source else 'disk'}: {found['rows']} pairs, {size / 1e6:.0f} MB of Parquet, "
                    f"{found['seconds']:.1f} s, {found['peak'] - found['before']:.0f} MiB more at the peak"
                )
        finally:
            server.kill()


def write(folder: Path, pairs: int) -> int:
    """Write a table of random words in ``PARTS`` files; returns their bytes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = np.array([f"{word:x}" for word in rng.integers(1 << 30, size=50_000)])
    for part in range(PARTS):
        count = pairs // PARTS
        texts = {name: [" ".join(words[row]) for row in rng.integers(len(words), size=(count, WORDS))]
                 for name in ("prompt", "chosen", "rejected")}  # fmt: skip
        pq.write_table(pa.table(texts), folder / f"part-{part}.parquet", row_group_size=ROW_GROUP)
    return sum(file.stat().st_size for file in folder.iterdir())


def push(folder: Path, port: int, size: int) -> None:
    """Push the folder to the store as soon as the server listens."""
    from pyarrow import fs

    from align.commands.push import push_folder

    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    store = fs.S3FileSystem(endpoint_override=f"127.0.0.1:{port}", scheme="http", allow_bucket_creation=True)
    store.create_dir("bucket")
    start = time.perf_counter()
    push_folder(folder, "s3://bucket/pairs")
    print(f"align push: {size / 1e6:.0f} MB in {time.perf_counter() - start:.1f} s")


def read(source: str) -> dict[str, float]:
    """Stream the pairs of ``source`` into an Arrow file: rows, seconds, MiB before and at the peak."""
    from align.config import PairsSection
    from align.data.streaming import stream_pairs

    before = peak_memory()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        rows = len(stream_pairs(PairsSection(path=source), Path(scratch) / "pairs.arrow"))
    return {"rows": rows, "seconds": time.perf_counter() - start, "before": before, "peak": peak_memory()}


def peak_memory() -> float:
    """Peak resident memory of this process in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
