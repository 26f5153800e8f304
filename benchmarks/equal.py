"""Show that a refactoring changes no result: run seeded jobs with two checkouts, and compare what they write.

    python -m benchmarks.equal run build/equal/before     # in the old checkout
    python -m benchmarks.equal run build/equal/after      # in the new one
    python -m benchmarks.equal compare build/equal/before build/equal/after

The jobs are `select` with its three goals, for a classifier and for preference pairs; `resize` by rank and by data; `compare`; a merged export;
and the callback in transformers' and TRL's trainers, on small random models. A trained adapter must be equal to the byte, a truncated one
within 1e-6 of its norm, and exit statuses, decisions and comparisons must be equal except for seconds and paths.
Kernels differ between processors, so the folders are compared on the machine that wrote them and are not stored.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine, format_machine
from benchmarks.tiny import save_tiny_llama, sentences, write_completions, write_jsonl, write_pairs

TOLERANCE = 1e-6  # of the norm of a tensor
SMALL = (
    *(
        "--ranks",
        "1,4,16",
        "--learning-rates",
        "3e-3,1e-2",
        "--max-steps",
        "12",
        "--batch-size",
        "4",
        "--seq-len",
        "32",
    ),
    *("--max-eval-examples", "16", "--set", "num_evaluations=2", "--device", "cpu", "--json", "--quiet"),
)
COMMANDS = {
    "select adapter": ("select", "model", "data.jsonl", "--out", "adapter-run", *SMALL),
    "select best adapter": ("select", "model", "data.jsonl", "--out", "best-run", "--goal", "best-adapter", *SMALL),
    "select training rank": (
        *("select", "model", "data.jsonl", "--out", "rank-run", "--goal", "training-rank", "--seeds", "0,1", *SMALL),
    ),
    "select classifier": ("select", "model", "classes.jsonl", "--out", "class-run", *SMALL),
    "select pairs": ("select", "model", "pairs.jsonl", "--out", "pair-run", *SMALL),
    "decide": ("decide", "rank-run", "--json"),
    "resize by rank": ("resize", "adapter-run/trials/top", "resized", "--rank", "2", "--json"),
    "resize by data": (
        *(
            "resize",
            "adapter-run/trials/top",
            "resized-by-data",
            "--data",
            "held-out.jsonl",
            "--base",
            "model",
            "--json",
        ),
    ),
    "compare": (
        "compare",
        "adapter-run/trials/top",
        "resized",
        "--model",
        "model",
        "--data",
        "held-out.jsonl",
        "--json",
    ),
    "compare with base": ("compare", "base", "resized", "--model", "model", "--data", "held-out.jsonl", "--json"),
    "export merged": (
        *("export", "resized", "--to", "merged", "--out", "merged", "--check", "held-out.jsonl", "--json"),
    ),
}
TRUNCATED = ("resized", "resized-by-data", "trainer/rightrank/adapter", "trl/rightrank/adapter")
SECONDS = re.compile(r"[\d.]+ s, [\d.]+% of the training's time")
IGNORED_KEYS = (
    "seconds",
    "wall",
    "machine",
    "versions",
    "peak",
    "time",
    "path",
    "out",
    "run",
    "written",
    "folder",
    "files",
)


def write_inputs() -> None:
    """Write the model and the data into the working directory."""
    save_tiny_llama(Path("model"))
    write_completions(Path("data.jsonl"))
    write_completions(Path("held-out.jsonl"), 60, seed=9)
    write_pairs(Path("pairs.jsonl"))
    labelled = [(text, "cat" if "cat" in text else "none") for text in sentences(200, seed=2)]
    write_jsonl(Path("classes.jsonl"), [{"text": text, "label": label} for text, label in labelled])


def run_command(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Run one command in this process; return its exit status and the object that it printed."""
    from rightrank.cli import main

    stdout = io.StringIO()
    stderr = io.StringIO()
    status: Any = 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main(list(arguments))
        except SystemExit as ended:
            status = ended.code
    text = stdout.getvalue()
    answer = json.loads(text) if text.strip() else stderr.getvalue().splitlines()[-1:]
    return {"status": status, "answer": answer}


def find_top_training(run: Path) -> Path:
    """Return the adapter folder of a run's full training at the highest rank."""
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    trainings = [record for record in records if "adapter_config.json" in list_trial_files(run, record)]
    top = max(trainings, key=lambda record: (read_rank(run, record), -records.index(record)))
    return run / "trials" / top["trial_id"]


def list_trial_files(run: Path, record: dict[str, Any]) -> list[str]:
    folder = run / "trials" / str(record.get("trial_id"))
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def read_rank(run: Path, record: dict[str, Any]) -> int:
    config = json.loads((run / "trials" / record["trial_id"] / "adapter_config.json").read_text(encoding="utf-8"))
    return int(config["r"])


def train_with_callback(name: str) -> dict[str, Any]:
    """Train with transformers' or TRL's trainer and the callback; return the answer that it stored."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    from rightrank import SmallestAdapter

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained("model")
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    arguments: dict[str, Any] = {
        "output_dir": name, "max_steps": 30, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "seed": 0,
    }  # fmt: skip
    if name == "trl":
        import datasets
        import trl

        rows = datasets.load_dataset("json", data_files="data.jsonl", split="train").train_test_split(60, seed=0)
        trainer: Any = trl.SFTTrainer(
            model,
            args=trl.SFTConfig(**arguments),
            train_dataset=rows["train"],
            eval_dataset=rows["test"],
            processing_class=tokenizer,
            peft_config=lora,
        )
    else:
        encoded = [tokenizer(text) for text in sentences(200, seed=3)]
        trainer = Trainer(
            get_peft_model(model, lora),
            TrainingArguments(**arguments),
            train_dataset=encoded[:140],
            eval_dataset=encoded[140:],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
    callback = SmallestAdapter(trainer, margin="20%")
    trainer.add_callback(callback)
    trainer.train()
    trainer.model.save_pretrained(f"{name}/trained")
    assert callback.result is not None
    return {"status": 0, "answer": callback.result.answer.model_dump(mode="json")}


def run_jobs(folder: Path) -> None:
    """Run every job in `folder`, which must not exist, and write `results.json` there."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    write_inputs()
    results: dict[str, Any] = {}
    for name, arguments in COMMANDS.items():
        results[name] = run_command(arguments)
        print(f"{name}: exit status {results[name]['status']}", flush=True)
        if name == "select adapter":
            shutil.copytree(find_top_training(Path("adapter-run")), "adapter-run/trials/top")
    for name in ("trainer", "trl"):
        results[name] = train_with_callback(name)
        print(f"{name}: rank {results[name]['answer']['rank']}", flush=True)
    Path("results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def list_adapters(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name of every adapter file below `folder`, without the random names of trials, and its path."""
    for path in sorted(folder.rglob("adapter_model.safetensors")):
        yield str(path.relative_to(folder)), path


def find_tensor_difference(old: Path, new: Path) -> float:
    """Return the largest distance of two tensors of the same name, relative to the norm of the first; infinite if names or shapes differ."""
    from safetensors.numpy import load_file

    first = load_file(old)
    second = load_file(new)
    if first.keys() != second.keys():
        return np.inf
    distances = [0.0]
    for name, tensor in first.items():
        if tensor.shape != second[name].shape:
            return np.inf
        distances.append(float(np.linalg.norm(tensor - second[name]) / max(np.linalg.norm(tensor), 1e-30)))
    return max(distances)


def compare_adapters(old: Path, new: Path) -> list[str]:
    """Return a line for each adapter that is missing or differs."""
    new_files = dict(list_adapters(new))
    lines = []
    for name, path in list_adapters(old):
        if name not in new_files:
            lines.append(f"{name}: missing")
        elif path.read_bytes() != new_files[name].read_bytes():
            difference = find_tensor_difference(path, new_files[name])
            is_truncated = name.startswith(TRUNCATED)
            if not is_truncated or difference > TOLERANCE:
                lines.append(f"{name}: differs by {difference:.1e} of the norm")
    return lines


def compare_values(name: str, old: Any, new: Any) -> Iterator[str]:
    """Yield a line for each value that differs; seconds, paths and sizes in memory are not compared."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            if not any(ignored in key.split("_") for ignored in IGNORED_KEYS):
                yield from compare_values(f"{name}.{key}", old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from compare_values(f"{name}[{index}]", *pair)
    elif isinstance(old, float) and isinstance(new, float):
        if abs(old - new) > TOLERANCE * max(abs(old), 1.0):
            yield f"{name}: {old} → {new}"
    elif SECONDS.sub("", str(old)) != SECONDS.sub("", str(new)):
        yield f"{name}: {old!r} → {new!r}"


def compare_folders(old: Path, new: Path) -> int:
    """Print what differs, and return the exit status: 0 if nothing does."""
    print(format_machine(describe_machine()))
    first = json.loads((old / "results.json").read_text(encoding="utf-8"))
    second = json.loads((new / "results.json").read_text(encoding="utf-8"))
    lines = [*compare_adapters(old, new), *sorted(compare_values("results", first, second))]
    print("\n".join(lines) or f"equal: {len(first)} jobs, {len(dict(list_adapters(old)))} adapters")
    return int(bool(lines))


def main(arguments: list[str]) -> int:
    actions: dict[str, Callable[..., Any]] = {"run": run_jobs, "compare": compare_folders}
    action, *folders = arguments
    return actions[action](*(Path(folder).resolve() for folder in folders)) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
