"""Kill runs at random moments and compare their results with undisturbed ones."""
