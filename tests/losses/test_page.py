"""docs/losses.md is what the registry says."""

from pathlib import Path

from align.losses.page import GROUPS, needs, render
from align.losses.registry import LOSSES

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run python -m align.losses.page > docs/losses.md"


def test_every_loss_stands_on_it_once_with_what_it_needs() -> None:
    shown = [spec.name for _, specs in GROUPS for spec in specs]
    assert sorted(shown) == sorted(LOSSES)
    found = {name: needs(LOSSES[name]) for name in ("nll", "dpo", "madpo", "aot", "amapo", "wpo", "sampo")}
    assert found == {
        "nll": "nothing", "dpo": "reference", "madpo": "margin, reference", "aot": "reference, all pairs of the step",
        "amapo": "all pairs of the step", "wpo": "reference", "sampo": "reference's tokens",
    }  # fmt: skip
