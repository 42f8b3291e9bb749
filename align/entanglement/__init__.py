"""Exact measurements of how the gradients of chosen and rejected responses interact."""
