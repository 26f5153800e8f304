"""Compare, resize and inspect finished adapters, and truncate adapters of a model in memory."""
