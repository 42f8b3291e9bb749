"""Jobs in shards: over the processes of a launcher, or the workers of a Ray cluster."""
