"""Kill runs at random moments and compare their results with those of undisturbed runs."""
