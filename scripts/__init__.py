"""Programs around the project, run as modules: python -m scripts.study.trust."""
