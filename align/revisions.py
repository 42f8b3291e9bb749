"""Revisions of what is computed: parts of the keys of results, raised where the same inputs give other results.

What was kept under an earlier revision is made again, not reused.
"""

REWARDS = 2
"""What a reward model or a judge says of a text, and whether it has read the whole of it."""
SAMPLING = 2
"""What the transformers engine samples under a seed."""
STAGES = dict.fromkeys(("pairs", "reward", "crossfit", "sample", "margins", "filter", "generate", "evaluate"), 2)
"""Stages of a run; others are in their first."""
