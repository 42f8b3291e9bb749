"""The typed tree of one run, a module per part of it."""

from align.config.base import Count, OutputFolder, Positive, Section, Seed
from align.config.cluster import ClusterConfig
from align.config.data import FilterConfig, OodConfig, PairsConfig, SampleConfig
from align.config.reading import apply_override, load_section, nearest
from align.config.reward import ObjectiveConfig, RewardConfig, SharpnessConfig, TiltConfig
from align.config.run import EvaluateConfig, RunConfig, load_config
from align.config.train import (
    DistanceConfig,
    EntanglementConfig,
    LossConfig,
    RemedyConfig,
    TokenMaskConfig,
    TrainConfig,
    WeightsConfig,
)

__all__ = [
    "ClusterConfig",
    "Count",
    "DistanceConfig",
    "EntanglementConfig",
    "EvaluateConfig",
    "FilterConfig",
    "LossConfig",
    "ObjectiveConfig",
    "OodConfig",
    "OutputFolder",
    "PairsConfig",
    "Positive",
    "RemedyConfig",
    "RewardConfig",
    "RunConfig",
    "SampleConfig",
    "Section",
    "Seed",
    "SharpnessConfig",
    "TiltConfig",
    "TokenMaskConfig",
    "TrainConfig",
    "WeightsConfig",
    "apply_override",
    "load_config",
    "load_section",
    "nearest",
]
