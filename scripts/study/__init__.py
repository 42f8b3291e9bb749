"""Studies whose results the docs quote."""
