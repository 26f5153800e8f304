"""How arms train: targets, the adapters that share a pass, the optimizer, the loop. What is trained next belongs to `search`."""
