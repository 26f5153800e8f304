"""How arms train: the base in memory, tokens, batches, losses, the loop, evaluation. What is trained next belongs to `search`."""
