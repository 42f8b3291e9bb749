"""What a table of pairs can teach, before a model is trained on it."""
