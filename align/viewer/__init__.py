"""The page of `align view` over pair tables and runs: its server, its queries, and an append-only file of decisions."""
