"""The arena of filters: its pools, its subsets, its tables."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from align.io.files import read_json
from align.losses.registry import resolve
from scripts.reproduce import filtering as reproduce_filtering
from scripts.reproduce.exact_arena.pool import (
    ALL,
    ARMS,
    FEW,
    GREEDY,
    JUNK,
    KINDS,
    KNOWN,
    RANDOM,
    REPEATED,
    WIDER,
    Pool,
    PoolCell,
    draw_pool,
)
from scripts.reproduce.exact_arena.pool_report import LONG, MAIN_KEEP, named, soonest, summarize
from scripts.reproduce.exact_arena.training import BATCH, STEPS, Recipe, train
from scripts.reproduce.exact_arena.world import SIZE, Cell, draw_world
from scripts.tables import END, insert


def pool(kind: str, *, flips: float = 0.0, pairs: int = 400, seeds: int = 2, error: str = "none") -> Pool:
    return draw_pool(PoolCell(pairs, flips, kind, error), range(seeds))


def test_sound_pairs_are_the_arena_s() -> None:
    """Labels follow Bradley-Terry from gold margins of standard deviation 2; quality is noise."""
    made, arena = pool("sound", pairs=3000, seeds=4), draw_world(Cell(3000, 0.0, "even", "none"), range(4))
    assert made.world.gold_margin.std() == pytest.approx(arena.gold_margin.std(), rel=0.03)
    assert (made.world.gold_margin > 0).mean() == pytest.approx((arena.gold_margin > 0).mean(), abs=0.02)
    assert np.corrcoef(made.quality.ravel(), made.world.gold_margin.ravel())[0, 1] == pytest.approx(0, abs=0.04)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flips", [0.0, 0.2])
def test_same_responses_whatever_the_flips(kind: str, flips: float) -> None:
    one, other = pool(kind), pool(kind, flips=flips, error="cross-fitted")
    assert np.allclose(one.vectors, other.vectors) and np.array_equal(one.quality, other.quality)
    turned = (one.world.gold_margin != other.world.gold_margin).mean()
    assert turned == pytest.approx(flips, abs=0.06)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_error_has_nothing_to_do_with_gold(kind: str) -> None:
    """Its direction has its own generator: margins are gold's plus something uncorrelated and equally large."""
    world = pool(kind, error="shared", seeds=8).world
    mistake = world.margin - world.gold_margin
    assert np.sqrt(np.mean(mistake**2) / np.mean(world.gold_margin**2)) == pytest.approx(1.0, abs=0.1)
    ways = [np.linalg.lstsq(x, y, rcond=None)[0] for x, y in zip(world.difference, mistake, strict=True)]
    cosines = [
        way @ gold / np.linalg.norm(way) / np.linalg.norm(gold) for way, gold in zip(ways, world.gold, strict=True)
    ]
    assert np.abs(cosines).max() < 0.75 and abs(np.mean(cosines)) < 0.3


def test_junk_is_wide_labeled_by_coin_and_of_low_quality() -> None:
    """A mixture: the variance, the mean quality and the share of right labels are those of its two parts."""
    junk, sound = pool("junk", pairs=3000, seeds=4), pool("sound", pairs=3000, seeds=4)
    assert junk.world.features.var() == pytest.approx(1 + JUNK * (WIDER**2 - 1), rel=0.02)
    assert junk.quality.mean() == pytest.approx(-JUNK * KNOWN, abs=0.05)
    right = (sound.world.gold_margin > 0).mean()
    assert (junk.world.gold_margin > 0).mean() == pytest.approx((1 - JUNK) * right + JUNK * 0.5, abs=0.015)
    low = junk.quality < -3.0
    assert (junk.world.gold_margin[low] > 0).mean() < right - 0.15


def test_repeated_prompts_have_near_neighbors() -> None:
    made = pool("repeated", pairs=1600)
    near = made.diversity < np.median(pool("sound", pairs=1600).diversity) - 0.5
    assert near.mean() == pytest.approx(REPEATED, abs=0.04)
    groups = np.unique(np.round(made.vectors[0][near[0]] @ made.vectors[0][near[0]].T > 0.9, 0), axis=0)
    assert len(groups) == pytest.approx(FEW, abs=4)


def test_subsets() -> None:
    """Each arm's rows are those that a sort gives; features and margins follow them."""
    made = pool("junk", error="cross-fitted")
    by = {"margin": made.world.margin[1], "quality": made.quality[1], "diversity": made.diversity[1]}
    for arm, values in by.items():
        assert set(made.rows(1, arm, 50)) == set(np.argsort(-values)[:50])
    assert not np.array_equal(made.rows(0, RANDOM, 50), made.rows(1, RANDOM, 50))
    for arm in ("filtered", GREEDY):
        rows = made.rows(1, arm, 50)
        assert len(set(rows)) == 50 and made.world.margin[1][rows].mean() > made.world.margin[1].mean()
        kept = made.subset(arm, 50)
        assert np.array_equal(kept.features[1], made.world.features[1][rows])
        assert np.array_equal(kept.margin[1], made.world.margin[1][rows])
    spread = {arm: made.vectors[1][made.rows(1, arm, 50)] for arm in ("filtered", GREEDY)}
    closest = {arm: np.sort(one @ one.T, axis=1)[:, -2].mean() for arm, one in spread.items()}
    assert closest[GREEDY] < closest["filtered"]


def test_fewer_steps_are_another_training() -> None:
    """The schedule ends with the steps, and the default is the arena's own."""
    world, recipes = pool("sound", pairs=100).world, [Recipe(resolve("dpo", {"beta": 0.3}))]
    whole, again, short = (train(world, recipes, seed=0, **more) for more in ({}, {"steps": STEPS}, {"steps": 5}))
    assert np.array_equal(whole, again) and whole.shape == (2, SIZE, 1)
    assert np.linalg.norm(short, axis=1).max() < np.linalg.norm(whole, axis=1).min()
    assert BATCH == 32


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(reproduce_filtering, "STEPS", (2, 4))
    monkeypatch.setattr(reproduce_filtering, "LONG_STEPS", (6,))
    monkeypatch.setattr(reproduce_filtering, "VALIDATION", range(100_000, 100_002))
    monkeypatch.setattr(reproduce_filtering, "cells", lambda pairs: [PoolCell(pairs, 0.2, "sound", "cross-fitted")])
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- tables of scripts/reproduce/filtering.py -->\nstale\n{END}\nafter\n")
    options = ["--output", str(tmp_path / "made"), "--pairs", "100", "--seeds", "3", "--document", str(page)]
    monkeypatch.setattr(sys, "argv", ["reproduce_filtering.py", *options])
    reproduce_filtering.main()
    printed = capsys.readouterr().out
    assert printed.strip() in page.read_text() and "stale" not in page.read_text()
    longer, cell = [read_json(file) for file in sorted((tmp_path / "made").glob("1*.json"))]
    assert set(longer["found"]) == set(LONG) and all("6" in one for one in longer["found"].values())
    shown = read_json(tmp_path / "made" / "arena_filtering.json")["rows"][0]["longer"]["6"]
    for name, one in shown.items():
        less = np.subtract(longer["found"][name]["6"]["reward"], longer["found"][ALL]["6"]["reward"])
        assert one["less_all"][0] == pytest.approx(less.mean(), abs=1e-4)
    (row,) = summarize([cell], (2, 4))
    trained = row["trainings"]
    for arm in ARMS:
        found = trained[named(arm, MAIN_KEEP)]["4"]
        less = np.subtract(
            cell["found"][named(arm, MAIN_KEEP)]["4"]["reward"], cell["found"][named(RANDOM, MAIN_KEEP)]["4"]["reward"]
        )
        assert found["less_random"][0] == pytest.approx(less.mean(), abs=1e-4)
        assert len(cell["found"][named(arm, MAIN_KEEP)]["4"]["reward"]) == 3
    assert list(trained[ALL]["4"]["less_all"]) == [0, 0, 0]
    assert soonest(trained[ALL], (2, 4)) in ("2", "4")
    assert soonest({"2": {"less_all": [-1]}, "4": {"less_all": [-0.1]}}, (2, 4)) == "-"
    before = (tmp_path / "made" / "arena_filtering.json").read_text()
    monkeypatch.setattr(reproduce_filtering, "run_cell", lambda *_: pytest.fail("a cell that is there was made again"))
    reproduce_filtering.main()
    assert json.loads(before) == read_json(tmp_path / "made" / "arena_filtering.json")


def test_the_page_shows_the_committed_numbers() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "results.md").read_text(encoding="utf-8")
    numbers = read_json(root / "studies" / "arena_filtering.json")
    tables = reproduce_filtering.markdown(numbers["rows"], reproduce_filtering.STEPS, reproduce_filtering.LONG_STEPS)
    assert insert(page, tables, reproduce_filtering.MARK) == page and "sound, 0% flipped" in page
