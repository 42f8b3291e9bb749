"""One run: its plan, checks, stages and manifest; resuming and reproducing it; rounds of `align iterate`."""
