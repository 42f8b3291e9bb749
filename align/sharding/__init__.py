"""Map a job over a table in shards: in processes of this machine or of a launcher, or on a Ray cluster."""
