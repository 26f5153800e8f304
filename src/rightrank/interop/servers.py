"""The ranks that servers reserve memory for."""

from __future__ import annotations

from rightrank.schema.errors import ResultsError

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks


def served_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` of vLLM that fits this rank.

    Raises:
        ResultsError: a rank above the largest that vLLM supports.
    """
    found = next((served for served in VLLM_RANKS if served >= rank), None)
    if found is None:
        raise ResultsError(
            f"vLLM serves ranks up to {VLLM_RANKS[-1]}, got {rank}: resize the adapter, or merge it into the base"
        )
    return found


def max_module_rank(rank: int) -> int:
    """The rank that a server reserves for an adapter of `rank`: modules up to it cost no memory. `rank` above all of them."""
    return next((served for served in VLLM_RANKS if served >= rank), rank)
