"""Sampling engines behind one interface (types.py), the sampling job, and what completions are used for."""
