"""Files like those of the human-rated movie-review snippets."""

import random
from pathlib import Path

from scripts.assets.demo_data import RATINGS, TEXTS
from tests.helpers.builders import WORDS


def snippets(folder: Path, count: int = 80) -> Path:
    """Write ``count`` snippets with five ratings each into ``folder``, in the words that the tiny models know."""
    rng = random.Random(0)
    folder.mkdir()
    texts = [" ".join(rng.choices(WORDS[:14], k=14)) for _ in range(count)]
    (folder / TEXTS).write_text("".join(f"{k}\t0\t{text}\n" for k, text in enumerate(texts)))
    ratings = [[rng.randint(-4, 4) for _ in range(5)] for _ in range(count)]
    (folder / RATINGS).write_text("".join(f"{k}\t0\t0\t{found}\n" for k, found in enumerate(ratings)))
    return folder
