"""Arrays that are made once and kept in a file, so that a stopped run need not make them again."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from align.io.files import atomic_write


def cached_array(file: Path | None, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in ``file``, made and written there first where it is not; never half a file, never a pickle.

    Args:
        file: a ``.npy`` file whose folder may have to be made; None: nothing is kept.
        make: gives the array; called only where there is no file.
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


def kept_arrays(file: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Several arrays in one ``.safetensors`` file, as ``cached_array`` keeps one."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary:
            save_file(make(), temporary)
    return load_file(file)
