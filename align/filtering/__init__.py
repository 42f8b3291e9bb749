"""Which pairs are worth training on: hard rules, scores, one importance, a selection with a reason for every pair."""
