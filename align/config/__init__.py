"""The YAML of a run as typed sections, one module per part of a run."""

from align.config.base import Count, OutputFolder, Positive, Section, Seed
from align.config.cluster import ClusterSection
from align.config.data import CheckedSection, FilterSection, OodSection, PairsSection, SampleSection
from align.config.reading import apply_override, load_section, nearest
from align.config.reward import ObjectiveSection, RewardSection, SharpnessSection, TiltSection
from align.config.run import EvaluateSection, RunConfig, load_config
from align.config.train import (
    DistanceSection,
    EntanglementSection,
    LossSection,
    LossTerms,
    RemedySection,
    TokenMaskSection,
    TrainSection,
    WeightsSection,
)
from align.config.while_training import EarlyStoppingSection, EvalPairsSection, EvalSamplesSection, KeepSection

__all__ = [
    "CheckedSection",
    "ClusterSection",
    "Count",
    "DistanceSection",
    "EarlyStoppingSection",
    "EntanglementSection",
    "EvalPairsSection",
    "EvalSamplesSection",
    "EvaluateSection",
    "FilterSection",
    "KeepSection",
    "LossSection",
    "LossTerms",
    "ObjectiveSection",
    "OodSection",
    "OutputFolder",
    "PairsSection",
    "Positive",
    "RemedySection",
    "RewardSection",
    "RunConfig",
    "SampleSection",
    "Section",
    "Seed",
    "SharpnessSection",
    "TiltSection",
    "TokenMaskSection",
    "TrainSection",
    "WeightsSection",
    "apply_override",
    "load_config",
    "load_section",
    "nearest",
]
