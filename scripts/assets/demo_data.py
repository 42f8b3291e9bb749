"""Turn the human-rated movie-review snippets into the demo's files.

    python -m scripts.assets.demo_data --assets .assets --output .assets/demo

The snippets are split, by id, into four disjoint parts: reward-model pairs to train on, held-out pairs, prompts to
sample from, prompts to evaluate on. A pair is two snippets; which one is chosen is decided by the ratings of *one* of
the 15 to 20 people who rated each, so the labels carry real human noise.
"""

import argparse
import ast
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import AlignError, DataError
from align.io.console import configure, log

TEXTS = "movieReviewSnippets_GroundTruth.txt"
RATINGS = "movieReviewSnippets_anonDataRatings.txt"
PAIR_PROMPT = "Movie review:"
PROMPT_WORDS = 8
SHORTEST = 12


@dataclass(frozen=True, slots=True)
class Snippet:
    """A sentence of a review and the rating of each rater, from -4 (most negative) to 4."""

    id: str
    text: str
    ratings: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean rating over all raters."""
        return sum(self.ratings) / len(self.ratings)


def read_snippets(folder: Path) -> list[Snippet]:
    """The snippets with their individual ratings.

    Raises:
        DataError: a file is missing or a line is malformed.
    """
    ratings = {}
    for number, fields in _rows(folder / RATINGS, 4):
        values = ast.literal_eval(fields[3])
        if not isinstance(values, list) or not values:
            raise DataError(f"{RATINGS}:{number}: found {fields[3]!r}, expected a list of ratings", code="demo-data")
        ratings[fields[0]] = tuple(int(value) for value in values)
    texts = [(fields[0], fields[2].strip()) for _, fields in _rows(folder / TEXTS, 3)]
    return [Snippet(key, text, ratings[key]) for key, text in texts if key in ratings and text]


def human_pairs(snippets: list[Snippet], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """``count`` pairs in which no snippet occurs twice, each labeled by one rater's ratings; ties are paired again.

    Raises:
        DataError: there are too few snippets.
    """
    pairs: list[dict[str, Any]] = []
    pool = list(snippets)
    while len(pairs) < count:
        rng.shuffle(pool)
        left = pool[len(pool) // 2 * 2 :]
        before = len(pairs)
        for first, second in zip(pool[0::2], pool[1::2], strict=False):
            rater = rng.randrange(min(len(first.ratings), len(second.ratings)))
            if first.ratings[rater] == second.ratings[rater] or first.text == second.text:
                left += [first, second]
            elif len(pairs) < count:
                ordered = (first, second) if first.ratings[rater] > second.ratings[rater] else (second, first)
                pairs.append(as_pair(*ordered))
        pool = left
        if len(pairs) == before:
            raise DataError(f"{len(snippets)} snippets give {len(pairs)} pairs, {count} wanted", code="demo-data")
    return pairs


def as_pair(chosen: Snippet, rejected: Snippet) -> dict[str, Any]:
    """One row of the pair table; ``gold_margin`` is the difference of the mean ratings."""
    return {
        "id": f"{chosen.id}-{rejected.id}",
        "prompt": PAIR_PROMPT,
        "chosen": f" {chosen.text}",
        "rejected": f" {rejected.text}",
        "gold_margin": round(chosen.mean - rejected.mean, 4),
    }


def openings(snippets: list[Snippet], count: int) -> list[dict[str, str]]:
    """The first words of ``count`` snippets that are long enough to go on after them."""
    long_enough = [snippet for snippet in snippets if len(snippet.text.split()) >= SHORTEST]
    if len(long_enough) < count:
        raise DataError(f"{len(long_enough)} snippets have {SHORTEST} words, {count} wanted", code="demo-data")
    return [
        {"id": snippet.id, "prompt": " ".join(snippet.text.split()[:PROMPT_WORDS])} for snippet in long_enough[:count]
    ]


def build(args: argparse.Namespace) -> None:
    """Write the four files and ``data.json``, unless they exist and were made with the same arguments."""
    note = args.output / "data.json"
    wanted = {key: value for key, value in vars(args).items() if key not in ("assets", "output")}
    if note.exists() and json.loads(note.read_text(encoding="utf-8"))["arguments"] == wanted:
        log.info("demo data: exists already (%s)", args.output)
        return
    snippets = read_snippets(args.assets / "snippets")
    rng = random.Random(args.seed)
    rng.shuffle(snippets)
    prompt_part, pair_part = snippets[: len(snippets) // 3], snippets[len(snippets) // 3 :]
    cut = len(pair_part) * 4 // 5
    prompts = openings(prompt_part, args.train_prompts + args.eval_prompts)
    train = human_pairs(pair_part[:cut], args.pairs, rng)
    files = {
        "human_pairs.jsonl": train,
        "human_pairs_heldout.jsonl": human_pairs(pair_part[cut:], args.heldout_pairs, rng),
        "train_prompts.jsonl": prompts[: args.train_prompts],
        "eval_prompts.jsonl": prompts[args.train_prompts :],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.output / name).write_text(lines, encoding="utf-8")
    contradicted = sum(pair["gold_margin"] < 0 for pair in train) / len(train)
    counts = {name: len(rows) for name, rows in files.items()}
    facts = {"arguments": wanted, "counts": counts, "labels_against_mean_rating": round(contradicted, 4)}
    note.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    log.info("demo data: %s; %.1f%% of one rater's labels contradict the mean rating", counts, 100 * contradicted)


def _rows(file: Path, fields: int) -> list[tuple[int, list[str]]]:
    if not file.exists():
        raise DataError(f"{file}: not there", code="demo-data", hint="run `make assets`")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        parts = line.split("\t")
        if len(parts) < fields:
            raise DataError(
                f"{file.name}:{number}: found {len(parts)} columns, expected {fields} separated by tabs",
                code="demo-data",
            )
        rows.append((number, parts))
    return rows


def main() -> None:
    """Build the demo's data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(".assets"))
    parser.add_argument("--output", type=Path, default=Path(".assets/demo"))
    parser.add_argument("--pairs", type=int, default=1200)
    parser.add_argument("--heldout-pairs", type=int, default=600)
    parser.add_argument("--train-prompts", type=int, default=512)
    parser.add_argument("--eval-prompts", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    configure()
    try:
        build(args)
    except AlignError as error:
        sys.stderr.write(f"error {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
