"""Margin-adaptive preference alignment. Importing this package loads nothing heavy; a name loads when it is used.

``from align import PreferenceConfig, PreferenceTrainer`` is the Python API (docs/python.md); ``align`` on the command
line is the same from a run file.
"""

from typing import TYPE_CHECKING

from align.io.lazy import lazy_names

if TYPE_CHECKING:
    from align.api import advise as advise
    from align.api import compare_losses as compare_losses
    from align.api import compare_policies as compare_policies
    from align.api import diagnose_pairs as diagnose_pairs
    from align.api import filter_pairs as filter_pairs
    from align.api import measure_entanglement as measure_entanglement
    from align.api import measure_influence as measure_influence
    from align.api import measure_trust as measure_trust
    from align.api import pairs_from_dataset as pairs_from_dataset
    from align.api import with_checked_pairs as with_checked_pairs
    from align.errors import AlignError as AlignError
    from align.losses.pairwise import PairLogps as PairLogps
    from align.losses.registry import LOSSES as LOSSES
    from align.training.preference_config import PreferenceConfig as PreferenceConfig
    from align.training.trainer import PreferenceTrainer as PreferenceTrainer

__version__ = "0.1.0"

_NAMES = {
    "AlignError": "align.errors",
    "LOSSES": "align.losses.registry",
    "PairLogps": "align.losses.pairwise",
    "PreferenceConfig": "align.training.preference_config",
    "PreferenceTrainer": "align.training.trainer",
    "advise": "align.api",
    "compare_losses": "align.api",
    "compare_policies": "align.api",
    "diagnose_pairs": "align.api",
    "filter_pairs": "align.api",
    "measure_entanglement": "align.api",
    "measure_influence": "align.api",
    "measure_trust": "align.api",
    "pairs_from_dataset": "align.api",
    "with_checked_pairs": "align.api",
}
"""Public name -> module that defines it."""
__all__ = [
    "LOSSES",
    "AlignError",
    "PairLogps",
    "PreferenceConfig",
    "PreferenceTrainer",
    "advise",
    "compare_losses",
    "compare_policies",
    "diagnose_pairs",
    "filter_pairs",
    "measure_entanglement",
    "measure_influence",
    "measure_trust",
    "pairs_from_dataset",
    "with_checked_pairs",
]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)
