"""Cache arrays in files, so that a resumed run does not compute them again."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from align.io.files import atomic_write


def cached_array(file: Path | None, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in ``file``; if the file does not exist, make and write the array first, never as a pickle.

    Args:
        file: a ``.npy`` file, whose folder is created if it does not exist; None: no cache.
        make: computes the array; called only if the file does not exist.
    """
    if file is not None and file.exists():
        found: np.ndarray = np.load(file, allow_pickle=False)
        return found
    made = make()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, made, allow_pickle=False)
    return made


def cached_arrays(file: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Like ``cached_array`` for several arrays by name, in one ``.safetensors`` file."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary:
            save_file(make(), temporary)
    return load_file(file)
