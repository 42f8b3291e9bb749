"""What the aligned model is worth: gold rewards, KL to the reference, all with intervals."""
