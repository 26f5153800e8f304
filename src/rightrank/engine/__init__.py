"""How arms train: encode, batches, prefix, adapters, loss, evaluate, train."""
