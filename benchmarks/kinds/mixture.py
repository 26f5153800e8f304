"""Ranks of experts on a small mixture: in attention and experts.

A Mixtral of four experts learns the language of `tests.tiny` with all its weights. Then two selections adapt its experts and attention
to a task in that language.

python -m benchmarks.kinds.mixture FOLDER      # writes mixture.json beside this file
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tests.tiny import make_tokenizer, sentences, write_completions
from tests.watch import Watch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.kinds.cases import FUSED
from benchmarks.kinds.dora import best_by_rank
from benchmarks.machine import machine
from rightrank import inspect, select_rank
from rightrank.schema.settings import SelectSettings

EXPERTS, STEPS = 4, 300
SETTINGS: dict[str, Any] = {
    **FUSED,
    "strategy": "grid",
    "ranks": (1, 4, 16),
    "learning_rates": (3e-3, 1e-2),
    "max_steps": 60,
    "batch_size": 8,
    "seq_len": 48,
    "eval_items": 100,
    "eval_points": 1,
    "margin": 0.02,
    "device": "cpu",
}


def trained_mixture(folder: Path) -> Path:
    """A Mixtral that has learned to repeat sentences of the language, with its router's loss."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=2, max_position_embeddings=128,
            pad_token_id=1, bos_token_id=2, eos_token_id=3, output_router_logits=True,
        )
    )  # fmt: skip
    texts = tokenizer(sentences(2000, seed=5), padding=True, truncation=True, max_length=32, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        rows = slice(step * 16 % 1984, step * 16 % 1984 + 16)
        ids, mask = texts.input_ids[rows], texts.attention_mask[rows]
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def flags_of_experts(adapter: Path) -> dict[str, int]:
    """How many experts have each flag, and how many there are."""
    experts = [module for module in inspect(adapter).modules if module.kind == "expert"]
    return {
        "experts": len(experts),
        **{flag: sum(flag in module.flags for module in experts) for flag in ("no_token", "dead")},
    }


def main(folder: Path) -> None:
    observer = Watch(notice=lambda line: print(line, flush=True))
    model, data = trained_mixture(folder / "mixture"), write_completions(folder / "data.jsonl", 1200)
    found: dict[str, Any] = {"machine": machine(), "settings": SETTINGS, "experts": EXPERTS}
    selected = select_rank(str(model), data, folder / "run", settings=SelectSettings(**SETTINGS), callbacks=[observer])
    assert selected.decision is not None
    assert selected.adapter is not None
    trials = best_by_rank(folder / "run")
    found |= {
        "rank": selected.decision.rank,
        "verdict": selected.decision.verdict,
        "adapter_rank": selected.adapter.rank,
        "losses": {rank: trials[rank].value for rank in sorted(trials)},
        "parameters": {rank: trials[rank].trainable_parameters for rank in sorted(trials)},
        "flags": flags_of_experts(selected.adapter.path),
    }
    (Path(__file__).parent / "mixture.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
