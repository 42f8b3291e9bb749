"""Global AUC and OPIS: brute force, invariances, what pair accuracy cannot see."""

from itertools import combinations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from align.data.splits import clusters_of
from align.evaluation.ranking import auc, auc_interval, opis, utilities
from align.stats import excludes, share_interval
from reward_models.margin_metrics import evaluate_margins

REWARDS = st.lists(st.integers(-4, 4), min_size=1, max_size=9)


@given(REWARDS, REWARDS)
def test_auc_counts_pairs(chosen: list[int], rejected: list[int]) -> None:
    counted = np.mean([[1.0 if c > r else 0.5 if c == r else 0.0 for r in rejected] for c in chosen])
    assert auc(chosen, rejected) == pytest.approx(counted)
    assert auc(rejected, chosen) == pytest.approx(1 - counted)


def test_an_offset_per_prompt_lowers_auc_and_leaves_pair_accuracy() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(1, 1, 500), rng.normal(-1, 1, 500)
    offset = rng.normal(0, 5, 500)
    assert ((chosen > rejected) == (chosen + offset > rejected + offset)).all()
    assert auc(chosen, rejected) > 0.9 and auc(chosen + offset, rejected + offset) < 0.65


def test_auc_interval_covers() -> None:
    """The true AUC of two normal scores 1.5 apart, with an offset common to both rewards of a pair."""
    rng = np.random.default_rng(1)
    truth = 0.7792  # Phi(1.5 / sqrt(2 (1 + 0.9))), the standard normal distribution function
    inside = 0
    for _ in range(200):
        common = rng.normal(0, np.sqrt(0.9), 80)
        chosen, rejected = common + rng.normal(1.5, 1, 80), common + rng.normal(0, 1, 80)
        found = auc_interval(chosen, rejected)
        inside += found.low <= truth <= found.high
    assert 182 <= inside <= 198


COMPLETIONS = list(combinations(range(6), 2))


def sampled(prompts: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rewards [2, 15 P] of the chosen and the rejected response, for all pairs of six completions of each prompt.

    The reward model's error is one per response, so pairs that share a response share it.
    """
    gold = rng.normal(size=(prompts, 6))
    reward = 0.5 * gold + rng.normal(size=(prompts, 6))
    first, second = np.array(COMPLETIONS).T
    swapped = gold[:, first] < gold[:, second]
    one, other = reward[:, first], reward[:, second]
    return np.where(swapped, other, one).ravel(), np.where(swapped, one, other).ravel()


def of_prompts(prompts: int) -> Dataset:
    """The pair table of the rewards that ``sampled`` returns."""
    texts = [(f"prompt {k}", f"answer {a}", f"answer {b}") for k in range(prompts) for a, b in COMPLETIONS]
    return Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), zip(*texts, strict=True), strict=True)))


def test_intervals_of_pairs_that_share_prompts_cover() -> None:
    """Intervals over clusters cover at the nominal rate; intervals over pairs, as if independent, do not."""
    rng = np.random.default_rng(5)
    chosen, rejected = sampled(40_000, rng)
    accuracy, area = float((chosen > rejected).mean()), auc(chosen, rejected)
    clusters = clusters_of(of_prompts(60))
    assert len(set(clusters)) == 60
    inside = over_pairs = of_area = 0
    for seed in range(400):
        chosen, rejected = sampled(60, rng)
        found = evaluate_margins(chosen - rejected, clusters=clusters).accuracy
        narrow = share_interval(chosen > rejected)
        inside += found.low <= accuracy <= found.high
        over_pairs += narrow.low <= accuracy <= narrow.high
        assert found.value == narrow.value and found.n == 900
        if seed < 100:
            ranked = auc_interval(chosen, rejected, clusters=clusters)
            of_area += ranked.low <= area <= ranked.high
            assert ranked.n == 900
    assert 360 <= inside <= 396 and 88 <= of_area <= 99
    assert over_pairs < 350


def test_intervals_of_pairs_of_different_prompts_are_those_over_pairs() -> None:
    chosen, rejected = sampled(60, np.random.default_rng(1))
    clusters = clusters_of(Dataset.from_list([row | {"prompt": f"{k}"} for k, row in enumerate(of_prompts(60))]))
    assert evaluate_margins(chosen - rejected, clusters=clusters) == evaluate_margins(chosen - rejected)
    assert auc_interval(chosen, rejected, clusters=clusters) == auc_interval(chosen, rejected)


def test_a_single_prompt_tells_nothing_of_others() -> None:
    chosen, rejected = sampled(60, np.random.default_rng(1))
    found = evaluate_margins(chosen - rejected, clusters=np.zeros(900)).accuracy
    assert (found.low, found.high, found.units) == (None, None, 1) and not excludes(found, 0.5)
    assert auc_interval(chosen, rejected, clusters=np.zeros(900)).low is None


def test_what_belongs_together() -> None:
    """Pairs of a prompt are one cluster; with one prompt in the entire table, pairs that share a response are."""
    rows = [(f"p{k // 2}", f"good {k}", f"bad {k}") for k in range(20)]
    rows += [("Review:", f"film {k}", f"plot {k}") for k in range(30)]
    rows += [("Review:", "film 30", "film 0"), ("Review:", "plot 30", "film 30")]
    table = Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), zip(*rows, strict=True), strict=True)))
    found = clusters_of(table).tolist()
    assert found[:20] == [k // 2 for k in range(20)]
    assert found[20:] == [10, *range(11, 40), 10, 10]


def data(shift: float, seed: int = 0, size: int = 600) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    category = ["code" if k % 3 == 0 else "chat" if k % 3 == 1 else "safety" for k in range(size)]
    moved = np.where(np.array(category) == "code", shift, 0.0)
    return rng.normal(2, 1, size) + moved, rng.normal(0, 1, size) + moved, category


def test_opis_sees_a_category_with_another_level() -> None:
    chosen, rejected, category = data(1.5)
    shifted = opis(chosen, rejected, category, seed=0)
    assert shifted.differs and max(shifted.categories, key=lambda name: shifted.categories[name]) == "code"
    same = opis(*data(0.0), seed=0)
    assert not same.differs and same.value < 0.1 * shifted.value
    before = data(0.0)
    assert ((chosen > rejected) == (before[0] > before[1])).all()  # pair accuracy sees nothing


def test_opis_does_not_change_with_names_or_a_monotone_transform() -> None:
    chosen, rejected, category = data(0.7)
    value = opis(chosen, rejected, category, seed=0, permutations=1).value
    renamed = [f"x{name}" for name in category]
    assert opis(np.exp(chosen), np.exp(rejected), category, seed=0, permutations=1).value == pytest.approx(value)
    assert opis(chosen, rejected, renamed, seed=0, permutations=1).value == pytest.approx(value)
    assert 0 < value <= 0.25


def test_identical_categories_have_no_opis() -> None:
    rng = np.random.default_rng(2)
    chosen, rejected = rng.normal(1, 1, 100), rng.normal(0, 1, 100)
    found = opis(np.tile(chosen, 2), np.tile(rejected, 2), ["a"] * 100 + ["b"] * 100, seed=0, permutations=1)
    assert found.value == 0


def test_utilities_by_counting() -> None:
    rng = np.random.default_rng(3)
    chosen, rejected, which = rng.normal(1, 1, 60), rng.normal(0, 1, 60), rng.integers(0, 2, 60)
    found = utilities(chosen, rejected, which)
    for place, level in ((0, 0.99), (100, 0.90)):
        threshold = np.sort(rejected)[int(np.ceil(level * 60)) - 1]
        for k in (0, 1):
            s = np.mean(chosen[which == k] > threshold)
            t = np.mean(rejected[which == k] <= threshold)
            assert found[k, place] == pytest.approx(2 * s * t / (s + t))


def test_chance_level_holds_its_level() -> None:
    """If categories do not differ, about 5% of the data sets exceed the 95% quantile of the shuffles."""
    exceeded = sum(opis(*data(0.0, seed, 150), seed=seed, permutations=60).differs for seed in range(100))
    assert exceeded <= 12


def test_pairs_of_a_prompt_are_shuffled_together() -> None:
    """Categories that do not differ, prompts that do: over pairs most data sets would exceed the level of chance."""
    over_pairs = over_prompts = 0
    prompts = np.repeat(np.arange(30), 10)
    category = [("code", "chat", "safety")[k % 3] for k in prompts]
    for seed in range(40):
        rng = np.random.default_rng(seed)
        offset = 2 * rng.normal(size=30)[prompts]
        rewards = offset + rng.normal(2, 1, 300), offset + rng.normal(0, 1, 300)
        over_pairs += opis(*rewards, category, seed=seed, permutations=60).differs
        found = opis(*rewards, category, seed=seed, permutations=60, clusters=prompts)
        over_prompts += found.differs
        assert found.units == 30
    assert over_pairs > 20 and over_prompts <= 6


def test_few_prompts_show_no_difference_between_categories() -> None:
    chosen, rejected, category = data(5.0, size=6)
    assert not opis(chosen, rejected, category, seed=0).differs
    both = opis(chosen, rejected, category, seed=0, clusters=[0, 0, 0, 1, 1, 1])
    assert both.units == 6  # a cluster of three categories is one unit in each


def test_the_chance_level_is_the_mean_of_the_shuffles() -> None:
    found = opis(*data(0.0, 1, 150), seed=1, permutations=20)
    assert 0 < found.chance <= found.chance_high


def test_one_category_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two categories"):
        opis([1.0, 2.0], [0.0, 0.0], ["a", "a"], seed=0)
