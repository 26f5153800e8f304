"""Placebo: data that hold nothing to learn, through the whole main job. No rank should come out of it.

    python -m benchmarks.decide.placebo        # prints the table, writes placebo.json

A tiny Llama is first trained in full on data of each kind, so that it knows the format and the frequencies: what is
left is what completions owe to their prompts. Then `select` sees fresh data of that kind:

    random      completions of random words, nothing to do with the prompt
    shuffled    true completions, dealt out to other prompts
    true        the control: the completion is the prompt's first three words

Beside them one longer control (`--longer-only` runs it alone and adds it to the stored runs).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from tests.tiny import WORDS, make_tokenizer, sentences, tiny_llama_config, write_jsonl

from benchmarks.machine import machine
from rightrank import select_rank
from rightrank.schema.settings import SelectSettings

HERE = Path(__file__).parent
Kind = Literal["random", "shuffled", "true"]
KINDS: tuple[Kind, ...] = ("random", "shuffled", "true")
PRETRAIN_STEPS = 400
LONGER: dict[str, Any] = {"max_steps": 250, "ranks": (1, 4)}
SETTINGS: dict[str, Any] = {
    "strategy": "grid",
    "ranks": (1, 4, 16),
    "learning_rates": (5e-3,),
    "max_steps": 50,
    "batch_size": 8,
    "seq_len": 48,
    "eval_items": 200,
    "eval_points": 1,
    "device": "cpu",
}


def rows(kind: Kind, count: int, seed: int) -> list[dict[str, str]]:
    prompts = sentences(count, seed)
    completions = [" ".join(text.split()[:3]) for text in prompts]
    generator = random.Random(seed + 1)
    if kind == "random":
        completions = [" ".join(generator.choices(WORDS, k=3)) for _ in prompts]
    elif kind == "shuffled":
        generator.shuffle(completions)
    return [{"prompt": f"{p} : ", "completion": c} for p, c in zip(prompts, completions, strict=True)]


def make_base(folder: Path, seed: int, steps: int) -> Path:
    """A tiny model trained in full on shuffled rows: it knows words, format and frequencies."""
    from transformers import LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(tiny_llama_config(len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    pool = rows("shuffled", 16 * steps, 9000 + seed)
    for step in range(steps):
        batch = tokenizer(
            [row["prompt"] + row["completion"] + tokenizer.eos_token for row in pool[16 * step : 16 * step + 16]],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=96,
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def one_run(kind: Kind, seed: int, base: Path, out: Path, changes: dict[str, Any]) -> dict[str, Any]:
    data = write_jsonl(out.with_suffix(".jsonl"), rows(kind, 1200, 100 * seed + KINDS.index(kind)))
    settings = SelectSettings(**SETTINGS | {"seeds": (2 * seed, 2 * seed + 1)} | changes)
    decision = select_rank(str(base), data, out, settings=settings).decision
    values = {str(e.rank): round(e.value, 4) for e in decision.ranks}
    return {
        "kind": kind,
        "seed": seed,
        "steps": settings.max_steps,
        "verdict": decision.verdict,
        "rank": decision.rank,
        "values": values,
        "sentence": decision.sentence,
    }


def study(seeds: int, changes: dict[str, Any], pretrain_steps: int = PRETRAIN_STEPS) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory() as place:
        for seed in range(seeds):
            base = make_base(Path(place) / f"base-{seed}", seed, pretrain_steps)
            for kind in KINDS:
                found.append(one_run(kind, seed, base, Path(place) / f"{kind}-{seed}", changes))
                print(json.dumps(found[-1]), flush=True)
    return found


def longer() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        base = make_base(Path(place) / "base", 0, PRETRAIN_STEPS)
        found = one_run("true", 0, base, Path(place) / "longer", LONGER)
        print(json.dumps(found))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--longer-only", action="store_true")
    asked = parser.parse_args()
    begun = time.perf_counter()
    if asked.longer_only:
        stored = json.loads((HERE / "placebo.json").read_text())
        stored["runs"].append(longer())
        (HERE / "placebo.json").write_text(json.dumps(stored, indent=1) + "\n")
        return
    found = [*study(asked.seeds, {}), longer()]
    result = {"machine": machine(), "seconds": round(time.perf_counter() - begun), "runs": found}
    (HERE / "placebo.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
