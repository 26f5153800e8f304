"""Base models: find, identify and load them. What knows an adapter belongs to `adapters`."""
