"""Files and folders appear under their names as a whole or not at all."""

from pathlib import Path

import numpy as np
import pytest

from align.io.array_cache import cached_array
from align.io.files import atomic_folder, atomic_write, read_json, write_json


def test_a_file_has_its_name_only_after_the_body(tmp_path: Path) -> None:
    file = tmp_path / "table.parquet"
    with atomic_write(file) as temporary:
        temporary.write_bytes(b"rows")
        assert not file.exists() and temporary == tmp_path / "table.parquet.tmp"
    assert file.read_bytes() == b"rows" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_body_that_raises_leaves_the_earlier_file(tmp_path: Path, error: type[BaseException]) -> None:
    file = tmp_path / "summary.json"
    write_json(file, {"kept": 3})
    with pytest.raises(error), atomic_write(file) as temporary:
        temporary.write_text("{")
        raise error
    assert read_json(file) == {"kept": 3} and list(tmp_path.iterdir()) == [file]


def test_a_file_that_the_body_did_not_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "never"):
        pass


def test_a_folder_starts_empty_after_a_kill(tmp_path: Path) -> None:
    (tmp_path / "model.tmp").mkdir()
    (tmp_path / "model.tmp" / "half").touch()
    with atomic_folder(tmp_path / "model") as temporary:
        assert list(temporary.iterdir()) == []
        (temporary / "weights").write_bytes(b"1")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/weights"]
    with pytest.raises(ValueError, match="half"), atomic_folder(tmp_path / "other") as temporary:
        raise ValueError("half")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_cached_array_is_made_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def make() -> np.ndarray:
        calls.append(1)
        return np.arange(3.0)

    file = tmp_path / "new" / "values.npy"
    first, second = cached_array(file, make), cached_array(file, make)
    assert first.tolist() == second.tolist() == [0, 1, 2] and len(calls) == 1
    assert [path.name for path in file.parent.iterdir()] == ["values.npy"]
