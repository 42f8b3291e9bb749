"""Files and folders: atomic writes, stages, hashes, caches, object stores; also the console."""
