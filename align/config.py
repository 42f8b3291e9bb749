"""The typed tree of one run. YAML in; a wrong key is an error that names its path and the nearest key."""

import difflib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from align.errors import ConfigError, listed
from align.safe_yaml import load_yaml

NAME = r"^\w[\w .+=-]{0,99}$"
SHOWN_CHARACTERS = 60


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=(), allow_inf_nan=False)


S = TypeVar("S", bound=Section)
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=NAME)]
"""Becomes the name of a folder."""


class PairsConfig(Section):
    """Where preference pairs come from."""

    path: str
    """A hub dataset id, a folder written by ``save_to_disk``, or a .jsonl, .csv or .parquet file."""
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


class TiltConfig(Section):
    """A weight of each pair from its loss, step by step (align/pair_weights.py)."""

    kind: Literal["up", "down", "lin_upper", "quadratic", "extremes", "comp_sum"]
    """up, lin_upper: pairs of high loss count more; down, comp_sum: less; quadratic, extremes: the middle, the ends."""
    temperature: Positive = 1.0
    """The larger, the more alike the weights; of all kinds but comp_sum."""
    tau: Annotated[float, Field(ge=0.0)] = 1.5
    """comp_sum: weight sigmoid(z)^(tau - 1)."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps with all weights alike before."""


class SharpnessConfig(Section):
    """A penalty on how fast the margins change with the reward model's parameters (reward_models/sharpness.py)."""

    threshold: Positive = 0.1
    """radius * |gradient of the mean margin| above which the penalty grows."""
    radius: Positive = 0.05
    step: Positive = 0.05
    """Length of the step in parameter space between the two gradients that are compared."""
    start: Annotated[float, Field(ge=0.0)] = 1e-3
    """Multiplier of the penalty at the beginning."""
    rate: Annotated[float, Field(ge=0.0)] = 1e-3
    """Of the multiplier's change; 0 keeps it."""
    parameters: str | None = None
    """Regular expression: only trained parameters whose name matches; all where absent."""


class ObjectiveConfig(Section):
    """One loss of reward_models/objective_registry.py and its parameters."""

    name: str = "bradley_terry"
    parameters: dict[str, float | bool] = {}


class RewardConfig(Section):
    """Training of the reward model whose margins weight the pairs."""

    model: str
    """Backbone: hub id or folder of any model that loads with a one-logit classification head."""
    pairs: PairsConfig | None = None
    """Pairs to train on; the policy's own pairs where absent."""
    eval_pairs: PairsConfig | None = None
    """Held-out pairs; a random ``eval_fraction`` of the prompts of ``pairs`` where absent."""
    eval_fraction: Fraction = 0.1
    folds: Annotated[int, Field(ge=0)] = 0
    """k >= 2: also train k models, each scoring only the pairs that it has not seen. 0: no cross-fitting."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What the reward model is trained to minimise (docs/reward-models.md)."""
    tilt: TiltConfig | None = None
    """Weights of the pairs from their losses; absent: every pair alike."""
    sharpness: SharpnessConfig | None = None
    """Absent: no such penalty. It costs two more forward and backward passes a step."""
    head: Literal["full", "logistic", "naive-bayes"] = "full"
    """full: fine-tuning; the others fit a linear head on the backbone's frozen features, in seconds."""
    ensemble: Count = 1
    """Models trained under different seeds: the margin is their mean, ``margin_std`` their spread."""
    calibrate: Literal["temperature", "isotonic"] | None = None
    """Fit a map on the held-out pairs that makes the margin the log-odds of the label, and apply it."""
    length_residual: bool = False
    """Take the part of the margin off that rises with the difference of lengths."""
    batch_tokens: Count = 4096
    """Padded tokens per scoring batch."""
    max_length: Count = 1024
    """Tokens per sequence; longer ones are cut from the right when training and scoring."""
    peft: dict[str, Any] | None = None
    """Fields of peft.LoraConfig; full fine-tuning where absent."""
    trainer: dict[str, Any] = {}
    """Fields of trl.RewardConfig, passed through unchanged."""

    @property
    def trusts_remote_code(self) -> bool:
        """``trainer.trust_remote_code``: code that comes with the model may run."""
        return self.trainer.get("trust_remote_code") is True

    @model_validator(mode="after")
    def _folds_are_none_or_two(self) -> "RewardConfig":
        if self.folds == 1:
            raise ValueError("folds must be 0 (no cross-fitting) or at least 2, got 1")
        return self

    @model_validator(mode="after")
    def _a_fitted_head_has_one_objective(self) -> "RewardConfig":
        if self.head != "full" and (self.objective.name != "bradley_terry" or self.tilt or self.peft or self.sharpness):
            raise ValueError(
                f"head: {self.head} fits Bradley-Terry to frozen features: no objective, tilt, sharpness or peft"
            )
        return self


class SampleConfig(Section):
    """Building pairs by sampling continuations of each prompt and drawing the label by Bradley-Terry."""

    prompts: str
    """A .jsonl file with one ``prompt`` per line."""
    num_generations: Annotated[int, Field(ge=2)] = 2
    """Continuations of each prompt; the pair is the best and the worst of them by the labelling reward."""
    max_new_tokens: Count = 24
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    batch_size: Count = 64
    label_scale: Positive = 1.0
    """P(the better one is chosen) = sigmoid(label_scale * difference of the labelling reward)."""


class RemedyConfig(Section):
    """What is done about gradient entanglement in each step of a method."""

    kind: Literal["hold_chosen", "hold_batch", "normalise", "calibrate"]
    """hold_chosen: less of the rejected gradient where a step on that pair would lower its chosen response; hold_batch:
    the same for a step on the whole batch; normalise: both gradients of a pair of one length; calibrate: one factor per
    batch from running averages (align/entanglement/remedies.py)."""
    keep: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """hold_chosen, hold_batch: share of its rise that a chosen response keeps."""
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.98
    """calibrate: of the running averages."""
    parameters: str | None = None
    """Regular expression: measure only parameters whose name matches; all trained ones where absent."""


class TokenMaskConfig(Section):
    """A learned sparse mask over the tokens that the loss sees (align/training/token_mask.py)."""

    sparsity: Positive = 0.1
    """Price, in units of the loss, of letting every token of a pair through."""
    rate: Positive = 0.05
    """Learning rate of the mask."""


class DistanceConfig(Section):
    """How the margin shrinks with the distance to the reward model's training pairs (column ``ood``)."""

    limit: Annotated[float, Field(ge=0.0)]
    """Distance up to which nothing shrinks; ``filter.json`` has that of held-back training pairs."""
    softness: Positive = 1.0
    """Distance beyond it over which the margin falls by the factor e."""


class WeightsConfig(Section):
    """How much each pair counts beside the loss's own weight (docs/concepts.md)."""

    spread: bool = False
    """Moderate the margin by its ensemble spread ``margin_std``."""
    ood: DistanceConfig | None = None
    """Shrink the margin towards 0 where the pair is unlike those that the reward model was trained on."""
    tilt: TiltConfig | None = None
    """Weights from the losses of each step, over all processes."""
    normalise: bool = False
    """Divide the table's weights (MADPO's and the ``weight`` column's) by their mean."""


class LossConfig(Section):
    """One loss of the registry in align/losses.py and its parameters."""

    loss: str
    """Name in the registry: madpo, soft_madpo, dpo, ipo, ..."""
    parameters: dict[str, float | bool] = {}
    """Keyword parameters of the loss and, for madpo, of its weight."""
    weights: WeightsConfig | None = None
    """Absent: the loss's own weight, and the pairs' ``weight`` column."""
    remedy: RemedyConfig | None = None
    """Absent: the loss as it is."""
    token_mask: TokenMaskConfig | None = None
    """Absent: the loss sees every token of a response."""


class EntanglementConfig(Section):
    """Gradient entanglement along training."""

    every: Count = 50
    """Optimizer steps from one measurement to the next."""
    probes: Count = 8
    """Pairs, the first of the table, that are measured each time."""


class OodConfig(Section):
    """What the distance of a pair to the reward model's training pairs is measured with."""

    model: str
    """Reward model: hub id or folder."""
    pairs: PairsConfig
    """The pairs that it was trained on."""
    quantile: Fraction = 0.99
    """Pairs farther away than this share of held-back training pairs break the rule ``out_of_distribution``."""


class FilterConfig(Section):
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
    ood: OodConfig | None = None
    processes: Count = 1
    """Processes that read texts."""


class TrainConfig(Section):
    """Alignment of the policy: the same model, data and budget under each loss."""

    model: str
    """Policy and reference: hub id or folder."""
    methods: Annotated[dict[Name, LossConfig], Field(min_length=1)]
    """Name of a method (a folder name and a label in the report) -> its loss."""
    peft: dict[str, Any] | None = None
    """Fields of peft.LoraConfig; full fine-tuning where absent."""
    trust: Literal["auto"] | None = None
    """auto: methods with the loss ``trust`` get their slope, trust and strength from the pairs (docs/whom-to-trust.md),
    except those that their ``parameters`` give."""
    allow_in_sample: bool = False
    """Let ``trust: auto`` read margins of a reward model that has seen the pairs' labels."""
    layout: Literal["auto", "concatenated", "shared_prefix"] = "auto"
    """How log-probs are computed: prompts once for both responses wherever that is exact, or row by row as trl does."""
    max_tokens_per_device: Count | None = None
    """Tokens of one forward pass; a larger batch is split without changing its gradient."""
    entanglement: EntanglementConfig | None = None
    """Measure probe pairs along training; absent: not measured."""
    trainer: dict[str, Any] = {}
    """Fields of trl.DPOConfig, passed through unchanged."""

    @property
    def trusts_remote_code(self) -> bool:
        """``trainer.trust_remote_code``: code that comes with the model may run."""
        return self.trainer.get("trust_remote_code") is True


class EvaluateConfig(Section):
    """What is measured on held-out prompts."""

    prompts: str
    """A .jsonl file with one ``prompt`` per line, none of which was trained on."""
    judge: Literal["vader"] = "vader"
    """Independent gold judge; never trained, never used as a label."""
    max_new_tokens: Count = 24
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    batch_size: Count = 64
    samples_shown: Annotated[int, Field(ge=0)] = 20


class RunConfig(Section):
    """One run from pairs to report."""

    name: Name
    output_dir: str = "runs"
    """The run writes ``output_dir/name``."""
    seed: Seed = 0
    pairs: PairsConfig | None = None
    """The policy's preference pairs. Exactly one of ``pairs`` and ``sample`` is given."""
    sample: SampleConfig | None = None
    reward: RewardConfig | None = None
    """Absent: the pairs bring their own ``margin`` column, or no method needs one."""
    filter: FilterConfig | None = None
    """Absent: the policy is trained on all pairs."""
    train: TrainConfig | None = None
    """Absent: the run ends with the reward model and its margins."""
    evaluate: EvaluateConfig | None = None

    @model_validator(mode="after")
    def _one_source_of_pairs(self) -> "RunConfig":
        if (self.pairs is None) == (self.sample is None):
            raise ValueError("give exactly one of `pairs` (a dataset) and `sample` (prompts to sample pairs from)")
        if self.sample is not None and (self.reward is None or self.reward.pairs is None or self.train is None):
            raise ValueError("`sample` needs `train` and `reward.pairs`: the reward model is trained on other pairs")
        if self.evaluate is not None and self.train is None:
            raise ValueError("`evaluate` needs `train`: there is no policy to evaluate")
        if self.reward is None and self.train is None:
            raise ValueError("give `reward`, `train` or both: there is nothing to do")
        return self

    @property
    def folder(self) -> Path:
        """Folder that holds everything this run writes."""
        return Path(self.output_dir) / self.name


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run's YAML, apply ``a.b=c`` overrides, validate.

    Raises:
        ConfigError: file missing, not YAML, unknown key, ill-typed value; all problems of the file at once.
    """
    return load_section(path, overrides, RunConfig)


def load_section(path: Path, overrides: list[str] | None, kind: type[S]) -> S:
    """``load_config`` for a file whose root is the section ``kind``."""
    tree = read_yaml(path)
    for override in overrides or []:
        apply_override(tree, override)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(item, kind) for item in error.errors()]
        raise ConfigError(
            f"{path}:\n{listed(problems)}", code="config-key", hint="see configs/ for working files"
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping read with ``yaml.safe_load``.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})", code="config-file") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}", code="config-yaml") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected a mapping of keys to values, found {type(tree).__name__}", code="config-yaml"
        )
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set ``a.b=c`` in a tree of dicts, the value read as YAML.

    Raises:
        ConfigError: no ``=``, an empty key, or a path through something that is not a mapping.
    """
    key, found, text = override.partition("=")
    parts = key.split(".")
    if not found or not all(parts):
        raise ConfigError(f"--set {override}: expected key.path=value", code="config-override")
    node = tree
    for depth, part in enumerate(parts[:-1]):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            path = ".".join(parts[: depth + 1])
            raise ConfigError(f"--set {override}: {path} is a value, not a section", code="config-override")
    try:
        node[parts[-1]] = load_yaml(text)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"--set {override}: {text!r} is not a YAML value", code="config-override") from None


def nearest(name: str, known: list[str]) -> str:
    """`` (did you mean `x`?)`` for the nearest known name, or the list of known names."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean `{close[0]}`?)" if close else f" (known: {', '.join(sorted(known))})"


def _problem(item: Any, root: type[Section]) -> str:
    path = [str(part) for part in item["loc"]]
    if item["type"] == "extra_forbidden":
        return f"{'.'.join(path)}: unknown key{nearest(path[-1], _keys_at(path[:-1], root))}"
    if item["type"] == "missing":
        return f"{'.'.join(path)}: missing key"
    if item["type"] == "value_error":
        return f"{'.'.join(path) or 'top level'}: {item['ctx']['error']}"
    if item["type"] == "too_short":
        return f"{'.'.join(path)}: expected at least {item['ctx']['min_length']} entry, found {_short(item['input'])}"
    expected = item["msg"].removeprefix("Input should be ")
    if item["type"] == "string_pattern_mismatch":
        expected = "a name of at most 100 letters, digits and . _ - + =, for it becomes a folder's"
    return f"{'.'.join(path)}: expected {expected}, found {_short(item['input'])}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}..."


def _keys_at(path: list[str], root: type[Section]) -> list[str]:
    """Keys that the section at ``path`` below ``root`` knows."""
    section: type[Section] | None = root
    for part in path:
        if section is None:
            return []
        if part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation)
    return sorted(section.model_fields) if section else []


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, dict, Annotated):
        for argument in typing.get_args(annotation):
            if (found := _section_in(argument)) is not None:
                return found
    return None
