"""What are 50 or 200 checked pairs worth beside 2,000 noisy ones, and do they ever do harm?

Two worlds. *snippets*: human-rated movie-review snippets, linear heads on 64 principal directions of MiniLM
embeddings; a label is that of one of 15 to 20 raters. *arena*: the exact arena (scripts/reproduce/exact_arena), a
linear policy, its gold reward at KL 0.5. Then labels are spoiled:

    clean                 nothing
    flips N               N% of the labels, at random
    unequal (arena)       nothing, but one source has close pairs only
    shared (arena)        all labels follow gold plus another direction
    one source flips      (arena) one of five sources is reversed
    taste (arena)         one source judges by another direction
    length N (snippets)   N%, only where the chosen snippet is the shorter one
    source N (snippets)   N% in all, by one rater of a fifth of the pairs: half, all, or all of his and a quarter of
                          everybody else's

Checked pairs are other pairs with one rater's label (one Bradley-Terry draw), not spoiled. Trained are

    checked            with the default share of the weight (align/data/checked_pairs.py)
    raised             with a higher share where held-out checked pairs gain by two standard errors
    sources            without the sources that are named as worse, with the checked pairs at the default share
    covariate          (snippets) with the difference of lengths as a covariate, and no checked pair
    covariate, checked (snippets) both

Fixed beforehand. The outcome is the paired difference from training on the noisy pairs alone: accuracy on pairs of
snippets that no training saw, against the mean rating, in points; or gold reward. A cell passes if the mean is not
below -0.2 points or -0.005. Also counted: how often a source is named, in worlds with and without a wrong one. The
penalty is the one of all noisy pairs, for every training.

A cell is one JSON file under --output and is not computed again.

    python -m scripts.study.checked_pairs --snippets movie_snippets.jsonl.gz --seeds 100 --snippet-seeds 40
"""

import argparse
import gzip
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from align.data.checked_pairs import checked_weight, default_share
from align.io.console import configure, log
from align.io.files import read_json, write_json
from align.stats import mean_interval, share_interval
from align.trust.checked import choose_share, judge_sources
from align.trust.features import uncentered_pca
from align.trust.linear_proxy import scaled
from align.trust.weighted_heads import choose_penalty, fit_weighted
from scripts.assets.demo_data import Snippet
from scripts.reproduce.exact_arena.gold import GOLD_SPREAD, SIZE, draw_gold, gold_reward
from scripts.reproduce.exact_arena.world import prefer
from scripts.study.reward_models import embed
from scripts.tables import compact, table, update_page

MARK = "scripts/study/checked_pairs.py"
PAIRS, SOURCES, FOLDS, KL = 2000, 5, 5, 0.5
CHECKED = (50, 200)
NEARER = 0.4
"""Distance of the two responses of a close pair in the world ``unequal``, as a share of that of the others."""
ARENA = ("clean", "unequal", "flips 20", "flips 40", "shared", "one source flips", "taste")
SNIPPETS = (
    "clean", "flips 10", "flips 20", "flips 40", "length 10", "length 20", "length 40", "source 10", "source 20",
    "source 40",
)  # fmt: skip
WRONG_SOURCE = ("one source flips", "taste", "source 10", "source 20", "source 40")
"""Cells whose first source is worse than the others."""
FIRST = 1000
"""First seed; trials of the script ran on others."""
VERSION = 1


@dataclass(frozen=True, slots=True)
class Drawn:
    """One world of one seed."""

    x: np.ndarray
    """Noisy pairs [N, D]."""
    checked: np.ndarray
    """[max(CHECKED), D]."""
    source: np.ndarray
    """[N]."""
    length: np.ndarray | None
    """Difference of lengths of the noisy pairs [N]; None: the world has none."""
    length_checked: np.ndarray | None
    outcome: Callable[[np.ndarray], np.ndarray]
    """Heads [D, S] -> what they are judged by, [S]."""


def draw_arena(kind: str, seed: int) -> Drawn:
    """A world of the arena."""
    rng = np.random.default_rng([seed, ARENA.index(kind)])
    gold, other = draw_gold(rng), rng.normal(size=SIZE)
    other *= GOLD_SPREAD / np.sqrt(2) / np.linalg.norm(other)
    x, checked = rng.normal(size=(PAIRS, 2, SIZE)), rng.normal(size=(max(CHECKED), 2, SIZE))
    source = np.arange(PAIRS) % SOURCES
    first = source == 0
    if kind == "unequal":
        x[first, 1] = x[first, 0] + NEARER * (x[first, 1] - x[first, 0])
    belief = (x[:, 0] - x[:, 1]) @ (gold + other if kind == "shared" else gold)
    if kind == "taste":
        belief[first] = 2 * (x[first, 0] - x[first, 1]) @ other
    flips = float(kind.split()[1]) / 100 if kind.startswith("flips") else 0.0
    prefer(x, expit(belief), flips, rng)
    if kind == "one source flips":
        x[first] = x[first, ::-1]
    prefer(checked, expit((checked[:, 0] - checked[:, 1]) @ gold), 0.0, rng)
    both = scaled(np.concatenate([x[:, 0] - x[:, 1], checked[:, 0] - checked[:, 1]]))

    def outcome(heads: np.ndarray) -> np.ndarray:
        found: np.ndarray = gold_reward(heads, gold, np.random.default_rng([seed, 1]), (KL,))[0]
        return found

    return Drawn(both[:PAIRS], both[PAIRS:], source, None, None, outcome)


class RatedSnippets:
    """The snippets of a file with their embeddings."""

    def __init__(self, file: Path, encoder: Path, cache: Path) -> None:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        self.snippets = [Snippet(row["id"], row["text"], tuple(row["ratings"])) for row in rows]
        vectors = embed(self.snippets, encoder, cache, float("inf"))
        assert vectors is not None
        self.vectors = vectors
        self.words = np.array([len(one.text.split()) for one in self.snippets], dtype=np.float64)
        self.means = np.array([one.mean for one in self.snippets])

    def __call__(self, kind: str, seed: int) -> Drawn:
        """A world of one seed."""
        rng = np.random.default_rng([seed, 7])
        order = rng.permutation(len(self.snippets))
        count = PAIRS + max(CHECKED)
        made: list[tuple[int, int]] = []
        place = 0
        while len(made) < count:
            made += self._by_one_rater(int(order[place]), int(order[place + 1]), rng)
            place += 2
        pairs = np.array(made)
        rest = order[place:]
        tests = np.concatenate([rng.permutation(rest)[: len(rest) // 2 * 2].reshape(-1, 2) for _ in range(6)])
        noisy, checked = pairs[:PAIRS].copy(), pairs[PAIRS:]
        source = np.arange(PAIRS) % SOURCES
        wrong = self._wrong(kind, noisy, source, np.random.default_rng([seed, 8]))
        noisy[wrong] = noisy[wrong, ::-1]
        differences = [self.vectors[one[:, 0]] - self.vectors[one[:, 1]] for one in (noisy, checked, tests)]
        projected = scaled(uncentered_pca(np.concatenate(differences[:2])))
        basis = np.linalg.lstsq(np.concatenate(differences[:2]), projected, rcond=None)[0]
        length = [self.words[one[:, 0]] - self.words[one[:, 1]] for one in (noisy, checked)]
        better = np.sign(self.means[tests[:, 0]] - self.means[tests[:, 1]])
        judged, better = differences[2][better != 0] @ basis, better[better != 0]

        def outcome(heads: np.ndarray) -> np.ndarray:
            right: np.ndarray = 100 * (np.sign(judged @ heads) == better[:, None]).mean(axis=0)
            return right

        return Drawn(projected[:PAIRS], projected[PAIRS:], source, length[0], length[1], outcome)

    def _by_one_rater(self, first: int, second: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """The pair with the snippet first that one rater prefers; none for a tie."""
        a, b = self.snippets[first].ratings, self.snippets[second].ratings
        rater = int(rng.integers(min(len(a), len(b))))
        if a[rater] == b[rater]:
            return []
        return [(first, second) if a[rater] > b[rater] else (second, first)]

    def _wrong(self, kind: str, pairs: np.ndarray, source: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Which labels are spoiled, bool [N]."""
        name, _, number = kind.partition(" ")
        share, chance = float(number or 0) / 100, rng.random(len(pairs))
        if name == "length":
            shorter = self.words[pairs[:, 0]] < self.words[pairs[:, 1]]
            return shorter & (chance < share / shorter.mean())
        if name == "source":
            own = min(share * SOURCES, 1.0)
            rest = max(share * SOURCES - 1.0, 0.0) / (SOURCES - 1)
            return chance < np.where(source == 0, own, rest)
        return chance < share


def with_covariate(drawn: Drawn) -> tuple[np.ndarray, np.ndarray]:
    """Noisy and checked pairs with the difference of lengths as a last feature, on the scale of all others together."""
    assert drawn.length is not None and drawn.length_checked is not None
    size = np.sqrt(np.square(drawn.length).mean() / drawn.x.shape[1])
    return (
        np.column_stack([drawn.x, drawn.length / size]),
        np.column_stack([drawn.checked, drawn.length_checked / size]),
    )


def run_seed(drawn: Drawn, seed: int) -> dict[str, Any]:
    """Outcomes of every training, and the sources named, of one world of one seed."""
    rng = np.random.default_rng([seed, 9])
    fold = rng.permutation(PAIRS) % FOLDS
    penalty = choose_penalty(drawn.x, fold)
    ones = np.ones(PAIRS)
    heads = {"all": fit_weighted(drawn.x, ones[:, None], penalty)[:, 0]}
    named: dict[str, list[int]] = {"0": _named(drawn, drawn.checked[:0], penalty)}
    shares: dict[str, float] = {}
    if drawn.length is not None:
        heads["covariate"] = fit_weighted(with_covariate(drawn)[0], ones[:, None], penalty)[:-1, 0]
    for count in CHECKED:
        checked = drawn.checked[:count]
        start = default_share(count, PAIRS)
        choice = choose_share(drawn.x, checked, rng.permutation(count) % 10, penalty)
        named[f"{count}"] = _named(drawn, checked, penalty)
        kept = ~np.isin(drawn.source, named[f"{count}"])
        both = np.concatenate([drawn.x, checked])
        columns = {
            f"checked {count}": (ones, start),
            f"raised {count}": (ones, choice.share),
            f"sources {count}": (kept.astype(np.float64), start),
        }
        shares[f"{count}"] = choice.share
        for name, (weights, share) in columns.items():
            every = np.append(weights, np.full(count, checked_weight(count, float(weights.sum()), share)))
            heads[name] = fit_weighted(both, every[:, None], penalty)[:, 0]
        if drawn.length is not None:
            every = np.append(ones, np.full(count, checked_weight(count, PAIRS, start)))
            noisy, more = with_covariate(drawn)
            heads[f"covariate, checked {count}"] = fit_weighted(
                np.concatenate([noisy, more[:count]]), every[:, None], penalty
            )[:-1, 0]
    judged = drawn.outcome(np.stack(list(heads.values()), axis=1))
    return {"outcome": dict(zip(heads, judged.tolist(), strict=True)), "named": named, "share": shares}


def _named(drawn: Drawn, checked: np.ndarray, penalty: float) -> list[int]:
    """The sources that are named as worse than the others."""
    verdicts = judge_sources(drawn.x, [f"{k}" for k in drawn.source], checked, penalty)
    return [int(one.source) for one in verdicts if one.named]


def run_cell(draw: Callable[[str, int], Drawn], kind: str, seeds: int) -> dict[str, Any]:
    """All seeds of a cell."""
    start = time.monotonic()
    found = [run_seed(draw(kind, seed), seed) for seed in range(FIRST, FIRST + seeds)]
    return {"version": VERSION, "seeds": seeds, "found": found, "seconds": time.monotonic() - start}


def summarize(world: str, kind: str, cell: dict[str, Any]) -> dict[str, Any]:
    """Means with intervals of one cell."""
    found = cell["found"]
    base = np.array([one["outcome"]["all"] for one in found])
    limit = -0.2 if world == "snippets" else -0.005
    differences = {
        name: mean_interval(np.array([one["outcome"][name] for one in found]) - base).to_dict()
        for name in found[0]["outcome"] if name != "all"
    }  # fmt: skip
    wrong = kind in WRONG_SOURCE
    named = {
        count: {
            "falsely": share_interval(
                [any(k > 0 or not wrong for k in one["named"][count]) for one in found]
            ).to_dict(),
            "rightly": share_interval([0 in one["named"][count] for one in found]).to_dict() if wrong else None,
        }
        for count in found[0]["named"]
    }
    return {
        "world": world, "labels": kind, "seeds": cell["seeds"], "all": mean_interval(base).to_dict(),
        "from_all": differences, "passes": {name: one["value"] >= limit for name, one in differences.items()},
        "named": named, "raised": {count: float(np.mean([one["share"][count] > default_share(int(count), PAIRS)
                                                       for one in found])) for count in found[0]["share"]},
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    """One table of the differences for each world, and one of the sources named."""
    parts = []
    for world, digits in (("arena", 3), ("snippets", 1)):
        own = [row for row in rows if row["world"] == world]
        if not own:
            continue
        names = list(own[0]["from_all"])
        body = [
            [row["labels"], f"{row['all']['value']:.{digits}f}", *(_shown(row["from_all"][n], digits) for n in names)]
            for row in own
        ]
        parts.append(table([f"{world}: labels", "noisy alone", *names], body))
    counts = list(rows[0]["named"])
    body = [
        [f"{row['world']}: {row['labels']}", *(_rates(row["named"][count]) for count in counts)] for row in rows
    ]  # fmt: skip
    parts.append(table(["world", *(f"{count} checked" for count in counts)], body))
    return "\n\n".join(parts)


def _shown(estimate: dict[str, Any], digits: int) -> str:
    """A difference with the half-width of its interval."""
    half = (estimate["high"] - estimate["low"]) / 2 if estimate["low"] is not None else 0.0
    return f"{estimate['value']:+.{digits}f} ± {half:.{digits}f}"


def _rates(named: dict[str, Any]) -> str:
    falsely = f"falsely {named['falsely']['value']:.0%}"
    return falsely if named["rightly"] is None else f"rightly {named['rightly']['value']:.0%}, {falsely}"


def main() -> None:
    """Compute the missing cells; write the tables of all there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/study-checked-pairs"))
    parser.add_argument("--snippets", type=Path, help="JSON lines with `text` and `ratings`; default: the arena alone")
    parser.add_argument("--encoder", type=Path, default=Path(".assets/minilm"))
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--snippet-seeds", type=int, default=40)
    parser.add_argument("--document", type=Path, help="page whose tables to replace, e.g. docs/checked-pairs.md")
    arguments = parser.parse_args()
    configure()
    arguments.output.mkdir(parents=True, exist_ok=True)
    worlds: list[tuple[str, Callable[[str, int], Drawn], tuple[str, ...], int]] = [
        ("arena", draw_arena, ARENA, arguments.seeds)
    ]
    if arguments.snippets is not None:
        rated = RatedSnippets(arguments.snippets, arguments.encoder, arguments.output / "embeddings")
        worlds.append(("snippets", rated, SNIPPETS, arguments.snippet_seeds))
    rows = []
    for world, draw, kinds, seeds in worlds:
        for kind in kinds:
            file = arguments.output / f"{world}-{kind}.json".replace(" ", "_")
            found = read_json(file) if file.exists() else {}
            if (found.get("version"), found.get("seeds")) != (VERSION, seeds):
                found = run_cell(draw, kind, seeds)
                write_json(file, found)
                log.info("%s, %s: %.0f s", world, kind, found["seconds"])
            rows.append(summarize(world, kind, found))
    small = arguments.output / "checked_pairs.json"
    small.write_text(compact({"rows": rows}), encoding="utf-8")
    print(markdown(rows))
    if arguments.document:
        update_page(arguments.document, markdown(rows), MARK)


if __name__ == "__main__":
    main()
