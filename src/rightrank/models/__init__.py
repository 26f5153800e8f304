"""Base models and adapters: how they are loaded, stored, counted and truncated."""
