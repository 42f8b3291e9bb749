"""The arena against slow truths: its worlds, its trainer, its judge and its tables."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit

from align.io.files import read_json
from align.losses.pairwise import PairLogps
from align.losses.registry import LOSSES, resolve
from scripts.reproduce import arena as reproduce_arena
from scripts.reproduce.exact_arena.gold import (
    RESPONSES,
    SIZE,
    draw_gold,
    draw_prompts,
    gained,
    gold_reward,
    reward_and_kl,
)
from scripts.reproduce.exact_arena.heads import fit_head, out_of_fold_margins
from scripts.reproduce.exact_arena.methods import BETAS, CANDIDATES, METHODS, UNTUNED
from scripts.reproduce.exact_arena.report import markdown, summarize
from scripts.reproduce.exact_arena.training import Recipe, train
from scripts.reproduce.exact_arena.world import (
    ERRORS,
    RIDGE,
    Cell,
    World,
    draw_pairs,
    draw_world,
    memorized_margins,
    reward_model,
)
from scripts.tables import insert

DPO = Recipe(resolve("dpo", {}))


def world(error: str = "none", *, pairs: int = 100, flips: float = 0.0, seeds: int = 3) -> World:
    return draw_world(Cell(pairs, flips, "even", error), range(seeds))


@pytest.mark.parametrize("flips", [0.0, 0.2, 0.4])
def test_labels_follow_bradley_terry_and_flips(flips: float) -> None:
    drawn = draw_world(Cell(2000, flips, "even", "none"), range(10))
    size = np.abs(drawn.gold_margin)
    expected = ((1 - flips) * expit(size) + flips * expit(-size)).mean()
    assert (drawn.gold_margin > 0).mean() == pytest.approx(expected, abs=0.012)
    assert np.sqrt(np.square(drawn.gold_margin).mean()) == pytest.approx(2.0, abs=0.05)


def test_cells_share_prompts_and_differ_in_what_they_name() -> None:
    """The same responses whatever the flips, errors and spread; pairs are closer, or further apart, as asked."""
    responses = {}
    gaps = {}
    for spread in ("few easy", "even", "many easy"):
        drawn = draw_world(Cell(300, 0.2, spread, "none"), range(2))
        responses[spread] = np.sort(drawn.features[..., 0], axis=2)
        gaps[spread] = np.abs(drawn.gold_margin).mean()
    assert np.array_equal(responses["even"], responses["few easy"])
    assert np.array_equal(responses["even"], responses["many easy"])
    assert gaps["few easy"] < 0.7 * gaps["even"] < 0.7 * 0.7 * gaps["many easy"]


@pytest.mark.parametrize("error", ERRORS)
def test_margin_is_of_the_preferred_response_minus_the_other(error: str) -> None:
    """Gold margins match the features, and the reward model errs in the way that its name says."""
    drawn = world(error, pairs=1600)
    assert np.allclose(np.einsum("snd,sd->sn", drawn.difference, drawn.gold), drawn.gold_margin)
    mistake = drawn.margin - drawn.gold_margin
    explained = 1 - _residual(drawn.difference, mistake) / np.maximum(np.square(mistake).mean(axis=1), 1e-12)
    agrees = (drawn.margin > 0).mean()
    if error == "none":
        assert np.array_equal(mistake, np.zeros_like(mistake))
    if error == "independent":
        assert mistake.std() == pytest.approx(2.0, abs=0.1) and (explained < 0.05).all()
    if error == "shared":
        assert mistake.std() == pytest.approx(2.0, abs=0.15) and (explained > 0.999).all()
    if error == "out-of-domain":
        assert (mistake == 0).mean() == pytest.approx(0.5, abs=0.03)
    if error == "in-sample":
        assert agrees > 0.9
    if error == "cross-fitted":
        assert agrees < 0.85


@pytest.mark.parametrize("flips", [0.0, 0.4])
def test_pairs_of_two_responses(flips: float) -> None:
    """The same Bradley-Terry labels as in the arena's cells; a number after the error is its standard deviation."""
    for error, size in (("independent 0.5", 0.5), ("independent 4", 4.0), ("shared 4", 4.0), ("none", 0.0)):
        drawn = [draw_pairs(4000, flips, error, np.random.default_rng(seed)) for seed in range(5)]
        gold = np.concatenate([one.gold_margin[0] for one in drawn])
        expected = ((1 - flips) * expit(np.abs(gold)) + flips * expit(-np.abs(gold))).mean()
        assert (gold > 0).mean() == pytest.approx(expected, abs=0.012)
        mistake = np.concatenate([one.margin[0] - one.gold_margin[0] for one in drawn])
        assert mistake.std() == pytest.approx(size, rel=0.05)


def test_out_of_fold_margins_do_not_know_their_own_label() -> None:
    """Swapping one pair flips the sign of its margin exactly; most margins have the sign of the gold margin."""
    drawn = draw_pairs(400, 0.0, "none", np.random.default_rng(0))
    x = drawn.difference[0]
    margin = out_of_fold_margins(x, np.random.default_rng(1))
    for row in (0, 7):
        turned = x.copy()
        turned[row] *= -1
        assert out_of_fold_margins(turned, np.random.default_rng(1))[row] == -margin[row]
    assert np.mean(margin * drawn.gold_margin[0] > 0) > 0.75
    head = fit_head(x, np.random.default_rng(2))
    assert head @ drawn.gold[0] / np.linalg.norm(head) / np.linalg.norm(drawn.gold[0]) > 0.9
    few, many = (draw_pairs(1600, 0.0, f"out-of-fold {k}", np.random.default_rng(3)) for k in (5, 20))
    assert np.corrcoef(few.margin, few.gold_margin)[0, 1] < 0.8 < np.corrcoef(many.margin, many.gold_margin)[0, 1]


def _residual(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean square of y [S, N] that no linear function of x [S, N, D] explains."""
    fits = [one - a @ np.linalg.lstsq(a, one, rcond=None)[0] for a, one in zip(x, y, strict=True)]
    return np.square(fits).mean(axis=1)


def test_reward_model_with_memory_against_joint_minimization() -> None:
    """theta and the remembered b_i of the penalized likelihood, all found together by a general optimizer."""
    x, memory = world(pairs=40, seeds=1).difference, 3.0

    def joint(both: np.ndarray) -> float:
        theta, b = both[:SIZE], both[SIZE:]
        loss = np.logaddexp(0, -(x[0] @ theta + b)).sum() + np.square(b).sum() / (2 * memory)
        return float(loss + RIDGE * np.square(theta).sum() / 2)

    slow = minimize(joint, np.zeros(SIZE + 40), method="BFGS", options={"gtol": 1e-7}).x
    assert np.allclose(reward_model(x, memory)[0], slow[:SIZE], atol=1e-4)
    assert np.allclose(memorized_margins(x, memory)[0], x[0] @ slow[:SIZE] + slow[SIZE:], atol=1e-4)


def test_gold_reward_is_at_the_kl_that_was_asked_for() -> None:
    rng = np.random.default_rng(0)
    gold = draw_gold(rng)
    theta = np.stack([gold, gold + rng.normal(size=SIZE), -gold], axis=1)
    found = gold_reward(theta, gold, np.random.default_rng(1), (0.3, 1.0))
    x, reward = draw_prompts(gold, np.random.default_rng(1))
    for k, kl in enumerate((0.3, 1.0)):
        for policy in range(3):
            scales = np.geomspace(0.01, 100, 4001)[:, None] * theta[:, policy]
            rewards, kls = reward_and_kl(scales.T, gold, np.random.default_rng(1))
            assert found[k, policy] == pytest.approx(np.interp(kl, kls, rewards), abs=2e-3)
    assert (found[:, 0] > found[:, 1]).all() and (found[:, 1] > found[:, 2]).all() and (found[:, 2] < 0).all()
    even = np.full((RESPONSES, x.shape[1], 1), 1 / RESPONSES)
    assert gained(even, reward) == pytest.approx(0.0)


TRAINED = [name for name, spec in LOSSES.items() if spec.from_logps or name == "beta_dpo"]


@pytest.mark.parametrize("name", sorted(set(TRAINED) - {"discopop"}))
def test_every_registered_loss_trains(name: str) -> None:
    drawn = world(pairs=400)
    theta = train(drawn, [Recipe(resolve(name, {}))], seed=0)
    reward = [gold_reward(t, g, np.random.default_rng(5), (0.5,))[0, 0] for t, g in zip(theta, drawn.gold, strict=True)]
    assert np.mean(reward) > 0.8


def test_policies_and_seeds_are_trained_apart() -> None:
    """Other policies in the same call change nothing, except beta-DPO's draws."""
    drawn, recipes = world("independent"), [Recipe(resolve(name, {})) for name in ("dpo", "madpo", "mmpo", "ipo")]
    together = train(drawn, recipes, seed=0)
    for k, recipe in enumerate(recipes):
        assert np.allclose(train(drawn, [recipe], seed=0)[..., 0], together[..., k])
    one = World(drawn.features[1:2], drawn.margin[1:2], drawn.gold_margin[1:2], drawn.gold[1:2])
    assert np.allclose(train(one, recipes, seed=0)[0], together[1])


def test_special_cases_of_the_controls() -> None:
    """Relabelling changes nothing where margins agree, is MMPO with a large gamma; MADPO of margins 0 is DPO."""
    drawn = world("independent")
    agreeing = World(drawn.features, np.abs(drawn.margin), drawn.gold_margin, drawn.gold)
    relabelled = Recipe(resolve("dpo", {}), "relabelled")
    assert np.array_equal(*(train(agreeing, [recipe], seed=0) for recipe in (DPO, relabelled)))
    hard = Recipe(resolve("mmpo", {"gamma": 1e6}))
    assert np.allclose(*(train(drawn, [recipe], seed=0) for recipe in (hard, relabelled)))
    nothing = World(drawn.features, np.zeros_like(drawn.margin), drawn.gold_margin, drawn.gold)
    assert np.allclose(*(train(nothing, [recipe], seed=0) for recipe in (DPO, Recipe(resolve("madpo", {})))))
    redrawn = Recipe(resolve("dpo", {}), "redrawn")
    turned = World(drawn.features, 50.0 * np.sign(drawn.margin), drawn.gold_margin, drawn.gold)
    assert np.allclose(*(train(turned, [recipe], seed=0) for recipe in (redrawn, relabelled)))


def test_halves_of_the_weight() -> None:
    """Dampening alone is DPO within tau and MADPO beyond it; amplifying alone the other way round."""
    drawn = world("independent")
    madpo = resolve("madpo", {"tau": 2.0})
    inside, beyond = np.clip(drawn.margin, -1.9, 1.9), np.where(drawn.margin > 0, 2.0, -2.0) + drawn.margin
    for margin, as_dpo, as_madpo in ((inside, "dampen", "amplify"), (beyond, "amplify", "dampen")):
        here = World(drawn.features, margin, drawn.gold_margin, drawn.gold)
        dpo, full = train(here, [DPO], seed=0), train(here, [Recipe(madpo)], seed=0)
        assert np.allclose(train(here, [Recipe(madpo, part=as_dpo)], seed=0), dpo)
        assert np.allclose(train(here, [Recipe(madpo, part=as_madpo)], seed=0), full)
        assert not np.allclose(dpo, full)


def test_first_step_is_of_the_losses_gradient() -> None:
    """With beta so small that nothing saturates, all of DPO's steps point along the mean feature difference."""
    drawn = world(pairs=32, seeds=1)
    theta = train(drawn, [Recipe(resolve("dpo", {"beta": 1e-6}))], seed=0)[0, :, 0]
    mean = drawn.difference[0].mean(axis=0)
    assert theta @ mean / np.linalg.norm(theta) / np.linalg.norm(mean) == pytest.approx(1.0)
    torch_loss = resolve("dpo", {})(PairLogps(*(torch.zeros(1, dtype=torch.float64) for _ in range(6))))
    assert float(torch_loss) == pytest.approx(np.log(2))


@pytest.mark.parametrize("best", range(len(BETAS)))
def test_tuning_budgets_and_ranges_are_equal(best: int) -> None:
    """Every method has equally many distinct candidates, the same betas first, none outside their range after."""
    for name, method in METHODS.items():
        first, then = method.first(), method.then(best)
        assert tuple(recipe.loss.beta for recipe in first) == BETAS and len(first) + len(then) == CANDIDATES
        distinct = {(recipe.labels, recipe.part, *recipe.loss.parameters.items()) for recipe in [*first, *then]}
        assert len(distinct) == CANDIDATES, name
        betas = {recipe.loss.beta for recipe in then}
        if method.others:
            assert betas == {BETAS[best]}
        else:
            near = BETAS[max(best - 1, 0) : best + 2]
            assert min(near) < min(betas) and max(betas) < max(near)


def test_what_is_tried_first_is_the_published_setting() -> None:
    published = METHODS["madpo, published"].first()
    for name in ("madpo, tuned", "madpo, amplify only", "madpo, dampen only"):
        first = METHODS[name].first()
        assert [recipe.loss.parameters for recipe in first] == [recipe.loss.parameters for recipe in published]
    assert {recipe.loss.beta for recipe in UNTUNED.values()} == {0.1}


def test_policies_without_a_reward_model_are_those_of_every_error(tmp_path: Path) -> None:
    where, recipes = Cell(100, 0.2, "even", "independent"), [*UNTUNED.values()]
    found = reproduce_arena.policies(where, draw_world(where, range(4)), recipes, range(4), tmp_path)
    for k, recipe in enumerate(recipes):
        if not recipe.loss.spec.coupled:
            assert np.allclose(found[..., k], train(draw_world(where, range(4)), [recipe], seed=0)[..., 0])


def test_the_candidate_chosen_is_the_best_on_validation_seeds(tmp_path: Path) -> None:
    where, seeds = Cell(100, 0.2, "even", "independent"), range(50, 53)
    chosen = reproduce_arena.choose(where, tmp_path, seeds)
    best, values = chosen["madpo, tuned"]
    drawn = draw_world(where, seeds)
    tried = METHODS["madpo, tuned"].first()
    tried += METHODS["madpo, tuned"].then(int(np.argmax(values[: len(tried)])))
    slow = []
    for recipe in tried:
        theta = train(drawn, [recipe], seed=50)
        prompts = [reproduce_arena.prompts_of(seed) for seed in seeds]
        found = [gold_reward(*one, (0.5,)) for one in zip(theta, drawn.gold, prompts, strict=True)]
        slow.append(np.mean(found))
    assert np.allclose(slow, values) and best == tried[int(np.argmax(slow))] and set(chosen) == set(METHODS)


def cell(error: str, rewards: dict[str, list[float]]) -> dict[str, object]:
    found = {name: {"equal": [[value] for value in values]} for name, values in rewards.items()}
    untuned = {"untuned dpo": {"equal": [[0.1], [0.3]], "reward": [1.0, 2.0], "kl": [0.5, 0.7]}}
    return {
        "cell": Cell(400, 0.2, "even", error).to_dict(),
        "seeds": 2,
        "kls": [0.5],
        "chosen": {},
        "found": {**found, **untuned},
        "seconds": 1.0,
    }


def test_differences_are_paired() -> None:
    """MADPO is 0.1 better on each seed of very different seeds: an interval of no width, in bold, one cell ahead."""
    names = [name for name in METHODS if name != "madpo, tuned"]
    rewards = {name: [0.0, 5.0] for name in names} | {"madpo, tuned": [0.1, 5.1]}
    row = summarize([cell("none", rewards)])["rows"][0]
    assert row["difference"]["0.5"]["dpo"] == 2.5
    assert row["difference"]["0.5"]["madpo, tuned"] == (0.1, 0.1, 0.1)
    assert row["over"]["mmpo"] == (0.1, 0.1, 0.1)
    assert row["untuned"]["dpo"] == {"reward": 1.5, "kl": 0.6, "equal": 0.2}


def test_one_command_makes_cells_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cells of two seeds: JSON per cell, tables, plots; an existing cell is not computed again."""
    picked = [Cell(100, 0.0, "even", "none"), Cell(400, 0.2, "even", "in-sample")]
    monkeypatch.setattr(reproduce_arena, "cells", lambda: picked)
    chosen = {name: (method.first()[0], np.zeros(CANDIDATES)) for name, method in METHODS.items()}
    monkeypatch.setattr(reproduce_arena, "choose", lambda *_: chosen)
    monkeypatch.setattr(sys, "argv", ["reproduce_arena", "--output", str(tmp_path), "--seeds", "2"])
    reproduce_arena.main()
    files = [reproduce_arena.cell_file(tmp_path, one) for one in picked]
    before = [file.read_bytes() for file in files]
    files[1].unlink()
    stamp = files[0].stat().st_mtime_ns
    reproduce_arena.main()
    assert files[0].stat().st_mtime_ns == stamp
    assert json.loads(before[1])["found"] == read_json(files[1])["found"]
    monkeypatch.setattr(sys, "argv", ["reproduce_arena", "--output", str(tmp_path), "--seeds", "1"])
    reproduce_arena.main()
    assert read_json(files[0])["seeds"] == 1
    table = read_json(tmp_path / "table.json")
    assert len(table["rows"]) == 2 and markdown(table) == markdown(read_json(tmp_path / "arena.json"))
    assert (tmp_path / "flips.svg").read_text().startswith("<?xml")


def test_tables_of_the_page_are_those_of_the_kept_numbers() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "results.md").read_text(encoding="utf-8")
    numbers = read_json(root / "studies" / "arena.json")
    assert insert(page, markdown(numbers), reproduce_arena.MARK) == page and "| none, 0% flipped |" in page
    assert numbers["seeds"] == [200]
