"""What README says of this program and of trl is so."""

import inspect
import re
from importlib.metadata import version
from pathlib import Path

from trl import DPOConfig, DPOTrainer

import align

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def cells(first: str) -> list[str]:
    """The cells of the row of README that begins with ``first``."""
    (row,) = [line for line in README.splitlines() if line.startswith(f"| {first} ")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_numbers_of_losses() -> None:
    count = len(align.LOSSES)
    assert (
        f"DPO, [MADPO](https://arxiv.org/abs/2510.05342) (margin-adaptive DPO) and [{count - 2} other\nlosses]"
        in README
    )
    types = re.findall(
        r"'([a-z_]+)'", (DPOConfig.__doc__ or "").split("Possible values are:")[1].split("If multiple")[0]
    )
    _, theirs, ours = cells("losses")
    assert theirs.startswith(f"{len(set(types))}, ") and ours.startswith(f"{count}, ")
    assert {"ld_alpha", "f_divergence_type", "use_weighting"} <= set(inspect.signature(DPOConfig).parameters)


def test_the_table_is_about_the_installed_trl() -> None:
    header = next(line for line in README.splitlines() if line.startswith("| | trl "))
    assert header.split("|")[2].strip() == f"trl {version('trl').rsplit('.', 1)[0]}"


def test_trl_has_no_weight_and_no_margin_in_its_loss() -> None:
    code = inspect.getsource(inspect.getmodule(DPOTrainer))  # type: ignore[arg-type]
    assert not re.search(r"""inputs\[["'](weight|margin)["']\]""", code)
    assert cells("a weight per pair (`weight` column)")[1:] == ["no", "yes"]


def test_the_python_of_readme_names_what_there_is() -> None:
    for name in re.findall(r"`(filter_pairs|measure_\w+|compare_\w+|diagnose_\w+|PreferenceTrainer)`", README):
        assert name in align.__all__
