"""Time and memory at 7B: the adapter of a real shape list, and a checkpoint pair of real matrices.

    python -m benchmarks.probe.scale adapter [--gradience PATH]     # r = 64, all linear layers of a Llama 7B, bfloat16
    python -m benchmarks.probe.scale checkpoints [--layers 2]       # embeddings and that many of its 32 layers

Each measured command is a separate process; its peak is the resident set that the system reports for it. Memory of
the checkpoint comparison does not depend on the number of layers; time is proportional to it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.probe.common import store

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 4096, 11008, 32, 32000
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
RANK = 64


def elsewhere(function: Callable[..., None], *arguments: Any) -> None:
    """In a separate process: what it holds would count as the peak of every process started afterwards."""
    worker = get_context("spawn").Process(target=function, args=arguments)
    worker.start()
    worker.join()
    assert worker.exitcode == 0


def measured(command: list[str]) -> dict[str, Any]:
    """Wall seconds, peak resident bytes and exit status of a process."""
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "seconds": round(time.perf_counter() - begun, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "status": process.returncode,
        "out": out,
    }


def write_big_adapter(folder: Path) -> None:
    import torch

    from rightrank.models.adapter_files import PREFIX, write_adapter

    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {}
    for layer in range(LAYERS):
        for name, (rows, columns) in SHAPES.items():
            key = f"{PREFIX}model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator).bfloat16()
            tensors[f"{key}.lora_B.weight"] = (0.01 * torch.randn(rows, RANK, generator=generator)).bfloat16()
    names = [name.split(".")[-1] for name in SHAPES]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": names, "task_type": "CAUSAL_LM"}
    write_adapter(folder, config, tensors)


def write_checkpoints(folder: Path, layers: int) -> None:
    """A base and a fine-tune of it, bfloat16, one shard a layer; the update has rank 16 and full-rank noise."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    for kind in ("base", "tuned"):
        (folder / kind).mkdir(parents=True)
    index: dict[str, str] = {}
    for layer in (-1, *range(layers)):
        base: dict[str, Any] = {}
        if layer < 0:
            base["model.embed_tokens.weight"] = torch.randn(VOCABULARY, HIDDEN, generator=generator).bfloat16()
        else:
            for name, shape in SHAPES.items():
                weight = 0.02 * torch.randn(*shape, generator=generator)
                base[f"model.layers.{layer}.{name}.weight"] = weight.bfloat16()
        tuned = {}
        for key, weight in base.items():
            u, v = (
                torch.randn(weight.shape[0], 16, generator=generator),
                torch.randn(16, weight.shape[1], generator=generator),
            )
            noise = 1e-3 * torch.randn(weight.shape, generator=generator)
            tuned[key] = (weight.float() + 1e-3 * u @ v + noise).bfloat16()
        file = f"model-{layer + 2:05d}.safetensors"
        index |= dict.fromkeys(base, file)
        save_file(base, folder / "base" / file)
        save_file(tuned, folder / "tuned" / file)
    for kind in ("base", "tuned"):
        (folder / kind / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["adapter", "checkpoints"])
    parser.add_argument("--gradience")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write the inputs (default: a temporary folder)"
    )
    arguments = parser.parse_args()
    program = [sys.executable, "-m", "rightrank"]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        commands: dict[str, list[str]] = {}
        if arguments.what == "adapter":
            elsewhere(write_big_adapter, folder / "adapter")
            commands["rightrank inspect"] = [*program, "inspect", str(folder / "adapter"), "--json"]
            commands["rightrank resize"] = [
                *program,
                "resize",
                str(folder / "adapter"),
                str(folder / "small"),
                "--rank",
                "16",
                "--json",
            ]
            if arguments.gradience:
                peft_dir = ["--peft-dir", str(folder / "adapter"), "--json"]
                commands["gradience audit"] = [arguments.gradience, "audit", *peft_dir]
                out = ["--out-dir", str(folder / "theirs"), "--rank", "16"]
                commands["gradience truncate"] = [arguments.gradience, "truncate", *peft_dir, *out]
        else:
            elsewhere(write_checkpoints, folder, arguments.layers)
            pair = ["--base", str(folder / "base"), "--finetuned", str(folder / "tuned")]
            commands["rightrank inspect --base --finetuned"] = [*program, "inspect", *pair, "--json"]
        results: dict[str, Any] = {}
        for label, command in commands.items():
            result = measured(command)
            out = result.pop("out")
            if label.startswith("rightrank inspect") and result["status"] == 0:
                found = json.loads(out)["modules"]
                result |= {"modules": len(found), "noise_ranks": sorted({module["noise_rank"] for module in found})}
            results[label] = result
            print(label, result, flush=True)
    store(
        f"scale_{arguments.what}",
        {"layers": arguments.layers if arguments.what == "checkpoints" else LAYERS, "results": results},
    )


if __name__ == "__main__":
    main()
