"""Policies of several methods compared at equal KL to the reference, with enough seeds to tell a difference of 0.1."""
