"""One run: its plan, checks, stages, manifest, and how it resumes."""
