"""Spectra of updates, and adapters of another rank.

inspect: adapter_spectra, checkpoint_spectra, gradient_spectra → spectrum. resize: rank_choice (without data) or
held_out (with data) → resized_adapter. allocate: importance → ranks by module.
"""
