"""Selection of the pairs to train on: hard rules, scores, one importance, and a reason for every dropped pair."""
