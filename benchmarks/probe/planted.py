"""Which estimator finds a planted rank, at which noise? All tools read the same adapter folder.

    python -m benchmarks.probe.planted [--gradience PATH/TO/gradience] [--repeats 10]

An adapter of rank r = 32 has a signal of rank r* and noise, in three models of noise:

    core     independent entries in the r × r core that the factors span (what the hard threshold presumes)
    factors  independent entries in B; A a random draw, as a training that moves B in all directions would leave
    matrix   independent entries in the whole d × k update, truncated to its leading r directions

The noise level is the noise's largest singular value over the signal's smallest. The signal falls linearly from 3 to 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.probe.common import store
from rightrank.api.adapters import inspect
from rightrank.models.adapter_files import PREFIX, write_adapter

RANK = 32
SHAPES = ((256, 256), (384, 128))
PLANTED = (1, 2, 4, 8, 12)
LEVELS = (0.0, 0.1, 0.3, 0.6, 0.9)
MODELS = ("core", "factors", "matrix")


def orthonormal(generator: np.random.Generator, rows: int, columns: int) -> Any:
    return np.linalg.qr(generator.standard_normal((rows, columns)))[0]


def planted_factors(
    generator: np.random.Generator, shape: tuple[int, int], rank: int, level: float, model: str
) -> tuple[Any, Any]:
    """`(B [d, 32], A [32, k])` with a signal of `rank` and noise."""
    rows, columns = shape
    signal = np.linspace(3, 1, rank)
    if model == "core":
        noise = generator.standard_normal((RANK, RANK))
        core = level * noise / np.linalg.norm(noise, 2)
        core[np.arange(rank), np.arange(rank)] += signal
        return orthonormal(generator, rows, RANK) @ core, orthonormal(generator, columns, RANK).T
    if model == "factors":
        a = generator.standard_normal((RANK, columns)) / np.sqrt(columns)
        mix = orthonormal(generator, RANK, rank)
        u = orthonormal(generator, rows, rank)
        # the signal lies in directions that A's rows span
        b = (u * signal) @ mix.T
        noise = generator.standard_normal((rows, RANK))
        return b + level * noise / np.linalg.norm(noise @ a, 2), a
    whole = (orthonormal(generator, rows, rank) * signal) @ orthonormal(generator, columns, rank).T
    noise = generator.standard_normal(shape)
    u, s, vt = np.linalg.svd(whole + level * noise / np.linalg.norm(noise, 2), full_matrices=False)
    return u[:, :RANK] * s[:RANK], vt[:RANK]


def write_cases(folder: Path, repeats: int) -> dict[str, tuple[str, int, float]]:
    """One adapter whose modules are the cases; the truth by module name."""
    generator = np.random.default_rng(0)
    tensors: dict[str, torch.Tensor] = {}
    truth: dict[str, tuple[str, int, float]] = {}
    number = 0
    for model in MODELS:
        for level in LEVELS:
            for rank in PLANTED:
                for repeat in range(repeats):
                    name = f"model.layers.{number}.self_attn.q_proj"
                    b, a = planted_factors(generator, SHAPES[repeat % 2], rank, level, model)
                    tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.from_numpy(a).float()
                    tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.from_numpy(b).float()
                    truth[name] = (model, rank, level)
                    number += 1
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    write_adapter(folder, config, tensors)
    return truth


def our_answers(folder: Path) -> tuple[dict[str, dict[str, int]], float]:
    begun = time.perf_counter()
    found = inspect(folder)
    seconds = time.perf_counter() - begun
    answers: dict[str, dict[str, int]] = {}
    for module in found.modules:
        answers[module.name] = {
            "hard threshold (noise_rank)": module.noise_rank,
            **{f"energy {part}": rank or 0 for part, rank in module.energy_rank.items()},
            "effective rank": round(module.effective_rank or 0),
            "stable rank": round(module.stable_rank),
        }
    return answers, seconds


def gradience_answers(program: str, folder: Path) -> tuple[dict[str, dict[str, int]], float]:
    command = [program, "audit", "--peft-dir", str(folder), "--json", "--layers"]
    command += ["--rank-policies", "energy@0.90,knee,erank,oht"]
    begun = time.perf_counter()
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds = time.perf_counter() - begun
    rows = json.loads(out[out.index("{") :])["layer_data"]["layer_rows"]
    names = {
        "energy_90": "gradience energy@0.90",
        "knee": "gradience knee",
        "erank": "gradience erank",
        "oht": "gradience oht",
    }
    return {
        row["name"].removeprefix(PREFIX): {
            label: row["rank_suggestions"][key]["k"] for key, label in names.items() if key in row["rank_suggestions"]
        }
        for row in rows
    }, seconds


def table(truth: dict[str, tuple[str, int, float]], answers: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Exact hits in percent by estimator, noise model and level; and the mean of answer minus truth."""
    hits: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    errors: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for name, (model, rank, level) in truth.items():
        for estimator, answer in answers.get(name, {}).items():
            hits[estimator][f"{model} {level:g}"].append(answer == rank)
            errors[estimator][f"{model} {level:g}"].append(answer - rank)
    return {
        estimator: {
            cell: {
                "exact_percent": round(100 * float(np.mean(values))),
                "bias": round(float(np.mean(errors[estimator][cell])), 2),
            }
            for cell, values in cells.items()
        }
        for estimator, cells in hits.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradience")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "planted"
        truth = write_cases(folder, arguments.repeats)
        answers, ours = our_answers(folder)
        seconds = {"rightrank (in process)": ours}
        if arguments.gradience:
            theirs, seconds["gradience (process)"] = gradience_answers(arguments.gradience, folder)
            for module, found in theirs.items():
                answers.setdefault(module, {}).update(found)
    result = table(truth, answers)
    print(f"{len(truth)} modules, exact rank found in % (mean error), by noise level")
    for model in MODELS:
        print(f"\n{model:<28}" + "".join(f"{level:>14g}" for level in LEVELS))
        for estimator, cells in result.items():
            row = [cells[f"{model} {level:g}"] for level in LEVELS]
            print(f"{estimator:<28}" + "".join(f"{cell['exact_percent']:>6}% ({cell['bias']:+5.1f})" for cell in row))
    store("planted", {"repeats": arguments.repeats, "modules": len(truth), "seconds": seconds, "table": result})


if __name__ == "__main__":
    main()
