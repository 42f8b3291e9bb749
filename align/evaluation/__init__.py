"""Measures of an aligned policy and of a reward model: rewards, KL, win rates, accuracy; all with intervals."""
