"""Files and folders: stages, hashes, caches, object stores, console."""
