"""Views of a table of responses: pairs, lists and thumbs, each with the counts of what it leaves out. Pure functions.

The same response said several things about (by several raters, or twice) is one response: scores are averaged, votes
added, thumbs counted as votes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from align.data.messages import argument_cells, split_arguments
from align.data.pair_selection import ANY_BAND, Guard, Mode, choose_pairs
from align.data.rater_reliability import Reliability, Vote, rater_reliability
from align.data.response_table import Response, Responses, Votes

View = Literal["best_worst", "all", "adjacent", "band", "votes", "raters", "ties", "lists", "thumbs"]
VIEWS: tuple[View, ...] = get_args(View)
SCORED: tuple[Mode, ...] = ("best_worst", "all", "adjacent", "band")
"""Views that make pairs of scores."""
EQUAL, DIFFERENT = "pairs with equal scores", "pairs with different scores"
EVEN, MAJORITY = "pairs without a majority", "pairs with a majority"
PAIRS: tuple[View, ...] = (*SCORED, "votes", "raters", "ties")
"""Views that make pairs."""


class Viewed(NamedTuple):
    """What a view makes of a table."""

    rows: list[dict[str, Any]]
    left_out: Counter[str]
    """Reason -> number of prompts, responses or pairs (the reason says which)."""
    raters: dict[str, float] = {}  # noqa: RUF012  a NamedTuple's default, never changed
    """``raters``: the reliability of each."""


def merged(prompt: Responses) -> list[Response]:
    """The different responses of a prompt, in the order of their first; what was said about equal ones is combined.

    The score is the mean of the scores; votes are added; the label is that of most labels, None if they are even.
    """
    groups: dict[str, list[Response]] = {}
    for one in prompt.responses:
        groups.setdefault(one.key, []).append(one)
    return [_combined(group) for group in groups.values()]


def _combined(group: Sequence[Response]) -> Response:
    if len(group) == 1:
        return group[0]
    scores = [one.score for one in group if one.score is not None]
    votes = [one.votes for one in group if one.votes is not None]
    up, down = (sum(one.label is kind for one in group) for kind in (True, False))
    return replace(
        group[0],
        score=float(np.mean(scores)) if scores else None,
        votes=Votes(*map(sum, zip(*votes, strict=True))) if votes else None,
        label=None if up == down else up > down,
        rater=group[0].rater if len({one.rater for one in group}) == 1 else None,
    )


def scored_pairs(prompts: Iterable[Responses], mode: Mode, *, band: tuple[float, float] = ANY_BAND) -> Viewed:
    """Pairs of responses with different scores; see ``choose_pairs`` for the modes.

    A pair has ``score_chosen``, ``score_rejected`` and ``teacher_margin``, their difference. Equal scores make no pair.

    Args:
        prompts: of a table.
        mode: which pairs.
        band: least and largest difference of the scores, for ``band``.
    """
    rows, left = [], Counter[str]()
    for prompt in prompts:
        responses = _scored(prompt, left)
        if len(responses) < 2:
            left["prompts with fewer than two scored responses"] += 1
            continue
        scores = [float(one.score or 0.0) for _, one in responses]
        pairs, equal = choose_pairs(scores, mode, Guard(), band=band)
        left[EQUAL] += equal
        left["prompts without a pair in the band"] += mode == "band" and not pairs and not equal
        for best, worst in pairs:
            numbers = {"score_chosen": scores[best], "score_rejected": scores[worst]}
            row = _pair(prompt, responses[best], responses[worst])
            rows.append(row | numbers | {"teacher_margin": scores[best] - scores[worst]})
    return Viewed(rows, +left)


def _scored(prompt: Responses, left: Counter[str]) -> list[tuple[int, Response]]:
    different = merged(prompt)
    left["responses equal to another of their prompt"] += len(prompt.responses) - len(different)
    found = [(k, one) for k, one in enumerate(different) if one.score is not None]
    left["responses without a score"] += len(different) - len(found)
    return found


def voted_pairs(prompts: Iterable[Responses]) -> Viewed:
    """Pairs of the two responses of a prompt that raters voted on, the one that most preferred as chosen.

    A pair has ``votes_chosen``, ``votes_rejected``, ``votes_tie``, and ``vote_share``, of which a tie is half a vote.
    Votes on more than two responses do not say which two were compared: such prompts are left out. So are even votes,
    of which ``tied_pairs`` makes pairs.
    """
    return _of_two(prompts, lambda votes: votes.yes != votes.no, EVEN)


def tied_pairs(prompts: Iterable[Responses]) -> Viewed:
    """Pairs of which neither is better: as many votes for as against it, or, without votes, equal scores.

    ``chosen`` is the response that stands first, which means nothing; ``vote_share`` is 1/2. Equal scores are one vote
    for a tie.
    """
    prompts = list(prompts)
    voted = [prompt for prompt in prompts if any(one.votes is not None for one in prompt.responses)]
    found = _of_two(voted, lambda votes: votes.yes == votes.no, MAJORITY)
    rows, left = list(found.rows), found.left_out
    for prompt in prompts:
        if any(one.votes is not None for one in prompt.responses):
            continue
        for first, second in combinations(_scored(prompt, left), 2):
            if first[1].score == second[1].score:
                rows.append(_pair(prompt, first, second) | _vote_cells(Votes(0, 0, 1)))
            else:
                left[DIFFERENT] += 1
    return Viewed(rows, +left)


def _of_two(prompts: Iterable[Responses], wanted: Callable[[Votes], bool], others: str) -> Viewed:
    rows, left = [], Counter[str]()
    for prompt in prompts:
        found = [(k, one) for k, one in enumerate(merged(prompt)) if one.votes is not None]
        if len(found) != 2:
            left["prompts without votes on exactly two responses"] += 1
            continue
        votes, against = (one.votes for _, one in found)
        assert votes is not None and against is not None
        if against != Votes(votes.no, votes.yes, votes.tie):
            left["prompts whose votes were not between their two responses"] += 1
        elif not wanted(votes):
            left[others] += 1
        else:
            first, second = found if votes.yes >= votes.no else found[::-1]
            rows.append(_pair(prompt, first, second) | _vote_cells(votes if votes.yes >= votes.no else against))
    return Viewed(rows, +left)


def rated_pairs(prompts: Iterable[Responses]) -> Viewed:
    """Pairs of the two responses of a prompt, from the votes of raters who are believed as far as they are reliable.

    ``vote_share`` is the probability that ``chosen`` is the better response (align/data/rater_reliability.py), and
    ``votes_chosen`` and ``votes_rejected`` are the number of votes, shared out by it. Ties say nothing about who is
    right and do not count.

    Raises:
        DataError: the votes do not determine how reliable the raters are.
    """
    left = Counter[str]()
    kept: list[tuple[Responses, list[tuple[int, Response]], int]] = []
    votes: list[Vote] = []
    for prompt in prompts:
        different = list(enumerate(merged(prompt)))
        if len(different) != 2:
            left["prompts without votes on exactly two responses"] += 1
            continue
        first = different[0][1].key
        of_first = [one for one in prompt.responses if one.key == first and one.votes is not None]
        single = [one for one in of_first if one.rater is not None and one.votes and one.votes.total == 1]
        left["votes without a rater, or of several at once"] += len(of_first) - len(single)
        own = [Vote(prompt.id, str(one.rater), one.votes.yes == 1) for one in single if one.votes and not one.votes.tie]
        left["votes for a tie"] += len(single) - len(own)
        left["prompts without a vote of a rater"] += not own
        if own:
            votes += own
            kept.append((prompt, different, len(own)))
    found = rater_reliability(votes) if votes else Reliability({}, {})
    rows = []
    for prompt, (one, other), count in kept:
        share = found.pairs[prompt.id]
        pair = _pair(prompt, one, other) if share >= 0.5 else _pair(prompt, other, one)
        share = max(share, 1 - share)
        cells = {"votes_chosen": count * share, "votes_rejected": count * (1 - share), "votes_tie": 0.0}
        rows.append(pair | cells | {"vote_share": share})
    return Viewed(rows, +left, found.raters)


def _vote_cells(votes: Votes) -> dict[str, float]:
    return {
        "votes_chosen": float(votes.yes),
        "votes_rejected": float(votes.no),
        "votes_tie": float(votes.tie),
        "vote_share": votes.share,
    }


def lists(prompts: Iterable[Responses]) -> Viewed:
    """The scored responses of each prompt, best first; prompts with fewer than two are left out."""
    rows, left = [], Counter[str]()
    for prompt in prompts:
        responses = sorted(_scored(prompt, left), key=lambda one: (-float(one[1].score or 0.0), one[0]))
        if len(responses) < 2:
            left["prompts with fewer than two scored responses"] += 1
            continue
        cells = [
            {"response": one.text, "score": one.score} | ({"policy": one.policy} if one.policy is not None else {})
            for _, one in responses
        ]
        rows.append(_prompt_cells(prompt) | {"responses": cells})
    return Viewed(rows, +left)


def thumbs(prompts: Iterable[Responses], *, threshold: float | None = None) -> Viewed:
    """Each response with its thumb, as trl's KTO trainer reads them: ``prompt``, ``completion``, ``label``.

    A response without a label has that of its score, True from ``threshold`` up; None: it is left out.

    Args:
        prompts: of a table.
        threshold: least score of a thumb up.
    """
    rows, left = [], Counter[str]()
    for prompt in prompts:
        different = merged(prompt)
        left["responses equal to another of their prompt"] += len(prompt.responses) - len(different)
        for k, one in enumerate(different):
            label = one.label
            if label is None and threshold is not None and one.score is not None:
                label = one.score >= threshold
            if label is None:
                left["responses without a thumb"] += 1
                continue
            cells = _prompt_cells(prompt)
            rows.append(cells | {"id": f"{prompt.id}:{k}", "completion": one.text, "label": label})
    return Viewed(rows, +left)


def _prompt_cells(prompt: Responses) -> dict[str, Any]:
    group = {} if prompt.group is None else {"group": prompt.group}
    return {"id": prompt.id, "prompt": split_arguments(prompt.prompt)[0], **argument_cells(prompt.prompt), **group}


def _pair(prompt: Responses, chosen: tuple[int, Response], rejected: tuple[int, Response]) -> dict[str, Any]:
    (best, first), (worst, second) = chosen, rejected
    return {
        **_prompt_cells(prompt),
        "id": f"{prompt.id}:{best}-{worst}",
        "chosen": first.text,
        "rejected": second.text,
        "prompt_id": prompt.id,
        "policy_chosen": first.policy,
        "policy_rejected": second.policy,
        "source": first.source if first.source == second.source else None,
        "rater": first.rater if first.rater == second.rater else None,
    }
