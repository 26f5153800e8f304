"""Adapter files: read, write, truncate, resize and inspect them, with no training and no base model in memory."""
