"""What shipping costs: an adapter against what is made of it, and planted faults, each compared by `rightrank.compare`.

python -m benchmarks.ship.measure smollm2 WORK            (the demo's model and text; causal)
python -m benchmarks.ship.measure encoder WORK --model M  (an encoder that classifies which module of Python a docstring is from)

Each row is appended to `results.jsonl`. Without bitsandbytes, bases in 8 and 4 bits are left out. `--converted` names GGUF files and MLX folders that
other programs made of WORK/merged-f32, which alone are measured then.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.engine.common import make_runtime
from benchmarks.machine import machine
from rightrank import compare, export
from rightrank.demo import prepare_docstrings, prepare_model_folder
from rightrank.schema.errors import ModelError
from rightrank.schema.events import Listener
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Trial
from rightrank.train.loop import run_trial
from rightrank.train.trial import TrialFolders

RESULTS = Path(__file__).with_name("results.jsonl")
RANK, ALPHA, CLASSES, HELD_OUT = 8, 32.0, 6, 48


def rows_of(which: str, docstrings: Path, folder: Path) -> tuple[Path, Path]:
    """Training rows and held-out rows."""
    rows = [json.loads(line) for line in docstrings.read_text(encoding="utf-8").splitlines()]
    if which == "encoder":
        count: dict[str, int] = {}
        for row in rows:
            count[row["group"]] = count.get(row["group"], 0) + 1
        kept = sorted(count, key=lambda name: -count[name])[:CLASSES]
        rows = [{"text": row["completion"], "label": row["group"]} for row in rows if row["group"] in kept]
    else:
        rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    rows = sorted(rows, key=lambda row: json.dumps(row)[::-1])  # in an order that has nothing to do with the files
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    size = HELD_OUT if which == "smollm2" else len(rows) // 3
    for file, part in ((held_out, rows[:size]), (train, rows[size : size + 600])):
        file.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return train, held_out


def trained(model: str, train: Path, folder: Path, steps: int, **changes: Any) -> Path:
    """An adapter of rank 8."""
    runtime = make_runtime(model, train, steps, folder / "cache", dtype="float32", device="cpu", **changes)
    arm = Arm(rank=RANK, learning_rate=1e-3, lora_alpha=ALPHA, seed=0, steps=steps)
    run_trial(runtime, Trial(trial_id="t", arm=arm), None, TrialFolders(folder / "c", folder / "adapter"), Listener())
    return folder / "adapter"


def faults(which: str, model: str, adapter: Path, work: Path) -> Iterator[tuple[str, Path]]:
    """Merged models with a fault each, by its name in the table."""
    auto: Any = AutoModelForCausalLM if which == "smollm2" else AutoModelForSequenceClassification
    classes = json.loads((adapter / "classifier.json").read_text())["id2label"] if which == "encoder" else None
    extra: dict[str, Any] = {} if classes is None else {"num_labels": len(classes), "id2label": classes}

    def saved(name: str, make: Callable[[], Any], template: str | None = None) -> tuple[str, Path]:
        torch.manual_seed(0)
        make().save_pretrained(work / name)
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = template or tokenizer.chat_template
        tokenizer.save_pretrained(work / name)
        return f"fault: {name}", work / name

    def base() -> Any:
        return auto.from_pretrained(model, dtype=torch.float32, **extra)

    def merged(**config: Any) -> Any:
        copy = Path(shutil.copytree(adapter, work / "changed", dirs_exist_ok=True))
        file = copy / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return PeftModel.from_pretrained(base(), str(copy)).merge_and_unload()

    def other() -> Any:
        whole = merged()
        for parameter in whole.parameters():
            parameter.data += torch.randn_like(parameter) * parameter.std() * (parameter.dim() > 1)
        return whole

    yield saved("adapter dropped", lambda: merged(lora_alpha=0))
    yield saved("alpha lost", lambda: merged(lora_alpha=RANK))
    yield saved("rsLoRA assumed", lambda: merged(use_rslora=True))
    yield saved("another base", other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["smollm2", "encoder"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--converted", type=Path, nargs="+", default=())
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    model = given.model or str(prepare_model_folder(given.work / "base", print))
    train, held_out = rows_of(given.which, prepare_docstrings(given.work / "docstrings.jsonl"), given.work)
    changes = {"layers_to_transform": (26, 27, 28, 29)} if given.which == "smollm2" else {}
    adapter = given.work / "adapter"
    if not adapter.exists():
        trained(model, train, given.work, given.steps, **changes)
    settings = SelectSettings(
        seq_len=128, device="cpu", dtype="float32", margin=0.005 if given.which == "smollm2" else None
    )

    def write(name: str, begun: float, answer: dict[str, Any], size: int) -> None:
        keys = ("verdict", "cause", "difference", "difference_low", "difference_high", "margin", "examples", "metric")
        row = {"model": given.which, "shipped": name, **{key: answer[key] for key in keys}, "bytes": size}
        row |= {"seconds": round(time.process_time() - begun, 1), "machine": machine()}
        print(json.dumps(row), flush=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    for kind in ("f32", "bf16", "f16") if not given.converted else ():
        begun, out = time.process_time(), given.work / f"merged-{kind}"
        shutil.rmtree(out, ignore_errors=True)
        done = export(adapter, "merged", out, check=held_out, kind=kind, base=model, settings=settings)
        write(f"merged {kind}", begun, done.check or {}, (out / "model.safetensors").stat().st_size)
    for bits in ("8bit", "4bit") if find_spec("bitsandbytes") and not given.converted else ():
        begun = time.process_time()
        try:
            found = compare(adapter, adapter, model=model, data=held_out, base_b=bits, settings=settings)
        except ModelError as error:  # bitsandbytes does not run every layer on a CPU
            print(f"{bits}: {error}")
            continue
        write(f"adapter over a base in {bits}", begun, found.model_dump(mode="json"), 0)
    converted = [(place.name, place) for place in given.converted]
    for name, place in converted or faults(given.which, model, adapter, given.work):
        begun = time.process_time()
        found = compare(adapter, place, model=model, data=held_out, settings=settings)
        write(name, begun, found.model_dump(mode="json"), 0)


if __name__ == "__main__":
    main()
