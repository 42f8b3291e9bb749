"""How models read what they score: parts of the keys of scores, changed where the same model gives other scores."""

ANSWERS = "own logits"
"""Of judges that are asked for a word (reward_models/llm_judge.py)."""
ASKING = frozenset({"rubric", "yes_no"})
"""Quality scorers that are such judges."""
