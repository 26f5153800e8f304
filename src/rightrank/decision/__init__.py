"""Decide on a rank: pure functions from a table of scores to a rank with its evidence. No files, no torch."""
