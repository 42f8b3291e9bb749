"""Losses and margin weights: pure functions of log-probs and margins, and their registry."""
