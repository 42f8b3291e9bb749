"""The functions that `align` offers to Python: what the verbs compute, on tables and models in memory.

    pairs_from_dataset   table -> checked pair table          filter_pairs       which pairs to train on
    diagnose_pairs       what the pairs can teach             measure_entanglement   gradients of each pair
    measure_trust, advise   labels against margins            measure_influence  which pairs moved a held-out loss
    compare_policies     which of two policies writes better     compare_losses       what each loss does to the pairs

Each takes a ``datasets.Dataset``, a list of dicts or a DataFrame, returns an object, and raises the errors of the
command line in the words of Python. A name is imported on first use.
"""

from typing import TYPE_CHECKING

from align.io.lazy import lazy_names

if TYPE_CHECKING:
    from align.api.advice import TrustReport, advise, measure_trust
    from align.api.checked import with_checked_pairs
    from align.api.comparison import Comparison, compare_policies
    from align.api.diagnosis import diagnose_pairs
    from align.api.filtering import FilterResult, filter_pairs
    from align.api.gradients import compare_losses, measure_entanglement, measure_influence
    from align.data.in_memory import pairs_from_dataset

WHERE = {
    "pairs_from_dataset": "align.data.in_memory",
    "with_checked_pairs": "align.api.checked",
    "diagnose_pairs": "align.api.diagnosis",
    "filter_pairs": "align.api.filtering",
    "FilterResult": "align.api.filtering",
    "compare_losses": "align.api.gradients",
    "measure_entanglement": "align.api.gradients",
    "measure_influence": "align.api.gradients",
    "compare_policies": "align.api.comparison",
    "Comparison": "align.api.comparison",
    "measure_trust": "align.api.advice",
    "advise": "align.api.advice",
    "TrustReport": "align.api.advice",
}
"""Public name -> its module."""

__all__ = [
    "Comparison",
    "FilterResult",
    "TrustReport",
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

__getattr__, __dir__ = lazy_names(globals(), WHERE)
