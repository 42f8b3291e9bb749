"""The command line: arguments to one call; no logic and no torch."""
