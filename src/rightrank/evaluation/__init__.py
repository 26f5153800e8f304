"""Scores of examples for a base model, with or without an adapter: tokens, batches, losses. Ranks, steps and seeds belong to `training`."""
