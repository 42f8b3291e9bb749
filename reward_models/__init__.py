"""Everything that turns (prompt, completion) into a number. Never imports align.training, filtering or pipeline."""
