"""Freed memory is kept on glibc, unless the user has chosen otherwise."""

import platform
import subprocess
import sys

import pytest

from align.io.allocator import OWN_SETTINGS, keep_freed_memory

PROGRAM = """
import resource, sys
import numpy as np
from align.io.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(2):
        np.ones(6_000_000)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, faults[-1])
"""
"""Allocates 48 MB, 12,000 pages, more than glibc keeps by itself, 8 times; prints the page faults of the last 2."""


def page_faults(mode: str) -> tuple[str, int]:
    found = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    kept, faults = found.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_is_allocated_again_is_not_fetched_from_the_kernel_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    kept, faults = page_faults("keep")
    assert kept == "True" and faults < 100
    assert page_faults("leave")[1] > 20 * max(faults, 10)


def test_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert not keep_freed_memory()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
