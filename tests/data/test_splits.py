"""Splits that do not leak: labels that are coin flips are not predicted, whatever pairs share."""

import logging
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from align.config import RewardSection
from align.data.splits import clusters_of, draw_clusters, folds_by_prompt, folds_of_clusters, split_by_prompt
from align.data.text import bare
from reward_models import crossfit
from reward_models.crossfit import FOLD, cross_fit
from reward_models.linear_heads import CAUTIOUS, fit_logistic
from reward_models.margin_metrics import evaluate_margins
from tests.helpers.builders import bert_reward, rows

DRAWS = 100
INSTRUCTION = "Which answer is better?"


def table(prompts: list[str], responses: list[tuple[str, str]]) -> Dataset:
    chosen, rejected = zip(*responses, strict=True)
    return Dataset.from_dict({"prompt": prompts, "chosen": list(chosen), "rejected": list(rejected)})


def copies(distinct: int, times: int, prompts: int | None = None) -> tuple[Dataset, np.ndarray]:
    """``times`` copies of each pair under one instruction or ``prompts`` prompts; and the number of its label."""
    of = np.repeat(np.arange(distinct), times)
    names = [INSTRUCTION if prompts is None else f"prompt {k % prompts}" for k in of]
    return table(names, [(f"a {k}", f"b {k}") for k in of]), of


def raters(distinct: int, times: int) -> tuple[Dataset, np.ndarray]:
    """Several raters of one pair, each with a coin of its own."""
    return copies(distinct, times)[0], np.arange(distinct * times)


def one_answer_in_many(count: int) -> tuple[Dataset, np.ndarray]:
    """Four answers to a question in a chain of pairs, all questions under one instruction."""
    pairs = [(f"answer {k}", f"answer {k + 1}") for k in range(count + count // 4) if k % 5 != 4]
    return table([INSTRUCTION] * len(pairs), pairs), np.arange(len(pairs))


def shuffled_copies(distinct: int) -> tuple[Dataset, np.ndarray]:
    """Copies with prompts of their own, which the long responses give away."""
    pairs, of = copies(distinct, 3)
    long = [
        (f"{a} and much more than forty characters of it", b)
        for a, b in zip(pairs["chosen"], pairs["rejected"], strict=True)
    ]
    return table([f"prompt {k}" for k in range(len(of))], long), of


def rewritten_copies(distinct: int) -> tuple[Dataset, np.ndarray]:
    """Copies under one instruction that differ in case, white space and Unicode form."""
    of = np.repeat(np.arange(distinct), 3)
    forms = (str, str.upper, lambda text: unicodedata.normalize("NFD", f"{text} \n"))
    responses = [(forms[n % 3](f"caf\u00e9 {k}"), forms[n % 3](f"b {k}")) for n, k in enumerate(of)]
    return table([INSTRUCTION] * len(of), responses), of


SHARING = {
    "rewritten copies": rewritten_copies(200),
    "copies": copies(200, 3),
    "copies under few prompts": copies(200, 3, prompts=40),
    "copies under other prompts": shuffled_copies(100),
    "raters": raters(100, 3),
    "chains": one_answer_in_many(300),
    "nothing": copies(300, 1, prompts=300),
}


def features_of(pairs: Dataset) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows of the first and of the second response in a table of random features, and the size of that table."""
    first, second = ([bare(text) for text in pairs[name]] for name in ("chosen", "rejected"))
    names = {name: k for k, name in enumerate(dict.fromkeys([*first, *second]))}
    return np.array([names[n] for n in first]), np.array([names[n] for n in second]), len(names)


def differences(first: np.ndarray, second: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random features of the texts, first response minus second, [N, 30]."""
    features = rng.normal(size=(count, 30))
    return features[first] - features[second]


def margins(x: np.ndarray, labels: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Margins [N] of the label's response by a ridge head that was fitted on the other folds."""
    found = np.zeros(len(x))
    for number in np.unique(fold):
        inside = fold == number
        train = x[~inside]
        head = np.linalg.solve(train.T @ train + np.eye(x.shape[1]), train.T @ labels[~inside])
        found[inside] = (x[inside] @ head) * labels[inside]
    return found


@pytest.mark.parametrize("sharing", SHARING)
def test_coin_flips_are_not_predicted_out_of_fold(sharing: str) -> None:
    pairs, of = SHARING[sharing]
    clusters, where = clusters_of(pairs), features_of(pairs)
    inside, values = 0, []
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        labels = rng.choice([-1.0, 1.0], size=of.max() + 1)[of]
        found = margins(differences(*where, rng), labels, folds_of_clusters(clusters, 5, seed))
        accuracy = evaluate_margins(found, clusters=clusters, cross_fitted=True).accuracy
        inside += accuracy.low <= 0.5 <= accuracy.high
        values.append(accuracy.value)
    assert inside >= 93 and abs(np.mean(values) - 0.5) < 0.012


def test_single_pairs_of_copies_would_leak() -> None:
    """The test above has power: folds that divide copies predict coin flips."""
    pairs, of = SHARING["copies"]
    rng = np.random.default_rng(0)
    labels = rng.choice([-1.0, 1.0], size=200)[of]
    x = differences(*features_of(pairs), rng)
    assert (margins(x, labels, rng.permutation(600) % 5) > 0).mean() > 0.58


@pytest.mark.parametrize("sharing", SHARING)
def test_no_cluster_is_on_both_sides(sharing: str) -> None:
    pairs, _ = SHARING[sharing]
    clusters = clusters_of(pairs)
    fold = folds_by_prompt(pairs, 5, 1)
    assert all(len(set(fold[clusters == k])) == 1 for k in set(clusters))
    numbered = pairs.add_column("cluster", clusters.tolist())
    train, held_out = split_by_prompt(numbered, 0.1, 1)
    assert not set(train["cluster"]) & set(held_out["cluster"])
    assert abs(len(held_out) - 0.1 * len(pairs)) <= np.bincount(clusters).max()


@pytest.mark.parametrize("seed", range(5))
def test_large_clusters_are_dealt_out_first(seed: int) -> None:
    """One cluster of six and six of one: two folds of six, whatever the order of the draw."""
    clusters = np.array([0, 1, 2, 3, 4, 5, *[6] * 6])
    assert np.bincount(folds_of_clusters(clusters, 2, seed)).tolist() == [6, 6]


def test_few_large_prompts_stay_together_and_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    pairs = table([f"prompt {k // 20}" for k in range(100)], [(f"a {k}", f"b {k}") for k in range(100)])
    assert np.bincount(folds_by_prompt(pairs, 5, 0)).tolist() == [20] * 5 and not caplog.messages
    with caplog.at_level(logging.WARNING):
        train, held_out = split_by_prompt(pairs, 0.1, 0)
    assert (len(train), len(held_out)) == (80, 20) and len(set(held_out["prompt"])) == 1
    assert "20 of 100 pairs belong together" in caplog.text and "held-out part of equal size has 10" in caplog.text


def test_a_shared_instruction_is_no_prompt() -> None:
    pairs = table([INSTRUCTION] * 60 + [f"p {k // 2}" for k in range(40)], [(f"a {k}", f"b {k}") for k in range(100)])
    assert clusters_of(pairs).tolist() == [*range(60), *(60 + k // 2 for k in range(40))]
    assert clusters_of(table([INSTRUCTION] * 2, [("a", "b"), ("c", "d")])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("count", "fraction", "held"),
    [(100, 0.1, 10), (100, 0.3, 30), (90, 1 / 3, 30), (100, 0.7, 70), (7, 0.01, 1), (50, 0.02, 1), (100, 0.0, 0)],
)
def test_the_share_that_is_held_out(count: int, fraction: float, held: int) -> None:
    """Of pairs that share nothing it is exact; at least one, unless none is asked for; the same for the same seed."""
    pairs, _ = copies(count, 1)
    train, out = split_by_prompt(pairs, fraction, 4)
    assert (len(train), len(out)) == (count - held, held)
    assert sorted([*train["chosen"], *out["chosen"]]) == sorted(pairs["chosen"])
    assert split_by_prompt(pairs, fraction, 4)[1]["chosen"][:] == out["chosen"][:]
    others = {tuple(split_by_prompt(pairs, fraction, seed)[1]["chosen"][:]) for seed in range(6)}
    assert len(others) > 1 or held == 0


def test_of_parts_of_unequal_size_the_nearest_is_held_out() -> None:
    """A prompt of 30 pairs and 20 of 1, a fifth wanted: the part of the large prompt has 30, two others 7, two 6."""
    prompts = ["large"] * 30 + [f"small {k}" for k in range(30)]
    pairs = table(prompts, [(f"a {k}", f"b {k}") for k in range(60)])
    for seed in range(4):
        _, out = split_by_prompt(pairs, 0.2, seed)
        assert len(out) in (7, 8) and "large" not in out["prompt"][:]


def test_a_bootstrap_sample_holds_clusters_complete() -> None:
    pairs, of = copies(30, 4)
    counts = np.bincount(draw_clusters(pairs, 0), minlength=120).reshape(30, 4)
    assert (counts == counts[:, :1]).all() and counts.sum() == 120 and len(set(counts[:, 0])) > 1
    assert len(of) == 120
    assert np.array_equal(draw_clusters(pairs, 0), draw_clusters(pairs, 0))
    bags = [set(draw_clusters(pairs, seed).tolist()) for seed in range(20)]
    assert set.union(*bags) == set(range(120)), "every cluster can be drawn, the first and the last too"
    assert len({frozenset(bag) for bag in bags}) == 20


def test_a_bag_chooses_the_penalty_without_leak() -> None:
    """Coin flips: the strongest penalty is best. Copies of a bag that lie in two folds would choose a weak one."""
    pairs, _ = copies(150, 1)
    rng = np.random.default_rng(3)
    x = differences(*features_of(pairs), rng) * rng.choice([-1.0, 1.0], size=(150, 1))
    bag = draw_clusters(pairs, 3)
    zeros = np.zeros_like(x[bag])
    _, grouped = fit_logistic(x[bag], zeros, folds_by_prompt(pairs.select(bag), 5, 0))
    _, divided = fit_logistic(x[bag], zeros, np.arange(len(bag)) % 5)
    assert grouped >= 1000 and grouped > divided
    assert fit_logistic(x[bag], zeros, np.zeros(len(bag)))[1] == CAUTIOUS


def test_no_model_is_trained_on_the_fold_that_it_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[set[str]] = []
    real = crossfit.train_members

    def recording(train: Dataset, *args: object, **options: object) -> None:
        trained.append(set(train["id"]))
        real(train, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(crossfit, "train_members", recording)
    config = RewardSection(model=str(bert_reward(tmp_path / "m")), max_length=64, folds=2, head="naive-bayes")
    pairs = Dataset.from_list([{"id": str(k), **row} for k, row in enumerate(rows(8))])
    scored = cross_fit(pairs, config, tmp_path / "cv", seed=0)
    for k in range(2):
        assert trained[k] == {name for name, fold in zip(scored["id"], scored[FOLD], strict=True) if fold != k}


TALK = "please explain in some detail how a sailing boat goes against the wind"


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        (("q 1", "a", "b"), ("Q 1 ", "c", "d"), True),
        (("q\u00e9 1", "a", "b"), ("qe\u0301 1", "c", "d"), True),
        (("q 1", "a", "b"), ("q\u200b 1\n", "c", "d"), True),
        (("\uff31 1", "a", "b"), ("q 1", "c", "d"), True),
        (("q 1", "a", "b"), ("q 2", "b", "a"), False),
        (("q 1", TALK, "b"), ("q 2", "c", f" {TALK.upper()}\n"), True),
        (("q 1", "这部电影的故事很感人，演员也非常出色，值得一看。", "b"),
         ("q 2", "这部电影的故事很感人，演员也非常出色，值得一看。", "d"), True),
        (("q 1", "好的，没问题。", "b"), ("q 2", "好的，没问题。", "d"), False),
        (([("system", "be kind"), ("user", TALK)], "a", "b"), ([("user", TALK)], "c", "d"), True),
        (([("system", "x"), ("user", "sum up")], "a", "b"), ([("system", "y"), ("user", "sum up")], "c", "d"), False),
        (([("system", "x"), ("user", "sum up")], TALK, "b"), ([("system", "y"), ("user", "sum up")], TALK, "d"), True),
    ],
)  # fmt: skip
def test_what_connects_two_pairs(one: tuple[Any, ...], other: tuple[Any, ...], together: bool) -> None:
    """Case, white space, Unicode forms and, for a long prompt, the system message make no other text."""

    def row(texts: tuple[Any, ...]) -> dict[str, Any]:
        prompt, *responses = texts
        if isinstance(prompt, str):
            return dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
        turns = [{"role": role, "content": text} for role, text in prompt]
        answers = [[{"role": "assistant", "content": text}] for text in responses]
        return {"prompt": turns, "chosen": answers[0], "rejected": answers[1]}

    others = [row((f"another {k}", f"x {k}", f"y {k}")) for k in range(4)] if isinstance(one[0], str) else []
    clusters = clusters_of(Dataset.from_list([row(one), row(other), *others]))
    assert (clusters[0] == clusters[1]) == together and len(set(clusters)) == len(clusters) - together
