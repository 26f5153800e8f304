"""The rules for several devices against two processes on this CPU (gloo): DDP's buckets and FSDP's shards.

    python -m benchmarks.plan.sharded [--out benchmarks/plan/results/sharded.json]

A small Llama with adapters, wrapped by torch's own DDP and `fully_shard` (one unit a block); tensor memory as torch's
profiler counts it in the third step, in each process. Prints the plan's error; ends with status 1 above `LIMIT`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM

from benchmarks.machine import machine
from benchmarks.plan.architectures import small_configs
from rightrank.plugins.plan.planner import plan_config
from rightrank.schema.plan_settings import PlanSettings, make_plan_settings

LIMIT = 0.15
WORLD = 2
CONFIG = small_configs(128, 4, 1024, 256)["llama"]
SHAPE: dict[str, Any] = {"device": "cpu", "dtype": "float32", "ranks": (32,), "batch_size": 2, "seq_len": 64}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [compare(kind) for kind in ("ddp", "fsdp")]
    print(machine())
    if chosen.out is not None:
        chosen.out.write_text(json.dumps({"machine": machine(), "cases": rows}, indent=1) + "\n")
    return int(max(abs(row["error"]) for row in rows) > LIMIT)


def compare(kind: str) -> dict[str, Any]:
    settings = make_plan_settings(SHAPE | {"sharding": kind, "num_devices": WORLD})
    row = plan_config(CONFIG(), "llama", settings, prices=False).ranks[0]
    measured = max(measure(kind))
    found = {
        "sharding": kind,
        "predicted": row.peak_bytes,
        "measured": measured,
        "error": row.peak_bytes / measured - 1,
        "components": row.components,
    }
    print(f"{kind:5} {row.peak_bytes:>12,} {measured:>12,} {found['error']:+.2%}", flush=True)
    return found


def measure(kind: str) -> list[int]:
    """The peak of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context: Any = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_process, (kind, port, results), nprocs=WORLD, join=True)  # type: ignore[no-untyped-call]
    return [results.get() for _ in range(WORLD)]


def _process(rank: int, kind: str, port: int, results: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    settings = make_plan_settings(SHAPE)
    torch.manual_seed(0)
    # From before the first tensor on: what was there before is not seen to go, and FSDP drops the whole weights.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = AutoModelForCausalLM.from_config(CONFIG(), dtype=torch.float32)
        config = LoraConfig(task_type="CAUSAL_LM", r=32, target_modules="all-linear")
        wrapped = _wrapped(get_peft_model(model, config), kind)
        del model
        _train(wrapped, settings)
    results.put(_highest_after(profiler, "third step"))
    dist.destroy_process_group()


def _wrapped(adapted: Any, kind: str) -> Any:
    if kind == "ddp":
        return DistributedDataParallel(adapted)
    for block in adapted.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(adapted)
    return adapted


def _train(model: Any, settings: PlanSettings) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=False)
    ids = torch.randint(1, 1024, (settings.batch_size, settings.seq_len))
    for number in range(3):
        with record_function("third step" if number == 2 else "step"):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _highest_after(profiler: Any, name: str) -> int:
    events = profiler.profiler.kineto_results.events()
    begin = min(event.start_ns() for event in events if event.name() == name)
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now, highest = 0, -sys.maxsize
    for at, change in changes:
        now += change
        if at >= begin:
            highest = max(highest, now)
    return highest


if __name__ == "__main__":
    sys.exit(main())
