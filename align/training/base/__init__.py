"""What any trl trainer gains here: exact resume, checkpoints in the background, complete epochs, finite guard."""
