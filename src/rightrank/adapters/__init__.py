"""Verbs on finished adapters: their spectra, other ranks, comparison."""
