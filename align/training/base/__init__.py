"""What any trl trainer gains here: exact resume, background checkpoints, whole epochs, finite guard."""
