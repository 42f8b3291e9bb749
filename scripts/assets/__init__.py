"""Fetch the small real models and data of the demo and the tests."""
