"""Run everything that needs a GPU, the most important measurements first.

    python -m benchmarks.gpu [--minutes 25] [--model FOLDER] [--out benchmarks/gpu/results.json] [--rehearse]

Each part runs in a separate process and is stopped when the minutes are over; its measurements until then are kept.
Without `--model`, the model has SmolLM2-135M's shape and random weights, which do not affect equality or time; the data
are the standard library's docstrings. `--rehearse` runs the same code on a CPU with a tiny model. The exit status is 1 if a
part failed. On a GPU, the tables of README.md are written again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.page import write_page
from benchmarks.gpu.parts import PARTS
from benchmarks.machine import describe_machine
from benchmarks.results import store_result
from benchmarks.tiny import make_tokenizer, save_tiny_llama, write_completions

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def main(words: list[str] | None = None) -> int:
    arguments = _parse_arguments(words)
    import torch

    if not arguments.rehearse and not torch.cuda.is_available():
        print(
            "there is no CUDA device here: nothing was measured; --rehearse runs all of it on the CPU", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        result = measure(arguments, work, "cpu" if arguments.rehearse else "cuda")
    for name, part_result in result["parts"].items():
        print(
            f"{name:12} {part_result['state']:8} {part_result['seconds']:6.0f} s  {len(part_result['rows'])} rows  {part_result['reason'] or ''}"
        )
    return int(any(part_result["state"] == "failed" for part_result in result["parts"].values()))


def measure(arguments: argparse.Namespace, work: Path, device: str) -> dict[str, Any]:
    """Run all parts and store the result after each."""
    import torch

    model, data = (
        arguments.model or _prepare_model(work, arguments.rehearse),
        arguments.data or _prepare_data(work, arguments.rehearse),
    )
    ends = time.monotonic() + 60 * arguments.minutes
    card = torch.cuda.get_device_name() if device == "cuda" else None
    result: dict[str, Any] = {"machine": describe_machine(), "gpu": card, "rehearsal": arguments.rehearse, "parts": {}}
    for name in arguments.parts:
        seconds_left = ends - time.monotonic()
        result["parts"][name] = run_part(name, device, model, data, work / name, arguments.rehearse, seconds_left)
        store_result(result, arguments.out)
        if arguments.out is not None and device == "cuda":
            write_page(result, HERE / "README.md")
    return result


def run_part(
    name: str, device: str, model: Path, data: Path, work: Path, rehearse: bool, seconds_left: float
) -> dict[str, Any]:
    """Run one part. Its `state` is `done`, `stopped` (the time was over) or `failed`, with the last line of its error."""
    work.mkdir(parents=True, exist_ok=True)
    out, begun = work / "rows.json", time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu.parts", name, "--device", device, "--model", str(model)]
    command += ["--data", str(data), "--work", str(work), "--out", str(out), *(["--rehearse"] if rehearse else [])]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    state, reason = "done", None
    try:
        if seconds_left <= 0:
            raise subprocess.TimeoutExpired(command, seconds_left)
        ended = subprocess.run(
            command, env=environment, timeout=seconds_left, capture_output=True, text=True, check=False
        )
        if ended.returncode != 0:
            state, reason = "failed", (ended.stderr.strip().splitlines() or ["no line"])[-1]
            print(ended.stderr, file=sys.stderr)
    except subprocess.TimeoutExpired:
        state, reason = "stopped", "the minutes were over"
    rows = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    return {"state": state, "reason": reason, "seconds": time.monotonic() - begun, "rows": rows}


def _prepare_model(work: Path, rehearse: bool) -> Path:
    """Return a model with random weights and a byte-level tokenizer: SmolLM2-135M's shape, or a tiny one."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.plan.architectures import FULL_CONFIGS

    if rehearse:
        return save_tiny_llama(work / "model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FULL_CONFIGS["SmolLM2-135M"]()).save_pretrained(work / "model")
    make_tokenizer().save_pretrained(work / "model")
    return work / "model"


def _prepare_data(work: Path, rehearse: bool) -> Path:
    from rightrank.demo import prepare_docstrings

    return write_completions(work / "data.jsonl") if rehearse else prepare_docstrings(work / "docstrings.jsonl")


def _parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    for option in ("--model", "--data", "--work", "--out"):
        parser.add_argument(option, type=Path)
    arguments = parser.parse_args(words)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"--parts: got {', '.join(sorted(unknown))}; give some of {', '.join(PARTS)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
