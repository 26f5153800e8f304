"""How arms train: tokens, batches, the frozen prefix, adapters, losses, the loop, evaluation."""
