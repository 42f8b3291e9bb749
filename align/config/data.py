"""Where pairs come from, and which of them are kept."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from align.config.base import Count, Fraction, Positive, Section
from align.config.columns import LOADED
from align.config.reading import nearest


class PairsSection(Section):
    """Where preference pairs come from."""

    path: str
    """A hub dataset id, a folder written by ``save_to_disk``, a .jsonl, .csv or .parquet file, a folder of Parquet
    files, or a pattern; files also as s3://bucket/key."""
    split: str = "train"
    """Split of a hub dataset or saved dataset dictionary."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    columns: dict[str, str] = {}
    """Name in the pair table -> name in the source, e.g. ``chosen: preferred``."""
    drop_invalid: bool = False
    """Leave invalid rows out (they are counted and written to a side file) instead of stopping."""
    limit: Count | None = None
    """Keep the first so many pairs."""

    @field_validator("columns")
    @classmethod
    def _each_column_once(cls, columns: dict[str, str]) -> dict[str, str]:
        given = list(columns.values())
        if twice := [name for name in given if given.count(name) > 1]:
            raise ValueError(f"{twice[0]!r} is given for two columns of the pair table")
        for name in columns:
            if name not in LOADED:
                raise ValueError(f"{name!r} is not a column of the pair table{nearest(name, list(LOADED))}")
        return columns


class SampleSection(Section):
    """Building pairs by sampling continuations of each prompt and drawing the label by Bradley-Terry."""

    prompts: str
    """A file with one ``prompt`` per row, as in ``pairs.path``."""
    num_generations: Annotated[int, Field(ge=2)] = 2
    """Continuations of each prompt; the pair is the best and the worst of them by the labelling reward."""
    max_new_tokens: Count = 24
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    batch_size: Count = 64
    label_scale: Positive = 1.0
    """P(the better one is chosen) = sigmoid(label_scale * difference of the labelling reward)."""


class OodSection(Section):
    """What the distance of a pair to the reward model's training pairs is measured with."""

    model: str
    """Reward model: hub id or folder."""
    pairs: PairsSection
    """The pairs that it was trained on."""
    quantile: Fraction = 0.99
    """Pairs farther away than this share of held-back training pairs break the rule ``out_of_distribution``."""


class FilterSection(Section):
    """Which pairs to keep: hard rules, then margin + quality + diversity."""

    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the pairs that pass the rules."""
    method: Literal["top", "greedy", "threshold"] = "top"
    """``top``: largest importance; ``greedy``: diversity against what is kept; ``threshold``: at least ``minimum``."""
    minimum: float | None = None
    """``threshold``: least importance."""
    margin: float = 1.0
    """Weight of the standardised margin; without effect where the pairs have none."""
    quality: float = 0.5
    diversity: float = 0.5
    per_group: bool = False
    """The same share of each ``group``."""
    in_spreads: bool = False
    """Divide the margin by its ensemble spread ``margin_std``."""
    skip: list[str] = []
    """Rules to leave out."""
    longest: Count = 2048
    """Words of a response."""
    language: str | None = None
    """ISO 639 code, e.g. en, that both responses must be in."""
    held_out: str | None = None
    """Evaluation pairs that nothing may share a run of eight words with."""
    drop_doubtful: bool = False
    """Drop pairs whose label the out-of-fold margin contradicts strongly; they are marked in any case."""
    neighbours: Count = 5
    """k of the k-nearest-neighbour entropy."""
    index: Literal["auto", "exact", "ivf", "hnsw"] = "auto"
    embedding_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    embedding: Literal["encoder", "static"] = "encoder"
    """``static``: token vectors distilled from the model instead of the model; far faster, blind to word order."""
    embeddings: str | None = None
    """A .npy file of unit vectors, one per pair, instead of ``embedding_model``."""
    quality_scorers: Annotated[list[Literal["screen", "fluency", "rubric", "yes_no"]], Field(min_length=1)] = ["screen"]
    """Each is a column; together the mean of the standardised columns."""
    quality_model: str | None = None
    """Language model of fluency, rubric and yes_no: hub id or folder."""
    ood: OodSection | None = None
    processes: Count = 1
    """Processes that read texts."""
