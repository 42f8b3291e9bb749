"""How the C library keeps memory that a training frees."""

import ctypes
import os
import platform

MMAP_MAX, TRIM_THRESHOLD = -4, -1
"""Parameters of glibc's mallopt (malloc.h)."""
NEVER = 2**31 - 1
OWN_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")
"""Variables by which a user has chosen how memory is kept."""


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that this process frees, for its next allocations; return whether it does.

    By default each large tensor is a mapping of its own, which the kernel fills with zeros page by page and takes back.
    A training on a CPU allocates the same tensors in every step. Nothing is changed with another C library, or where
    one of the variables ``OWN_SETTINGS`` is set.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in OWN_SETTINGS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, NEVER))
