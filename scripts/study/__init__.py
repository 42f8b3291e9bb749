"""Studies whose results stand in the docs."""
