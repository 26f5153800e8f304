"""A GPU's first hour: everything that was never measured on one, in the order of its worth.

    python -m benchmarks.gpu [--minutes 25] [--model FOLDER] [--out benchmarks/gpu/results.json] [--rehearse]

Each part runs in a process of its own and is stopped when the minutes are over; what it has measured until then is kept.
Without `--model` the model has SmolLM2-135M's shape and random weights, which neither equality nor time depends on; the data
are the standard library's docstrings. `--rehearse` runs the same code on a CPU with a tiny model. Ends with status 1 when a
part failed. With a GPU the tables of README.md are made anew.
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
from benchmarks.machine import machine
from benchmarks.results import store
from benchmarks.tiny import make_tokenizer, save_tiny_llama, write_completions

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def main(words: list[str] | None = None) -> int:
    given = _parse(words)
    import torch

    if not given.rehearse and not torch.cuda.is_available():
        print(
            "there is no CUDA device here: nothing was measured; --rehearse runs all of it on the CPU", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        result = measure(given, work, "cpu" if given.rehearse else "cuda")
    for name, part in result["parts"].items():
        print(f"{name:12} {part['state']:8} {part['seconds']:6.0f} s  {len(part['rows'])} rows  {part['reason'] or ''}")
    return int(any(part["state"] == "failed" for part in result["parts"].values()))


def measure(given: argparse.Namespace, work: Path, device: str) -> dict[str, Any]:
    """All parts; the result on disk has what is there after each."""
    import torch

    model, data = given.model or _model(work, given.rehearse), given.data or _data(work, given.rehearse)
    ends = time.monotonic() + 60 * given.minutes
    card = torch.cuda.get_device_name() if device == "cuda" else None
    result: dict[str, Any] = {"machine": machine(), "gpu": card, "rehearsal": given.rehearse, "parts": {}}
    for name in given.parts:
        left = ends - time.monotonic()
        result["parts"][name] = run_part(name, device, model, data, work / name, given.rehearse, left)
        store(result, given.out)
        if given.out is not None and device == "cuda":
            write_page(result, HERE / "README.md")
    return result


def run_part(
    name: str, device: str, model: Path, data: Path, work: Path, rehearse: bool, left: float
) -> dict[str, Any]:
    """One part: `state` is `done`, `stopped` (the minutes were over) or `failed`, with the last line of its error."""
    work.mkdir(parents=True, exist_ok=True)
    out, begun = work / "rows.json", time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu.parts", name, "--device", device, "--model", str(model)]
    command += ["--data", str(data), "--work", str(work), "--out", str(out), *(["--rehearse"] if rehearse else [])]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    state, reason = "done", None
    try:
        if left <= 0:
            raise subprocess.TimeoutExpired(command, left)
        ended = subprocess.run(command, env=environment, timeout=left, capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            state, reason = "failed", (ended.stderr.strip().splitlines() or ["no line"])[-1]
            print(ended.stderr, file=sys.stderr)
    except subprocess.TimeoutExpired:
        state, reason = "stopped", "the minutes were over"
    rows = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    return {"state": state, "reason": reason, "seconds": time.monotonic() - begun, "rows": rows}


def _model(work: Path, rehearse: bool) -> Path:
    """A model with random weights and a byte-level tokenizer: SmolLM2-135M's shape, or a tiny one."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.plan.architectures import FULL_CONFIGS

    if rehearse:
        return save_tiny_llama(work / "model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FULL_CONFIGS["SmolLM2-135M"]()).save_pretrained(work / "model")
    make_tokenizer().save_pretrained(work / "model")
    return work / "model"


def _data(work: Path, rehearse: bool) -> Path:
    from rightrank.demo import prepare_docstrings

    return write_completions(work / "data.jsonl") if rehearse else prepare_docstrings(work / "docstrings.jsonl")


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    for option in ("--model", "--data", "--work", "--out"):
        parser.add_argument(option, type=Path)
    given = parser.parse_args(words)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"--parts: got {', '.join(sorted(unknown))}; give some of {', '.join(PARTS)}")
    return given


if __name__ == "__main__":
    sys.exit(main())
