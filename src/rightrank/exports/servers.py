"""Launch lines of servers that load the adapter as it is."""

from __future__ import annotations

import shlex

from rightrank.errors import ResultsError
from rightrank.exports.recipe import Recipe
from rightrank.exports.trainers import Written

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks
VLLM_NAME = "rightrank"


def served_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` of vLLM that holds an adapter of this rank.

    Raises:
        ResultsError: above what vLLM serves.
    """
    found = next((served for served in VLLM_RANKS if served >= rank), None)
    if found is None:
        raise ResultsError(
            f"rank {rank} is above what vLLM serves ({VLLM_RANKS[-1]}): resize the adapter, or merge it into the base"
        )
    return found


def vllm(recipe: Recipe) -> Written:
    """`vllm serve` with the adapter; adapters below the maximum are padded by vLLM itself."""
    highest = max([recipe.r, *recipe.rank_pattern.values()])
    words = ["vllm", "serve", recipe.model, "--enable-lora", "--max-lora-rank", str(served_rank(highest))]
    words += ["--lora-modules", f"{VLLM_NAME}={recipe.adapter.resolve()}"]
    return Written({"vllm.sh": f"#!/bin/sh\nexec {shlex.join(words)}\n"}, "sh vllm.sh", _serving_notes(recipe))


def sglang(recipe: Recipe) -> Written:
    """SGLang's server with the adapter."""
    highest = max([recipe.r, *recipe.rank_pattern.values()])
    words = ["python", "-m", "sglang.launch_server", "--model-path", recipe.model, "--enable-lora"]
    words += ["--max-lora-rank", str(highest), "--lora-paths", f"{VLLM_NAME}={recipe.adapter.resolve()}"]
    return Written({"sglang.sh": f"#!/bin/sh\nexec {shlex.join(words)}\n"}, "sh sglang.sh", _serving_notes(recipe))


def _serving_notes(recipe: Recipe) -> list[str]:
    notes = []
    if recipe.modules_to_save:
        notes.append(
            f"servers load no modules_to_save ({', '.join(recipe.modules_to_save)}): merge the adapter instead"
        )
    if recipe.task_type != "CAUSAL_LM":
        notes.append(f"servers load adapters of causal language models; this one is {recipe.task_type}")
    return notes
