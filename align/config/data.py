"""Where pairs come from, how they are sampled, and which of them are kept."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from align.config.base import Count, Fraction, Positive, Section
from align.config.columns import LOADED
from align.config.decoding import DecodingSection
from align.config.reading import nearest


class CheckedSection(Section):
    """Pairs whose label a person vouches for, trained on together with the others (docs/checked-pairs.md)."""

    path: str
    """A source of pairs, as ``pairs.path``."""
    split: str = "train"
    """As ``pairs.split``."""
    subset: str | None = None
    """As ``pairs.subset``."""
    columns: dict[str, str] = {}
    """As ``pairs.columns``."""
    share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the total weight that the checked pairs have together; default: 0.1 for 50 of them, 0.25 for 200 and
    more, in proportion between and below, and never less than their share of the pairs."""

    @property
    def source(self) -> "PairsSection":
        """The section of a pair table."""
        return PairsSection(path=self.path, split=self.split, subset=self.subset, columns=self.columns)


class PairsSection(Section):
    """Where preference pairs come from."""

    path: str
    """A hub dataset id, a folder written by ``save_to_disk``, a .jsonl, .json, .csv, .tsv (all four also .gz, .zst,
    .bz2) or .parquet file, a folder of Parquet files or of files named by split, or a pattern; files also as
    s3://bucket/key."""
    split: str = "train"
    """Split of a hub dataset, saved dataset dictionary, or folder with files such as train.parquet and test.jsonl."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    columns: dict[str, str] = {}
    """Name in the pair table -> name in the source, e.g. ``chosen: preferred``."""
    drop_invalid: bool = False
    """Drop invalid rows (they are counted and written to a side file) instead of stopping."""
    limit: Count | None = None
    """Number of pairs to keep, a fair sample drawn by a hash of their ids; default: all."""
    near_copies: bool = False
    """Keep pairs with nearly the same prompt or long response together in splits and intervals, as column
    ``split_group``; equal texts always are."""
    checked: CheckedSection | None = None
    """Checked pairs to train on as well; for training pairs alone. Default: none."""

    @model_serializer(mode="wrap")
    def _without_later_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave later keys out at their defaults, so that stages made before these keys existed stay up to date."""
        found: dict[str, Any] = handler(self)
        for name in ("near_copies", "checked"):
            if not getattr(self, name):
                found.pop(name, None)
        return found

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


def refuse_checked(pairs: PairsSection | None, key: str) -> None:
    """Raise if pairs that nothing is trained on name checked ones.

    Raises:
        ValueError: they do.
    """
    if pairs is not None and pairs.checked is not None:
        raise ValueError(
            f"{key}.checked: checked pairs are trained on, and these pairs are not; expected `pairs.checked`"
        )


class SampleSection(DecodingSection):
    """Building pairs by sampling continuations of each prompt and drawing the label by Bradley-Terry."""

    num_generations: Annotated[int, Field(ge=2)] = 2
    """Continuations per prompt; the pair is the best and the worst of them by the labeling reward."""
    label_scale: Positive = 1.0
    """P(the better one is chosen) = sigmoid(label_scale * difference of the labeling reward)."""


class LoadingSection(Section):
    """How a finished reward model is loaded, and how it reads a prompt and a response."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Of the backbone's weights; ``auto`` is the checkpoint's. The head is always in float32."""
    trust_remote_code: bool = False
    """Code that comes with the reward model may run."""
    text_pair: bool = False
    """An encoder reads prompt and response as a sentence pair, ``tokenizer(prompt, response)``."""


class OodSection(LoadingSection):
    """How the distance of a pair to the reward model's training pairs is measured."""

    model: str
    """Reward model: hub id or folder."""
    pairs: PairsSection
    """The pairs that the reward model was trained on."""
    quantile: Fraction = 0.99
    """Share of held-out training pairs that lie within the limit of the rule ``out_of_distribution``."""

    @model_validator(mode="after")
    def _nothing_is_trained(self) -> "OodSection":
        refuse_checked(self.pairs, "pairs")
        return self


class FilterSection(Section):
    """Which pairs to keep: hard rules, then margin + quality + diversity."""

    keep: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """``top`` and ``greedy``: share to keep of the pairs that pass the rules; default: 0.5."""
    method: Literal["top", "greedy", "threshold"] = "top"
    """``top``: largest importance; ``greedy``: diversity against the pairs kept so far; ``threshold``: at least
    ``minimum``."""
    minimum: float | None = None
    """``threshold``: least importance to keep."""
    margin: float = 1.0
    """Weight of the standardized margin; no effect on pairs without margins."""
    quality: float = 0.5
    """Weight of the standardized quality."""
    diversity: float = 0.5
    """Weight of the standardized diversity."""
    per_group: bool = False
    """``top``: keep the same share of each ``group``."""
    in_spreads: bool = False
    """Divide the margin by its ensemble spread, ``margin_std`` plus the median of that column."""
    skip: list[str] = []
    """Names of rules to skip."""
    longest: Count = 2048
    """Words per response, at most."""
    language: str | None = None
    """ISO 639 code, e.g. en, of the language that both responses must be in; default: any."""
    held_out: str | None = None
    """Evaluation pairs; a pair with one of their prompts or responses, or with eight consecutive words of a prompt, is
    dropped."""
    drop_doubtful: bool = False
    """Drop pairs whose label the out-of-fold margin contradicts strongly; they are marked in any case."""
    neighbours: Count = 5
    """k of the k-nearest-neighbor entropy."""
    index: Literal["auto", "exact", "ivf", "hnsw"] = "auto"
    """Nearest-neighbor search; ``auto`` chooses by the number of pairs."""
    embedding_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Encoder of the prompts: hub id or folder."""
    embedding: Literal["encoder", "static"] = "encoder"
    """``static``: token vectors distilled from the model in place of the model; far faster, ignores word order."""
    embeddings: str | None = None
    """A .npy file of float32 unit vectors, one per pair, in place of ``embedding_model``."""
    quality_scorers: Annotated[list[Literal["screen", "fluency", "rubric", "yes_no"]], Field(min_length=1)] = ["screen"]
    """Scorers of quality; quality is the mean of their standardized scores."""
    quality_model: str | None = None
    """Language model for fluency, rubric and yes_no: hub id or folder."""
    ood: OodSection | None = None
    """Measure the distance to the reward model's training pairs; default: not measured."""
    processes: Count = 1
    """Processes of this machine that read texts."""

    @property
    def share(self) -> float:
        """``keep`` or its default."""
        return 0.5 if self.keep is None else self.keep
