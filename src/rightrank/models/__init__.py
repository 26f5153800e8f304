"""Base models and adapters: loading, storage, parameter counts and truncation."""
