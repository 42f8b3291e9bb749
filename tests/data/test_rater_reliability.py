"""Reliabilities of raters are found where the votes determine them, and refused by name where they do not."""

import numpy as np
import pytest

from align.data.rater_reliability import Vote, rater_reliability
from align.data.response_table import Response, Responses, Votes
from align.data.response_views import rated_pairs
from align.errors import DataError

PLANTED = {"a": 0.95, "b": 0.85, "c": 0.7, "d": 0.55, "e": 0.3}


def drawn(pairs: int, planted: dict[str, float], each: int, seed: int = 0) -> tuple[list[Vote], np.ndarray]:
    """Votes of ``each`` raters on every pair, and which pairs have the better response first."""
    rng = np.random.default_rng(seed)
    truth = rng.random(pairs) < 0.5
    votes = []
    for k in range(pairs):
        for name in rng.permutation(list(planted))[:each]:
            votes.append(Vote(str(k), str(name), bool(truth[k] == (rng.random() < planted[str(name)]))))
    return votes, truth


@pytest.mark.parametrize("each", [3, 5])
def test_planted_reliabilities_are_found(each: int) -> None:
    """Also of a rater who is wrong more often than right."""
    votes, truth = drawn(3000, PLANTED, each)
    found = rater_reliability(votes)
    assert found.raters == pytest.approx(PLANTED, abs=0.03)
    better = np.array([found.pairs[str(k)] > 0.5 for k in range(len(truth))])
    counts = np.zeros(len(truth))
    for vote in votes:
        counts[int(vote.pair)] += 1 if vote.first else -1
    assert (better == truth).mean() > ((counts > 0) == truth).mean() + 0.03, "better than the majority"
    confident = np.array([max(found.pairs[str(k)], 1 - found.pairs[str(k)]) for k in range(len(truth))])
    assert confident.mean() == pytest.approx((better == truth).mean(), abs=0.02), "calibrated"


def test_the_names_of_the_responses_do_not_matter() -> None:
    votes, _ = drawn(200, PLANTED, 3)
    found, turned = rater_reliability(votes), rater_reliability([vote._replace(first=not vote.first) for vote in votes])
    assert turned.raters == pytest.approx(found.raters, abs=1e-6)
    assert all(turned.pairs[key] == pytest.approx(1 - share, abs=1e-6) for key, share in found.pairs.items())


@pytest.mark.parametrize(
    ("groups", "undetermined"),
    [(["ab"], "a|b"), (["a"], "a"), (["ab", "bc", "cd", "da"], "a|b|c|d"), (["abc", "de"], "d|e")],
)
def test_what_the_votes_do_not_determine_is_refused(groups: list[str], undetermined: str) -> None:
    votes = [Vote(f"{group}{k}", rater, k % 2 == 0) for group in groups for k in range(4) for rater in group]
    with pytest.raises(DataError, match=f"found {len(undetermined.split('|'))} of ") as caught:
        rater_reliability(votes)
    assert caught.value.code == "raters"
    assert caught.value.message.splitlines()[1:] == [f"  {name}" for name in undetermined.split("|")]


@pytest.mark.parametrize("groups", [["abc"], ["ab", "bc", "ca"], ["abc", "cd"], ["ab", "bc", "cd", "de", "ea"]])
def test_an_odd_cycle_determines_them(groups: list[str]) -> None:
    votes = [Vote(f"{group}{k}", rater, True) for group in groups for k in range(30) for rater in group]
    found = rater_reliability(votes)
    assert all(value > 0.9 for value in (*found.raters.values(), *found.pairs.values()))


def test_two_votes_of_a_rater_on_a_pair_are_refused() -> None:
    votes = [Vote("p", rater, True) for rater in "abca"]
    with pytest.raises(DataError, match="rater 'a': found two votes on pair p, expected one"):
        rater_reliability(votes)


def test_pairs_of_reliable_raters() -> None:
    """The majority of two bad raters does not outvote a good one; ties and votes without a name are counted."""
    votes, _ = drawn(2000, {"a": 0.97, "b": 0.65, "c": 0.65}, 3)
    prompts = {}
    for vote in votes:
        one = Votes(1, 0, 0) if vote.first else Votes(0, 1, 0)
        both = [
            Response("x", votes=one, rater=vote.rater),
            Response("y", votes=Votes(one.no, one.yes), rater=vote.rater),
        ]
        prompts.setdefault(vote.pair, []).extend(both)
    table = [Responses(key, "q", None, tuple(responses)) for key, responses in prompts.items()]
    extra = (Response("x", votes=Votes(0, 0, 1), rater="a"), Response("y"), Response("x", votes=Votes(2, 0, 0)))
    found = rated_pairs([*table, Responses("t", "q", None, extra)])
    assert found.raters["a"] > 0.9 > 0.7 > max(found.raters["b"], found.raters["c"])
    assert found.left_out == {
        "votes for a tie": 1, "votes without a rater, or of several at once": 1, "prompts without a vote of a rater": 1,
    }  # fmt: skip
    by_a = {vote.pair: vote.first for vote in votes if vote.rater == "a"}
    assert all((row["chosen"] == "x") == by_a[row["prompt_id"]] for row in found.rows)
    assert all(row["votes_chosen"] + row["votes_rejected"] == pytest.approx(3) for row in found.rows)
    assert all(row["votes_chosen"] > row["votes_rejected"] for row in found.rows)
